"""Autoencoders of the diffusers library on a rank's strip of the picture: their layers exchanged for ours in place.

What a class computes beyond its layers is known for the classes named here alone: that it mixes no lines of a picture,
or only in whole cells. An autoencoder with a part of another class stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLLTXVideo
from diffusers.models import resnet
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders import autoencoder_kl_ltx as ltx
from diffusers.models.autoencoders import vae
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings, TimestepEmbedding, Timesteps
from diffusers.models.normalization import RMSNorm
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.layers.strips import StripConv2d, StripConv3d, StripGroupNorm, StripTokens

_LOCAL: frozenset[Any] = frozenset(
    {
        AutoencoderKL,
        vae.Encoder,
        vae.Decoder,
        blocks.DownEncoderBlock2D,
        blocks.UpDecoderBlock2D,
        blocks.UNetMidBlock2D,
        resnet.ResnetBlock2D,
        Upsample2D,
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


class StripDownsample2D(Downsample2D):
    """Halves a strip; behind its last line are the neighbour's first."""

    strips: StripSharding

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[B, C, h, w] -> [B, C, h/2, w/2]."""
        return self.conv(self.strips.pad(hidden_states, (0, 1, 0, 1)))


_EXCHANGED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: StripConv2d,
    nn.Conv3d: StripConv3d,
    nn.GroupNorm: StripGroupNorm,
    Downsample2D: StripDownsample2D,
}


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
            _exchange(layer, strips)
    module.strips = strips  # type: ignore[assignment]


def _exchange(layer: nn.Module, strips: StripSharding) -> None:
    found = [(layer, _EXCHANGED[type(layer)])] if type(layer) in _EXCHANGED else []
    if isinstance(layer, Attention):
        found = [(layer.to_k, StripTokens), (layer.to_v, StripTokens)]
    for old, twin in found:
        old.__class__ = twin
        old.strips = strips  # type: ignore[assignment]


def _why_whole(module: nn.Module) -> str:
    """What of an autoencoder would differ on strips; empty where nothing would."""
    unknown = sorted({type(layer).__name__ for layer in module.modules() if not _is_known(layer)})
    if unknown:
        return f"it has parts of which nothing is known: {', '.join(unknown)}"
    if any(isinstance(getattr(layer, "per_channel_scale1", None), torch.Tensor) for layer in module.modules()):
        return "its decoder draws random numbers for the whole picture"
    return ""


def _is_known(layer: Any) -> bool:
    if isinstance(layer, Attention):
        return all(norm is None for norm in (layer.spatial_norm, layer.norm_q, layer.norm_k))
    if type(layer) is Downsample2D:
        return bool(layer.use_conv and layer.norm is None) and layer.conv.padding == (0, 0)
    if isinstance(layer, ltx.LTXVideoUpsampler3d | ltx.LTXVideoDownsampler3d):
        return layer.stride[1] == layer.stride[2]
    return type(layer) in _LOCAL or type(layer) in _EXCHANGED
