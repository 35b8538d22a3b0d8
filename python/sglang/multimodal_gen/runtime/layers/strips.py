"""Layers of torch that work on a rank's strip of a picture; parameters, names and results are those of torch's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.fused_frames import Moments, group_moments, norm_groups
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
    """Group norm with the moments of the whole picture or clip."""

    strips: StripSharding

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, *, strips: StripSharding) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.strips = strips

    def forward(
        self,
        features: Tensor,
        *,
        bias: Tensor | None = None,
        moments: Moments | None = None,
        silu: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Of features [B, C, H, W] or [B, C, T, H, W] to which `bias` [C] is still to be added -> the same shape, with
        `silu` its SiLU, in `out` where given. `moments`: those of what this rank holds, where they are known."""
        if self.strips.is_dealt:
            if moments is None:
                moments = group_moments(features, self.num_groups, bias=bias)
            moments = Moments(*self.strips.moments(*moments))
        return norm_groups(
            features,
            self.weight,
            self.bias,
            self.num_groups,
            eps=self.eps,
            bias=bias,
            moments=moments,
            silu=silu,
            out=out,
        )


def _padding_of(conv: nn.Conv2d) -> tuple[tuple[int, ...], str]:
    """What a convolution pads with, as F.pad takes it: last dimension first."""
    assert not isinstance(conv.padding, str), "a number of lines"
    sides = tuple(side for padding in reversed(conv.padding) for side in (padding, padding))
    return sides, "constant" if conv.padding_mode == "zeros" else conv.padding_mode
