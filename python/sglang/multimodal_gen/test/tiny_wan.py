"""Tiny Wan models with random weights, beside their diffusers counterparts with the same weights."""

from __future__ import annotations

from typing import Any, TypeVar

import diffusers
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan

Model = TypeVar("Model", bound=nn.Module)

TINY_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
}

TINY_VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 4],
    "num_res_blocks": 1,
    "latents_mean": [-0.4, 0.1, 0.7, 1.2],
    "latents_std": [2.5, 0.5, 1.0, 3.0],
}

# The shape of the embedded model: pixels in patches, both halvings of the frames.
TINY_PATCHED_VAE: dict[str, Any] = TINY_VAE | {
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}

TINY_RESIDUAL_VAE: dict[str, Any] = TINY_VAE | {
    "dim_mult": [1, 2, 4, 4],
    "decoder_base_dim": 12,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}


def randomised(model: Model, seed: int = 0) -> Model:
    """Redraw every parameter, norms, biases and tables included, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 0:  # a factor, such as from a timestep's unit to another
                parameter.mul_(1 + 0.1 * noise)
            elif "norm" in name and name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith(("bias", "table", "pos_embed")):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def transformer_pair(seed: int = 0, **changes: Any) -> tuple[nn.Module, WanTransformer3DModel]:
    """diffusers' transformer and ours, equal weights."""
    reference = randomised(diffusers.WanTransformer3DModel(**(TINY_TRANSFORMER | changes)), seed)
    ours = WanTransformer3DModel(WanTransformerConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def vae_pair(config: dict[str, Any], seed: int = 0) -> tuple[nn.Module, AutoencoderKLWan]:
    """diffusers' autoencoder and ours, equal weights."""
    reference = randomised(diffusers.AutoencoderKLWan(**config), seed)
    ours = AutoencoderKLWan(WanVAEConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal values, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
