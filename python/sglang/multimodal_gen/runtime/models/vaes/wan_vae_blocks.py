"""Blocks of the Wan autoencoder, which encoder and decoder are built from.

Source: arXiv:2503.20314, https://github.com/Wan-Video/Wan2.1.

Shapes: B batch, C channels in, O out, T frames, H, W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.fused_frames import Footage, sum_frames, upsample_frames
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.layers.strips import StripConv2d, StripPad2d
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import (
    CausalConv3d,
    ChannelRMSNorm,
    TemporalState,
    activated,
    both,
    fold_frames,
    unfold_frames,
)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and causal convolution, around a shortcut: [B, C, T, H, W] -> [B, O, T, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, strips: StripSharding) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNorm(in_channels, num_trailing=3)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, strips=strips)
        self.norm2 = ChannelRMSNorm(out_channels, num_trailing=3)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, strips=strips)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1, strips=strips)

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:
        return self.through(frames, state, None)[0]

    def through(self, frames: Tensor, state: TemporalState, bias: Tensor | None) -> tuple[Tensor, None]:
        """The same of frames to which `bias` [C] is still to be added."""
        num_frames, shortcut, added = frames.shape[2], frames, bias
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(frames, state)
            added = None if bias is None else F.linear(bias, self.conv_shortcut.weight.flatten(1))
        seen = activated(self.conv1, self.norm1, frames, state, bias=bias)
        hidden_states, bias = self.conv1.over(seen, num_frames, state)
        del seen, frames  # what is no longer needed goes before there is more: a third of the peak
        seen = activated(self.conv2, self.norm2, hidden_states, state, bias=bias)
        del hidden_states
        hidden_states, bias = self.conv2.over(self.dropout(seen), num_frames, state)
        del seen
        return sum_frames(hidden_states, shortcut, bias=both(bias, added)), None


class FrameAttention(nn.Module):
    """Self-attention among the cells of each frame, one head as wide as the channels."""

    def __init__(self, channels: int, context: LayerContext) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, num_trailing=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.attention = context.frame_attention.build(channels)
        self.strips = context.strips

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H, W]."""
        cells = self.norm(frames).permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
        tokens = F.linear(cells, self.to_qkv.weight.flatten(1), self.to_qkv.bias).flatten(2, 3).flatten(0, 1)
        query, seen = tokens.unsqueeze(2).tensor_split((cells.shape[-1],), dim=-1)  # [B·T, H·W, 1, C and 2·C]
        key, value = self.strips.gather(seen, dim=1).chunk(2, dim=-1)
        attended = self.attention(query, key, value).view(cells.shape)
        update = F.linear(attended, self.proj.weight.flatten(1), self.proj.bias)
        return frames + update.permute(0, 4, 1, 2, 3)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, context: LayerContext) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, dropout, context.strips) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(channels, context)])

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:
        frames = self.attentions[0](self.resnets[0](frames, state))
        return self.resnets[1](frames, state)


class Upsample(nn.Module):
    """Doubles height and width, and with `temporal` the frames: all but the clip's first become two."""

    def __init__(self, channels: int, out_channels: int, *, temporal: bool, strips: StripSharding) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            StripConv2d(channels, out_channels, 3, padding=1, strips=strips),
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), strips=strips) if temporal else None

    def forward(self, frames: Tensor, state: TemporalState) -> tuple[Tensor, Tensor | None]:
        """[B, C, T, H, W] -> [B, O, T', 2·H, 2·W]; T' is T, 2·T, or for the first chunk 2·T - 1. The bias [O] beside
        them is still to be added: see `CausalConv3d.without_bias`."""
        if self.time_conv is None:
            parts = [Footage(frames)]
        else:
            # The clip's first frame passes as it is, and the convolution never sees it.
            alone, later = frames.split((1, frames.shape[2] - 1), dim=2) if state.is_first else (None, frames)
            parts = [] if alone is None else [Footage(alone)]
            if later.shape[2]:
                pairs, bias = self.time_conv.without_bias(later, state)
                parts.append(Footage(pairs, 2, bias))
        images, conv = fold_frames(upsample_frames(parts)), self.resample[1]
        assert isinstance(conv, StripConv2d), "as constructed"
        early, late = (None, conv.bias) if images.is_cuda else (conv.bias, None)
        return unfold_frames(conv.with_bias(images, early), frames.shape[0]), late

    def through(self, frames: Tensor, state: TemporalState, bias: None) -> tuple[Tensor, Tensor | None]:
        """As `ResidualBlock.through`, behind one of which it always is."""
        return self(frames, state)


class Downsample(nn.Module):
    """Halves height and width, and with `temporal` the frames: the clip's first stays, then two become one."""

    def __init__(self, channels: int, *, temporal: bool, strips: StripSharding) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            StripPad2d((0, 1, 0, 1), strips=strips), nn.Conv2d(channels, channels, 3, stride=2)
        )
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T', H/2, W/2]; T' is T, T/2, or for the first chunk (T + 1)/2."""
        frames = unfold_frames(self.resample(fold_frames(frames)), frames.shape[0])
        if self.time_conv is None:
            return frames
        extended = state.extend(self.time_conv, frames, 1)
        if not state.is_first:
            return self.time_conv(extended)
        if frames.shape[2] == 1:
            return frames
        return torch.cat((frames[:, :, :1], self.time_conv(extended)), dim=2)


class AverageDown(nn.Module):
    """Shortcut of Wan 2.2: groups of neighbouring cells and frames become channels, averaged to `out_channels`."""

    def __init__(self, out_channels: int, *, time_factor: int, space_factor: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.factors = (time_factor, space_factor, space_factor)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']."""
        # The clip's first frame is alone: a zero frame before it makes the pair.
        frames = F.pad(frames, (0, 0, 0, 0, -frames.shape[2] % self.factors[0], 0))
        for dim, factor in zip((2, 4, 6), self.factors, strict=True):
            frames = frames.unflatten(dim, (-1, factor))
        groups = frames.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return groups.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class DuplicateUp(nn.Module):
    """Shortcut of Wan 2.2: channels, repeated as often as needed, become neighbouring cells and frames."""

    def __init__(self, in_channels: int, out_channels: int, *, time_factor: int, space_factor: int) -> None:
        super().__init__()
        self.factors = (time_factor, space_factor, space_factor)
        self.repeats = out_channels * time_factor * space_factor**2 // in_channels

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']; the clip's first frame stays single."""
        cells = frames.repeat_interleave(self.repeats, dim=1).unflatten(1, (-1, *self.factors))
        video = cells.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return video[:, :, self.factors[0] - 1 :] if state.is_first else video
