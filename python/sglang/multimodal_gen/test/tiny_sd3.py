"""Tiny Stable Diffusion 3 transformers beside their diffusers counterparts, and whole checkpoints, all random."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from sglang.multimodal_gen.configs.models.dits.sd3 import SD3TransformerConfig
from sglang.multimodal_gen.runtime.models.dits.sd3 import SD3Transformer2DModel
from sglang.multimodal_gen.test.tiny_checkpoints import tiny_tokenizer
from sglang.multimodal_gen.test.tiny_parts import tiny_clip, tiny_clip_tokenizer, tiny_picture_vae, tiny_t5
from sglang.multimodal_gen.test.tiny_wan import noise, randomised

TINY_TRANSFORMER: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 12,
}
# What 3.5 medium adds.
TINY_DUAL_TRANSFORMER: dict[str, Any] = TINY_TRANSFORMER | {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"}


def tiny_transformer(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """diffusers' transformer with all parameters and the position table redrawn."""
    model = randomised(diffusers.SD3Transformer2DModel(**config), seed)
    with torch.no_grad():
        model.pos_embed.pos_embed.copy_(noise(*model.pos_embed.pos_embed.shape, seed=seed + 1))
    return model


def transformer_pair(config: dict[str, Any], seed: int = 0) -> tuple[nn.Module, SD3Transformer2DModel]:
    """diffusers' transformer and ours, equal weights."""
    reference = tiny_transformer(config, seed)
    ours = SD3Transformer2DModel(SD3TransformerConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


_CLIP_WIDTHS = (8, 16)


@dataclass(frozen=True, kw_only=True)
class TinySD3:
    """What differs between the random checkpoints."""

    seed: int = 0
    text_heads: int = 3
    transformer: dict[str, Any] = field(default_factory=lambda: TINY_TRANSFORMER)
    vae: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=lambda: {"shift": 3.0})
    has_t5: bool = True


TINY_SD3S = {
    "medium": TinySD3(),
    "dual": TinySD3(seed=1, transformer=TINY_DUAL_TRANSFORMER),
    "without_t5": TinySD3(seed=2, has_t5=False),
    "dynamic": TinySD3(
        seed=3,
        transformer=TINY_TRANSFORMER | {"in_channels": 8, "out_channels": 8, "qk_norm": "rms_norm", "num_layers": 2},
        vae={
            "latent_channels": 8,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
        scheduler={"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64},
    ),
}


def save_tiny_sd3(directory: Path, recipe: TinySD3) -> Path:
    """Write the checkpoint that diffusers' own pipeline saves."""
    second_tokenizer = tiny_clip_tokenizer()
    # The larger CLIP pads with another token than it ends with: one that texts have too.
    second_tokenizer.add_special_tokens({"pad_token": "z"})
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=tiny_transformer(recipe.transformer, recipe.seed),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**recipe.scheduler),
        vae=tiny_picture_vae(recipe.seed + 100, **recipe.vae),
        text_encoder=tiny_clip(recipe.seed + 200, width=_CLIP_WIDTHS[0], with_projection=True),
        tokenizer=tiny_clip_tokenizer(),
        text_encoder_2=tiny_clip(recipe.seed + 300, width=_CLIP_WIDTHS[1], with_projection=True, hidden_act="gelu"),
        tokenizer_2=second_tokenizer,
        text_encoder_3=tiny_t5(
            recipe.seed + 400, width=TINY_TRANSFORMER["joint_attention_dim"], num_heads=recipe.text_heads
        )
        if recipe.has_t5
        else None,
        tokenizer_3=tiny_tokenizer() if recipe.has_t5 else None,
    )
    pipeline.save_pretrained(directory)
    return directory
