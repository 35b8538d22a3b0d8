"""Tiny random checkpoints of the Wan models beyond plain text to video: image encoders, experts, frames' timesteps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sglang.multimodal_gen.test.tiny_checkpoints import FLOW_UNIPC, TinyWan, tiny_text_encoder, tiny_tokenizer
from sglang.multimodal_gen.test.tiny_wan import (
    TINY_PATCHED_VAE,
    TINY_RESIDUAL_VAE,
    TINY_TRANSFORMER,
    TINY_VAE,
    randomised,
)

IMAGE_WIDTH = 12
_TRANSFORMER = TINY_TRANSFORMER | {"num_layers": 1}
# Noise, one channel of mask for each frame of a latent one, condition.
_CONDITIONED = _TRANSFORMER | {"in_channels": 12}
_ENCODED = _CONDITIONED | {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": 48}


@dataclass(frozen=True, kw_only=True)
class TinyWanImage:
    """One checkpoint; `pipeline_class` is diffusers'."""

    pipeline_class: str = "WanImageToVideoPipeline"
    transformer: dict[str, Any] = field(default_factory=lambda: _CONDITIONED)
    vae: dict[str, Any] = field(default_factory=lambda: TINY_VAE)
    seed: int = 0
    flow_shift: float = 3.0
    image_encoder: bool = False
    boundary_ratio: float | None = None
    expand_timesteps: bool = False


TINY_WAN_IMAGES = {
    "i2v": TinyWanImage(transformer=_ENCODED, image_encoder=True),
    "flf2v": TinyWanImage(
        transformer=_ENCODED | {"pos_embed_seq_len": 10}, image_encoder=True, seed=1, vae=TINY_PATCHED_VAE
    ),
    # The shifts of those below are what their published configs have.
    "i2v_experts": TinyWanImage(boundary_ratio=0.9, seed=2, flow_shift=5.0),
    "t2v_experts": TinyWanImage(
        pipeline_class="WanPipeline", transformer=_TRANSFORMER, boundary_ratio=0.875, seed=3, flow_shift=12.0
    ),
    "ti2v": TinyWanImage(
        pipeline_class="WanPipeline",
        transformer=_TRANSFORMER,
        vae=TINY_RESIDUAL_VAE,
        expand_timesteps=True,
        seed=4,
        flow_shift=5.0,
    ),
}


def save_tiny_wan_image(directory: Path, recipe: TinyWanImage) -> Path:
    """Write the checkpoint that diffusers' own pipeline saves."""
    seed = recipe.seed
    options: dict[str, Any] = {"boundary_ratio": recipe.boundary_ratio, "expand_timesteps": recipe.expand_timesteps}
    if recipe.boundary_ratio is not None:
        options["transformer_2"] = randomised(diffusers.WanTransformer3DModel(**recipe.transformer), seed + 50)
    if recipe.image_encoder:
        options |= {"image_encoder": tiny_image_encoder(seed + 300), "image_processor": tiny_image_processor()}
    pipeline = getattr(diffusers, recipe.pipeline_class)(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(TinyWan(seed=seed, text_layers=1)),
        transformer=randomised(diffusers.WanTransformer3DModel(**recipe.transformer), seed),
        vae=randomised(diffusers.AutoencoderKLWan(**recipe.vae), seed + 100),
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW_UNIPC | {"flow_shift": recipe.flow_shift}),
        **options,
    )
    pipeline.save_pretrained(directory)
    return directory


def tiny_image_encoder(seed: int) -> transformers.CLIPVisionModel:
    """Five tokens for an image of 16 x 16 pixels."""
    config = transformers.CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        hidden_act="gelu",
    )
    return randomised(transformers.CLIPVisionModel(config), seed)


def tiny_image_processor() -> CLIPImageProcessorPil:
    """For the tiny image encoder."""
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Patches of random colours, so that a wrong resize or crop shows."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
