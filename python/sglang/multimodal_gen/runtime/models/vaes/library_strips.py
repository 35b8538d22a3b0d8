"""Autoencoders of the diffusers library on a rank's strip of the picture: their layers exchanged for ours in place.

What a class computes beyond its layers is known for the classes named here alone: that it mixes no lines of a picture,
or only in whole cells. An autoencoder with a part of another class stays whole.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL
from diffusers.models import resnet
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders import vae
from diffusers.models.downsampling import Downsample2D
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.layers.strips import StripConv2d, StripGroupNorm, StripTokens

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
    return ""


def _is_known(layer: Any) -> bool:
    if isinstance(layer, Attention):
        return all(norm is None for norm in (layer.spatial_norm, layer.norm_q, layer.norm_k))
    if type(layer) is Downsample2D:
        return bool(layer.use_conv and layer.norm is None) and layer.conv.padding == (0, 0)
    return type(layer) in _LOCAL or type(layer) in _EXCHANGED
