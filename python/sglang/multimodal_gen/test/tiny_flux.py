"""Tiny random FLUX.1 checkpoints in diffusers layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers

from sglang.multimodal_gen.test.tiny_checkpoints import tiny_tokenizer
from sglang.multimodal_gen.test.tiny_parts import tiny_clip, tiny_clip_tokenizer, tiny_picture_vae, tiny_t5
from sglang.multimodal_gen.test.tiny_wan import randomised

TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
DYNAMIC_SHIFT = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_image_seq_len": 4,
    "max_image_seq_len": 64,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


@dataclass(frozen=True, kw_only=True)
class TinyFlux:
    """What differs between the random checkpoints."""

    seed: int = 0
    text_heads: int = 3
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=lambda: DYNAMIC_SHIFT)


TINY_FLUXES = {
    "dev": TinyFlux(),
    "schnell": TinyFlux(seed=1, transformer={"guidance_embeds": False}, scheduler={"shift": 1.0}),
    "wide": TinyFlux(
        seed=2,
        transformer={
            "num_layers": 2,
            "num_single_layers": 1,
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "axes_dims_rope": (4, 4, 4),
        },
    ),
    "shallow_vae": TinyFlux(
        seed=3,
        transformer={"in_channels": 32},
        vae={
            "latent_channels": 8,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
    ),
}


def save_tiny_flux(directory: Path, recipe: TinyFlux, pipeline_class: str = "FluxPipeline") -> Path:
    """Write the checkpoint that diffusers' own pipeline saves."""
    seed = recipe.seed
    transformer = diffusers.FluxTransformer2DModel(**(TINY_TRANSFORMER | recipe.transformer))
    pipeline = getattr(diffusers, pipeline_class)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**recipe.scheduler),
        vae=tiny_picture_vae(seed + 100, **recipe.vae),
        text_encoder=tiny_clip(seed + 200),
        tokenizer=tiny_clip_tokenizer(),
        text_encoder_2=tiny_t5(seed + 300, num_heads=recipe.text_heads),
        tokenizer_2=tiny_tokenizer(),
        transformer=randomised(transformer, seed),
    )
    pipeline.save_pretrained(directory)
    return directory
