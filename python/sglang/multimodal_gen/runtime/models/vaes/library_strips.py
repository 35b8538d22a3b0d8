"""Autoencoders of the diffusers library on a rank's strip of the picture: convolutions exchanged for ours in place.

What a class computes beyond its layers is known for the classes named here alone: that it mixes no lines of a picture,
or only in whole cells. An autoencoder with a part of another class stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo
from diffusers.models.autoencoders import autoencoder_kl_ltx as ltx
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings, TimestepEmbedding, Timesteps
from diffusers.models.normalization import RMSNorm
from torch import nn

from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.layers.strips import StripConv3d

_LOCAL: frozenset[Any] = frozenset(
    {
        AutoencoderKLLTXVideo,
        ltx.LTXVideoEncoder3d,
        ltx.LTXVideoDecoder3d,
        ltx.LTXVideoDownBlock3D,
        ltx.LTXVideo095DownBlock3D,
        ltx.LTXVideoMidBlock3d,
        ltx.LTXVideoUpBlock3d,
        ltx.LTXVideoDownsampler3d,
        ltx.LTXVideoUpsampler3d,
        ltx.LTXVideoResnetBlock3d,
        ltx.LTXVideoCausalConv3d,
        PixArtAlphaCombinedTimestepSizeEmbeddings,
        TimestepEmbedding,
        Timesteps,
        RMSNorm,
        nn.LayerNorm,
        nn.Linear,
        nn.SiLU,
        nn.Dropout,
        nn.Identity,
        nn.ModuleList,
        nn.Sequential,
    }
)
"""Classes whose forwards need nothing of other strips but what their layers get."""


def deal_pictures(module: nn.Module, strips: StripSharding) -> None:
    """Let an autoencoder's layers work on strips as its new attribute `strips` says; parameters and names stay.

    One that would not give the same stays whole; `strips.why_whole` then says why.
    """
    why = "" if strips.axis.size == 1 else _why_whole(module)
    if strips.axis.size == 1 or why:
        strips = StripSharding(why_whole=why)
    else:
        # Reflected lines are inside of the strip at the picture's edge.
        reflects = any(getattr(layer, "padding_mode", "") == "reflect" for layer in module.modules())
        strips = StripSharding(strips.axis, least_cells=2 if reflects else 1)
        for layer in list(module.modules()):
            if type(layer) is nn.Conv3d:
                layer.__class__ = StripConv3d
                layer.strips = strips  # type: ignore[assignment]
    module.strips = strips  # type: ignore[assignment]


def _why_whole(module: nn.Module) -> str:
    """What of an autoencoder would differ on strips; empty where nothing would."""
    unknown = sorted({type(layer).__name__ for layer in module.modules() if not _is_known(layer)})
    if unknown:
        return f"it has parts of which nothing is known: {', '.join(unknown)}"
    if any(isinstance(getattr(layer, "per_channel_scale1", None), torch.Tensor) for layer in module.modules()):
        return "its decoder draws random numbers for the whole picture"
    return ""


def _is_known(layer: Any) -> bool:
    if isinstance(layer, ltx.LTXVideoUpsampler3d | ltx.LTXVideoDownsampler3d):
        return layer.stride[1] == layer.stride[2]
    return type(layer) in _LOCAL or type(layer) is nn.Conv3d
