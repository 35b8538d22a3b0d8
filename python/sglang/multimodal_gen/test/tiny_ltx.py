"""Tiny LTX-Video models with random weights, beside their diffusers counterparts with the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from sglang.multimodal_gen.configs.models.dits.ltx import LTXVideoTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.ltx import LTXVideoVAEConfig
from sglang.multimodal_gen.runtime.models.dits.ltx import LTXVideoTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.ltx_vae import AutoencoderKLLTXVideo
from sglang.multimodal_gen.test.tiny_checkpoints import tiny_tokenizer
from sglang.multimodal_gen.test.tiny_parts import tiny_t5
from sglang.multimodal_gen.test.tiny_wan import randomised

# Three axes do not divide 20 channels of rotations: two channels are not rotated, as in the published models.
TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "cross_attention_dim": 20,
    "num_layers": 2,
    "caption_channels": 20,
}

# The form of the first release: 8 pixels and 4 frames to a latent cell, decoded without a timestep.
TINY_VAE: dict[str, Any] = {
    "latent_channels": 8,
    "patch_size": 2,
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("LTXVideoDownBlock3D",) * 3,
    "downsample_type": ("conv",) * 3,
    "layers_per_block": (1,) * 4,
    "spatio_temporal_scaling": (True, True, False),
    "decoder_block_out_channels": (8, 12, 12),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True, True, False),
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (False,) * 3,
    "upsample_factor": (1,) * 3,
}
# 0.9.5's: residual resampling, and a decoder that is told a timestep.
TINY_TIMED_VAE: dict[str, Any] = TINY_VAE | {
    "block_out_channels": (8, 16, 16, 32),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 3,
    "downsample_type": ("spatial", "temporal", "spatiotemporal"),
    "spatio_temporal_scaling": (True,) * 3,
    "decoder_block_out_channels": (8, 16),
    "decoder_layers_per_block": (1,) * 3,
    "decoder_spatio_temporal_scaling": (True, True),
    "decoder_inject_noise": (False,) * 3,
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "timestep_conditioning": True,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}
# 0.9.1's: the decoder adds random numbers of its own.
TINY_NOISY_VAE: dict[str, Any] = TINY_TIMED_VAE | {"decoder_inject_noise": (True, True, False)}
_WIDTHS = ("block_out_channels", "decoder_block_out_channels")
_LAYERS = ("layers_per_block", "decoder_layers_per_block")
SIZE_SHIFT: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 8,
    "max_image_seq_len": 64,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "shift_terminal": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class TinyLTX:
    """What differs between the random checkpoints."""

    seed: int = 0
    text_heads: int = 3
    pipeline: str = "LTXPipeline"
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=lambda: TINY_VAE)
    scheduler: dict[str, Any] = field(default_factory=lambda: SIZE_SHIFT)


TINY_LTXS = {
    "first": TinyLTX(),
    "timed": TinyLTX(seed=1, vae=TINY_TIMED_VAE),
    "wide": TinyLTX(
        seed=2,
        transformer={"num_attention_heads": 3, "attention_head_dim": 12, "cross_attention_dim": 36, "num_layers": 1},
    ),
    "unshifted": TinyLTX(seed=3, transformer={"num_layers": 3}, scheduler={}),
    "noisy": TinyLTX(seed=6, vae=TINY_NOISY_VAE),
    "image": TinyLTX(seed=4, pipeline="LTXImageToVideoPipeline"),
    "condition": TinyLTX(seed=5, pipeline="LTXConditionPipeline", vae=TINY_TIMED_VAE, scheduler={}),
}


def save_tiny_ltx(directory: Path, recipe: TinyLTX) -> Path:
    """Write the checkpoint that diffusers' own pipeline saves."""
    seed = recipe.seed
    pipeline = getattr(diffusers, recipe.pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**recipe.scheduler),
        vae=tiny_vae(recipe.vae, seed + 100),
        text_encoder=tiny_t5(seed + 200, num_heads=recipe.text_heads),
        tokenizer=tiny_tokenizer(),
        transformer=randomised(diffusers.LTXVideoTransformer3DModel(**(TINY_TRANSFORMER | recipe.transformer)), seed),
    )
    pipeline.save_pretrained(directory)
    return directory


def tiny_vae(config: dict[str, Any], seed: int) -> Any:
    """An autoencoder whose latent channels differ in mean and spread."""
    vae = randomised(diffusers.AutoencoderKLLTXVideo(**config), seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer, centre in ((vae.latents_mean, 0.0), (vae.latents_std, 1.0)):
        buffer.copy_(centre + 0.3 * torch.rand(buffer.shape, generator=generator))
    return vae


def vae_pair(config: dict[str, Any], seed: int = 0) -> tuple[Any, AutoencoderKLLTXVideo]:
    """diffusers' autoencoder and ours, equal weights."""
    reference = tiny_vae(config, seed)
    ours = AutoencoderKLLTXVideo(LTXVideoVAEConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def shrunk_vae(published: dict[str, Any]) -> dict[str, Any]:
    """A published autoencoder's config with its form, and a sixteenth of its widths."""
    widths = {name: [width // 16 for width in published[name]] for name in _WIDTHS}
    layers = {name: [1 + (place == 1) for place, _ in enumerate(published[name])] for name in _LAYERS}
    return {key: value for key, value in published.items() if not key.startswith("_")} | {
        "latent_channels": 8,
        **widths,
        **layers,
    }


def transformer_pair(seed: int = 0, **changes: Any) -> tuple[nn.Module, LTXVideoTransformer3DModel]:
    """diffusers' transformer and ours, equal weights."""
    reference = randomised(diffusers.LTXVideoTransformer3DModel(**(TINY_TRANSFORMER | changes)), seed)
    ours = LTXVideoTransformer3DModel(LTXVideoTransformerConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours
