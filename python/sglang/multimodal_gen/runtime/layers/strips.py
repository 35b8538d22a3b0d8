"""Layers of torch that work on a rank's strip of a picture; parameters, names and results are those of torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding


class StripConv2d(nn.Conv2d):
    """Convolution that sees the edges of the neighbours' strips. A stride divides the lines of a strip."""

    strips: StripSharding

    def __init__(self, *args: Any, strips: StripSharding, **options: Any) -> None:
        super().__init__(*args, **options)
        self.strips = strips

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, O, h', w']."""
        return self.with_bias(images, self.bias)

    def with_bias(self, images: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another bias [O], or none."""
        if not self.strips.is_dealt:
            return self._conv_forward(images, self.weight, bias)
        padded = self.strips.pad(images, *_padding_of(self))
        return F.conv2d(padded, self.weight, bias, self.stride, 0, self.dilation, self.groups)


class StripPad2d(nn.Module):
    """Zeros around a picture, in F.pad's order: left, right, top, bottom."""

    def __init__(self, sides: tuple[int, int, int, int], *, strips: StripSharding) -> None:
        super().__init__()
        self.sides = sides
        self.strips = strips

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h', w']."""
        return self.strips.pad(images, self.sides)


class StripGroupNorm(nn.GroupNorm):
    """Group norm with the moments of the whole picture."""

    strips: StripSharding

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, *, strips: StripSharding) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.strips = strips

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]."""
        if not self.strips.is_dealt:
            return super().forward(features)
        grouped = features.float().unflatten(1, (self.num_groups, -1)).flatten(2)
        variance, mean = self.strips.moments(grouped)
        # Batch norm with these moments is one pass in fp32 whatever the features' dtype.
        width = self.num_channels // self.num_groups
        normed = [
            F.batch_norm(
                row[None],
                mean[index].repeat_interleave(width),
                variance[index].repeat_interleave(width),
                self.weight.float(),
                self.bias.float(),
                eps=self.eps,
            )
            for index, row in enumerate(features)
        ]
        return normed[0] if len(normed) == 1 else torch.cat(normed)


class StripTokens(nn.Linear):
    """A projection of a strip's tokens of which every rank wants all: keys, or values."""

    strips: StripSharding

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, tokens of the strip, C] -> [B, tokens of the picture, O]."""
        return self.strips.gather(super().forward(tokens), dim=1)


def _padding_of(conv: nn.Conv2d) -> tuple[tuple[int, ...], str]:
    """What a convolution pads with, as F.pad takes it: last dimension first."""
    assert not isinstance(conv.padding, str), "a number of lines"
    sides = tuple(side for padding in reversed(conv.padding) for side in (padding, padding))
    return sides, "constant" if conv.padding_mode == "zeros" else conv.padding_mode
