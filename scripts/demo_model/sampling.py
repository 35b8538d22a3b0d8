"""A plain sampler for judging the model during training: Euler steps along the flow, with guidance, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo_model.clips import to_uint8
from demo_model.dit_training import SHIFT
from demo_model.networks import encode_text
from demo_model.tokenizer import encode
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan


def shifted_sigmas(num_steps: int) -> list[float]:
    """Noise levels 1 … 0, one more than there are steps."""
    levels = np.linspace(1, 0, num_steps + 1)
    return (SHIFT * levels / (1 + (SHIFT - 1) * levels)).tolist()


class PlainSampler:
    """Clips from captions. The transformer takes folded text (`PaddedTextAttention`)."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        encoder: nn.Module,
        vae: AutoencoderKLWan,
        tokenizer: Tokenizer,
        *,
        text_length: int,
        guidance_scale: float = 4.0,
        num_steps: int = 20,
        batch_size: int = 32,
    ) -> None:
        self.transformer, self.encoder, self.vae, self.tokenizer = transformer, encoder, vae, tokenizer
        self.text_length, self.guidance_scale = text_length, guidance_scale
        self.num_steps, self.batch_size = num_steps, batch_size

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], seeds: Sequence[int], num_frames: int) -> list[np.ndarray]:
        """One clip [T, 128, 128, 3] uint8 for each caption."""
        clips: list[np.ndarray] = []
        for start in range(0, len(captions), self.batch_size):
            part = slice(start, start + self.batch_size)
            clips.extend(self._batch(list(captions[part]), list(seeds[part]), num_frames))
        return clips

    def _batch(self, captions: list[str], seeds: list[int], num_frames: int) -> list[np.ndarray]:
        device = next(self.transformer.parameters()).device
        shape = (self.vae.config.z_dim, (num_frames - 1) // 4 + 1, 16, 16)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            text = self._encode([*captions, *[""] * len(captions)], device)
            latents = self._integrate(torch.stack(noise).to(device), text)
            video = self.vae.decode(self.vae.denormalise(latents))
        return list(to_uint8((video.float().permute(0, 2, 3, 4, 1) + 1) / 2))

    def _encode(self, captions: list[str], device: torch.device) -> Tensor:
        ids, mask = (torch.from_numpy(part).to(device) for part in encode(self.tokenizer, captions, self.text_length))
        return encode_text(self.encoder, ids, mask)

    def _integrate(self, latents: Tensor, text: Tensor) -> Tensor:
        sigmas = shifted_sigmas(self.num_steps)
        for sigma, following in pairwise(sigmas):
            timesteps = torch.full((len(text),), 1000 * sigma, device=latents.device)
            velocity, unconditional = self.transformer(latents.repeat(2, 1, 1, 1, 1), timesteps, text).float().chunk(2)
            velocity = unconditional + self.guidance_scale * (velocity - unconditional)
            latents = latents + (following - sigma) * velocity
        return latents
