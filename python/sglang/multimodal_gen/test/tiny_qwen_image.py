"""Tiny Qwen-Image models with random weights, beside their diffusers counterparts with the same weights."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.qwen_image import QwenImageVAEConfig
from sglang.multimodal_gen.runtime.models.dits.qwen_image import QwenImageTransformer2DModel
from sglang.multimodal_gen.runtime.models.vaes.qwen_image_vae import AutoencoderKLQwenImage
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
