"""Blocks of the picture autoencoder of latent diffusion, which encoder and decoder are built from.

Source: arXiv:2112.10752, https://github.com/CompVis/latent-diffusion. Parameter names are those of the published
diffusers checkpoints.

On GPUs a convolution leaves its bias to whatever comes next, which adds it on its way: by itself that would be a pass
over the picture. The sum at the end of a block finds the moments that the next norm needs.

Shapes: B batch, C channels in, O out, H, W height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.fused_frames import (
    Footage,
    Moments,
    serves,
    sum_with_moments,
    upsample_frames,
)
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.layers.strips import StripConv2d, StripGroupNorm, StripPad2d

NORM_EPS = 1e-6


class Features(NamedTuple):
    """Pictures [B, C, H, W], the bias [C] that is still to be added to them, and the moments of their sum, if known."""

    images: Tensor
    bias: Tensor | None = None
    moments: Moments | None = None


class Conv(StripConv2d):
    """Convolution of 3x3 cells, with zeros around the picture."""

    def __init__(self, in_channels: int, out_channels: int, *, strips: StripSharding) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, strips=strips)

    def features(self, images: Tensor) -> Features:
        """[B, C, H, W] -> [B, O, H, W], without the bias where what comes next adds it."""
        early, late = (None, self.bias) if serves(images) else (self.bias, None)
        return Features(self.with_bias(images, early), late)


class Norm(StripGroupNorm):
    """Norm over the cells and channels of each group."""

    def __init__(self, num_groups: int, channels: int, *, strips: StripSharding) -> None:
        super().__init__(num_groups, channels, NORM_EPS, strips=strips)

    def of(self, features: Features, *, silu: bool = True) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return self(features.images, bias=features.bias, moments=features.moments, silu=silu)


class Shortcut(nn.Conv2d):
    """Another number of channels for each cell by itself."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H, W]: a product of matrices, which adds its bias on the way."""
        return F.linear(images.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)

    def of_bias(self, bias: Tensor) -> Tensor:
        """What a bias [C] of its input becomes: [O]."""
        return F.linear(bias, self.weight.flatten(1))


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, around a shortcut: [B, C, H, W] -> [B, O, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, strips: StripSharding) -> None:
        super().__init__()
        self.norm1 = Norm(num_groups, in_channels, strips=strips)
        self.conv1 = Conv(in_channels, out_channels, strips=strips)
        self.norm2 = Norm(num_groups, out_channels, strips=strips)
        self.conv2 = Conv(out_channels, out_channels, strips=strips)
        self.conv_shortcut = Shortcut(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, features: Features) -> Features:
        hidden = self.conv1.features(self.norm1.of(features))
        hidden = self.conv2.features(self.norm2.of(hidden))
        # Late, since at full size it takes as much as each of what is gone by now.
        shortcut, added = features.images, features.bias
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
            added = None if added is None else self.conv_shortcut.of_bias(added)
        return summed(hidden, Features(shortcut, added), self.norm2.num_groups)


class CellAttention(nn.Module):
    """Self-attention among the cells of a picture, one head as wide as the channels."""

    def __init__(self, channels: int, num_groups: int, context: LayerContext) -> None:
        super().__init__()
        self.group_norm = Norm(num_groups, channels, strips=context.strips)
        self.to_q = ReplicatedLinear(channels, channels)
        self.to_k = ReplicatedLinear(channels, channels)
        self.to_v = ReplicatedLinear(channels, channels)
        self.to_out = nn.ModuleList([ReplicatedLinear(channels, channels)])
        self.attention = context.frame_attention.build(channels)
        self.strips = context.strips

    def forward(self, features: Features) -> Features:
        """[B, C, H, W] -> [B, C, H, W]."""
        cells = self.group_norm.of(features, silu=False).movedim(1, -1)  # [B, H, W, C]
        tokens = cells.flatten(1, 2)
        key, value = (self.strips.gather(layer(tokens), dim=1).unsqueeze(2) for layer in (self.to_k, self.to_v))
        attended = self.attention(self.to_q(tokens).unsqueeze(2), key, value)
        update = self.to_out[0](attended.flatten(2)).view(cells.shape).movedim(-1, 1)
        return summed(Features(update), features, self.group_norm.num_groups)


class MidBlock(nn.Module):
    """Residual block, attention where the model has it, residual block, at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, context: LayerContext, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, num_groups, context.strips) for _ in range(2)])
        self.attentions = nn.ModuleList([CellAttention(channels, num_groups, context)] if attention else [])

    def forward(self, features: Features) -> Features:
        features = self.resnets[0](features)
        for attention in self.attentions:
            features = attention(features)
        return self.resnets[1](features)


class Downsample(nn.Module):
    """Halves height and width; the convolution looks one cell further to the right and below. Key: `conv`."""

    def __init__(self, channels: int, strips: StripSharding) -> None:
        super().__init__()
        self.pad = StripPad2d((0, 1, 0, 1), strips=strips)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Features) -> Features:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        assert features.bias is None, "it is behind a residual block"
        early, late = (None, self.conv.bias) if serves(features.images) else (self.conv.bias, None)
        return Features(F.conv2d(self.pad(features.images), self.conv.weight, early, self.conv.stride), late)


class Upsample(nn.Module):
    """Doubles height and width by repetition; then a convolution. Key: `conv`."""

    def __init__(self, channels: int, strips: StripSharding) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, strips=strips)

    def forward(self, features: Features) -> Features:
        """[B, C, H, W] -> [B, C, 2·H, 2·W]."""
        footage = Footage(features.images.unsqueeze(2), bias=features.bias)
        return self.conv.features(upsample_frames([footage]).squeeze(2))


class Stage(nn.Module):
    """One resolution: residual blocks, and the way to the next under the name that files have for it."""

    def __init__(
        self, widths: tuple[int, int], count: int, num_groups: int, strips: StripSharding, *, resampling: str | None
    ) -> None:
        """`widths`: channels that come in, and that go out. `resampling`: downsamplers or upsamplers; None: neither."""
        super().__init__()
        before, after = widths
        self.resnets = nn.ModuleList(
            [ResidualBlock(after if index else before, after, num_groups, strips) for index in range(count)]
        )
        if resampling is not None:
            layer = Downsample(after, strips) if resampling == "downsamplers" else Upsample(after, strips)
            self.add_module(resampling, nn.ModuleList([layer]))

    def layers(self) -> list[nn.Module]:
        """In the order in which pictures pass through them."""
        return [layer for layers in self.children() for layer in layers.children()]


def summed(features: Features, residual: Features, num_groups: int) -> Features:
    """Of the same shape, with what is still to be added to both. The first one's memory may be overwritten."""
    biases = [bias for bias in (features.bias, residual.bias) if bias is not None]
    bias = torch.stack(biases).float().sum(dim=0) if len(biases) > 1 else next(iter(biases), None)
    images, moments = sum_with_moments(features.images, residual.images, num_groups, bias=bias)
    return Features(images, moments=moments)
