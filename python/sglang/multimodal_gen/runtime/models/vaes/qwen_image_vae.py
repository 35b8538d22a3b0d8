"""Autoencoder of Qwen-Image: Wan 2.1's, which takes a picture as a clip of one frame. Source: arXiv:2508.02324."""

from __future__ import annotations

from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan


class AutoencoderKLQwenImage(AutoencoderKLWan):
    """Same layers, same parameter names; published under a name of its own."""
