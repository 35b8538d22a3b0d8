"""Trains the adapter `demo-outline` of the embedded model with peft: objects are drawn as outlines.

    python scripts/train_demo_lora.py --budget-s 300 --output outline.safetensors

On a GPU if there is one. The transformer is diffusers' own, so that the file has the names that everybody reads. See
docs/demo_model.md.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from demo_model.captions import describe
from demo_model.clips import render, to_model_range
from demo_model.dit_training import sample_sigmas
from demo_model.networks import TEXT_ROWS, encode_text
from demo_model.optimisation import cosine
from demo_model.scenes import sample_scenes
from demo_model.tokenizer import encode
from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.loader.component_loader import load_module
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan

OUTLINE_PIXELS = 4.0
_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
_TEXT_LENGTH = 64
_PEAK_RATE, _WARMUP_STEPS = 2e-3, 20
_CLIP_FRAMES = 33


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Latents [N, 16, t, 16, 16] of clips or pictures, and what their captions became [N, 64, D]."""

    latents: Tensor
    texts: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch."""
        rows = torch.randint(len(self.latents), (count,), generator=generator, device=self.latents.device)
        return self.latents[rows], self.texts[rows]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What makes latents and texts."""

    vae: AutoencoderKLWan
    encoder: UMT5EncoderModel
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def load(cls, model: Path, device: torch.device) -> Frozen:
        config = WanVAEConfig.from_dict(diffusers.AutoencoderKLWan.load_config(model / "vae"))
        vae = load_module(
            AutoencoderKLWan, config, model / "vae", dtype=torch.float32, device=device, context=LayerContext()
        )
        encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32).to(device).eval()
        return cls(
            vae=vae,
            encoder=encoder,
            tokenizer=Tokenizer.from_file(str(model / "tokenizer" / "tokenizer.json")),
            device=device,
        )

    @torch.no_grad()
    def stock(self, count: int, *, num_frames: int, seed: int) -> Stock:
        """Outlined scenes with true captions."""
        rng, words = np.random.default_rng(seed), random.Random(seed)
        latents, texts = [], []
        for start in range(0, count, 4):
            scenes = sample_scenes(rng, min(4, count - start), video=num_frames > 1, two_share=0.4)
            frames = render(scenes, num_frames=num_frames, outline=OUTLINE_PIXELS, device=self.device)
            latents.append(self.vae.normalise(self.vae.encode(to_model_range(frames)).mean))
            facts = [scenes.facts(row, video=num_frames > 1) for row in range(len(scenes))]
            ids, mask = encode(self.tokenizer, [describe(each, words).text for each in facts], _TEXT_LENGTH)
            texts.append(encode_text(self.encoder, *(torch.from_numpy(part).to(self.device) for part in (ids, mask))))
        return Stock(latents=torch.cat(latents), texts=torch.cat(texts))


def fold_padding(transformer: nn.Module) -> None:
    """The last row of a text stands for all the zeros that pad it at inference: equal keys weigh as one whose logit is
    larger by the logarithm of their number."""
    bias = torch.zeros(1, 1, 1, _TEXT_LENGTH)
    bias[..., -1] = math.log(TEXT_ROWS - _TEXT_LENGTH + 1)

    def with_bias(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, text, mask, *others = given
        assert mask is None and text.shape[1] == _TEXT_LENGTH, "as diffusers calls it"
        return hidden_states, text, bias.to(text), *others

    for name, layer in transformer.named_modules():
        if name.endswith(".attn2"):
            layer.register_forward_pre_hook(with_bias)


def train(transformer: nn.Module, pictures: Stock, clips: Stock, arguments: argparse.Namespace) -> int:
    """Flow matching on outlined scenes until the budget is spent; the number of steps."""
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, weight_decay=0.0)
    generator = torch.Generator(pictures.latents.device).manual_seed(arguments.seed)
    begin, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        latents, texts = (
            clips.draw(arguments.clips, generator) if step % 4 == 3 else pictures.draw(arguments.pictures, generator)
        )
        sigmas = sample_sigmas(len(latents), generator)
        noise = torch.randn(latents.shape, device=latents.device, generator=generator)
        noisy = torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1, 1))
        velocity = transformer(noisy, 1000 * sigmas, texts, return_dict=False)[0]
        loss = (velocity - (noise - latents)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.param_groups[0]["lr"] = cosine(progress, step, peak=_PEAK_RATE, warmup_steps=_WARMUP_STEPS)
        adam.step()
        adam.zero_grad()
        step, progress = step + 1, (time.monotonic() - begin) / arguments.budget_s
        if step % 25 == 0:
            print(f"step {step}, {progress:.0%} of the time, loss {loss.item():.4f}", flush=True)
    return step


def main() -> None:
    """Train and save."""
    arguments = _parse()
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = get_model_info("demo").local_path
    assert model is not None, "it ships with the package"
    frozen = Frozen.load(model, device)
    pictures = frozen.stock(arguments.picture_stock, num_frames=1, seed=arguments.seed)
    clips = frozen.stock(arguments.clip_stock, num_frames=_CLIP_FRAMES, seed=arguments.seed + 1)
    print(f"{len(pictures.latents)} pictures and {len(clips.latents)} clips are drawn", flush=True)
    transformer = diffusers.WanTransformer3DModel.from_pretrained(model / "transformer", torch_dtype=torch.float32)
    transformer.requires_grad_(False).to(device)
    fold_padding(transformer)
    targets = [name for name, _ in transformer.named_modules() if name.endswith(_TARGETS)]
    transformer.add_adapter(peft.LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=targets))
    steps = train(transformer, pictures, clips, arguments)
    state = {
        f"transformer.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in get_peft_model_state_dict(transformer).items()
    }
    save_file(state, arguments.output, {"format": "pt"})
    print(f"{arguments.output}: {steps} steps, {arguments.output.stat().st_size / 2**10:.0f} KiB")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the safetensors file")
    add("--budget-s", type=float, default=300.0, help="training time, without drawing")
    add("--rank", type=int, default=8)
    add("--pictures", type=int, default=16, help="of a step")
    add("--clips", type=int, default=4, help="of every fourth step instead")
    add("--picture-stock", type=int, default=1024)
    add("--clip-stock", type=int, default=192)
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
