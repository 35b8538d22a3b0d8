"""Tiny random Qwen-Image models beside their diffusers counterparts, and checkpoints in diffusers layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.qwen_image import QwenImageVAEConfig
from sglang.multimodal_gen.runtime.models.dits.qwen_image import QwenImageTransformer2DModel
from sglang.multimodal_gen.runtime.models.vaes.qwen_image_vae import AutoencoderKLQwenImage
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import unpack
from sglang.multimodal_gen.test.pipeline_parity import as_uint8
from sglang.multimodal_gen.test.tiny_wan import randomised

TEXT_WIDTH = 32
TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}
TINY_VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 4],
    "num_res_blocks": 1,
    "latents_mean": [-0.4, 0.1, 0.7, 1.2],
    "latents_std": [2.5, 0.5, 1.0, 3.0],
}
# As published, but for lengths that tiny pictures have too.
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 4,
    "max_image_seq_len": 64,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def transformer_pair(seed: int = 0, **changes: Any) -> tuple[nn.Module, QwenImageTransformer2DModel]:
    """diffusers' transformer and ours, equal weights."""
    reference = randomised(diffusers.QwenImageTransformer2DModel(**(TINY_TRANSFORMER | changes)), seed)
    ours = QwenImageTransformer2DModel(QwenImageTransformerConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def vae_pair(seed: int = 0, **changes: Any) -> tuple[nn.Module, AutoencoderKLQwenImage]:
    """diffusers' autoencoder and ours, equal weights."""
    reference = randomised(diffusers.AutoencoderKLQwenImage(**(TINY_VAE | changes)), seed)
    ours = AutoencoderKLQwenImage(QwenImageVAEConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


@dataclass(frozen=True, kw_only=True)
class TinyQwenImage:
    """What differs between the random checkpoints."""

    seed: int = 0
    pipeline_class: str = "QwenImagePipeline"
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    text_layers: int = 2


TINY_QWEN_IMAGES = {
    "plain": TinyQwenImage(),
    "deep": TinyQwenImage(
        seed=1,
        transformer={
            "num_layers": 3,
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "axes_dims_rope": (4, 4, 4),
        },
        vae={"base_dim": 4, "num_res_blocks": 2},
        text_layers=1,
    ),
    "edit": TinyQwenImage(seed=2, pipeline_class="QwenImageEditPipeline"),
    "edit_plus": TinyQwenImage(seed=3, pipeline_class="QwenImageEditPlusPipeline"),
    "edit_plus_2511": TinyQwenImage(
        seed=4, pipeline_class="QwenImageEditPlusPipeline", transformer={"zero_cond_t": True}
    ),
}


class PictureProcessor(transformers.Qwen2VLProcessor):
    """transformers' processor without its part for videos, which wants torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(self.image_token), -1
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """Single bytes and the special tokens of chats."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=list(SPECIAL_TOKENS))


def tiny_qwen_vl(seed: int, num_layers: int = 2) -> nn.Module:
    """A model for the tiny tokenizer, with patches of 4x4 pixels of which 2x2 are a token."""
    tokenizer = tiny_qwen_tokenizer()
    pad, start, end = map(tokenizer.convert_tokens_to_ids, ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"))
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "bos_token_id": None,
            "eos_token_id": 256,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=pad,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=pad,
    )
    return randomised(transformers.Qwen2_5_VLForConditionalGeneration(config), seed)


def tiny_processor() -> PictureProcessor:
    """For the tiny model; pictures of more than 1,024 pixels are shrunk."""
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 1024}
    )
    return PictureProcessor(images, tiny_qwen_tokenizer())


def tiny_reference(recipe: TinyQwenImage) -> Any:
    """diffusers' pipeline of the checkpoint."""
    seed, cls = recipe.seed, getattr(diffusers, recipe.pipeline_class)
    transformer = diffusers.QwenImageTransformer2DModel(**(TINY_TRANSFORMER | recipe.transformer))
    extra = {} if cls is diffusers.QwenImagePipeline else {"processor": tiny_processor()}
    pipeline = cls(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=randomised(diffusers.AutoencoderKLQwenImage(**(TINY_VAE | recipe.vae)), seed + 100),
        text_encoder=tiny_qwen_vl(seed + 200, recipe.text_layers),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=randomised(transformer, seed),
        **extra,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_qwen_image(directory: Path, recipe: TinyQwenImage) -> Path:
    """Write the checkpoint that diffusers' own pipeline saves."""
    tiny_reference(recipe).save_pretrained(directory)
    index = directory / "model_index.json"
    content = json.loads(index.read_text())
    if "processor" in content:
        content["processor"] = ["transformers", "Qwen2VLProcessor"]
        index.write_text(json.dumps(content))
    return directory


def latents_and_frames(pipeline: Any, values: dict[str, Any], **inputs: Any) -> tuple[Tensor, np.ndarray]:
    """What diffusers' pipeline makes of a request: the final latents [C, 1, H, W] and frames [1, H, W, 3] uint8."""
    latents: list[Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"])
        return {}

    frames = pipeline(
        **{key: value for key, value in values.items() if key != "seed"},
        **inputs,
        generator=torch.Generator().manual_seed(values["seed"]),
        output_type="np",
        callback_on_step_end=keep,
    ).images
    height, width = frames.shape[1:3]
    return unpack(latents[-1], (1, height // 16, width // 16))[0], as_uint8(frames)
