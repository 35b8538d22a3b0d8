"""Layers of the LTX-Video autoencoder. Source: arXiv:2501.00103, https://github.com/Lightricks/LTX-Video

Shapes: B batch, C channels in, O out, T frames, H, W height and width. Activations are in channels-last order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.vaes.ltx import Strides
from sglang.multimodal_gen.runtime.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from sglang.multimodal_gen.runtime.layers.fused_frames import ScaleShift, norm_frames, spread_frames, sum_frames
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import CausalConv3d, Room, fold_frames, unfold_frames

NORM_EPS = 1e-8
_FREQUENCIES = 256


@dataclass(frozen=True)
class Coder:
    """What the layers of an encoder or a decoder have in common."""

    eps: float
    is_causal: bool
    strips: StripSharding


class EndConv3d(nn.Module):
    """Convolution over 3x3x3 cells: beyond the ends of the clip are copies of its end frames, beyond the picture zeros.

    Key: `conv`. A causal one sees frames before its own alone. `repeats` more copies of the first frame are in front.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        coder: Coder,
        *,
        stride: int = 1,
        repeats: int = 0,
    ) -> None:
        super().__init__()
        self.strips = coder.strips
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride)
        self.before, self.after = (2 + repeats, 0) if coder.is_causal else (1 + repeats, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']."""
        return _sum(*self.without_bias(frames))

    def after_norm(self, frames: Tensor, modulation: ScaleShift | None = None) -> Tensor:
        """The same of SiLU of the norm of the frames."""
        return _sum(*self.over(self.activated(frames, modulation)))

    def without_bias(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, and the bias [O] where it is still to be added: on GPUs that is a pass of its own over the result,
        unless what comes next does it on its way."""
        room = self.room(frames)
        room.inner.copy_(frames)
        return self.over(room.whole)

    def activated(self, frames: Tensor, modulation: ScaleShift | None = None, bias: Tensor | None = None) -> Tensor:
        """SiLU of the norm of frames + bias, [B, C, T, H, W], as `over` takes it."""
        room = self.room(frames)
        norm_frames(frames, modulation=modulation, bias=bias, eps=NORM_EPS, out=room.inner)
        return room.whole

    def room(self, frames: Tensor) -> Room:
        """Where to write the clip [B, C, T, H, W], so that nothing needs to be put around it afterwards."""
        side = 1 if self.strips.is_dealt else 0
        whole, _ = self.strips.room(frames, (side,) * 4, lead=self.before + self.after)
        _, _, length, height, width = frames.shape
        inner = whole[:, :, self.before : self.before + length, side : side + height, side : side + width]
        return Room(whole, inner)

    def over(self, whole: Tensor) -> tuple[Tensor, Tensor | None]:
        """What comes of a room with the clip in it: see `without_bias`."""
        end = whole.shape[2] - self.after
        whole[:, :, : self.before] = whole[:, :, self.before : self.before + 1]
        whole[:, :, end:] = whole[:, :, end - 1 : end]
        if self.strips.is_dealt:
            self.strips.exchange(whole, (1, 1, 1, 1))
        side = 0 if self.strips.is_dealt else 1
        if not CausalConv3d.computes_at_once(whole.device):
            return self._by_slices(whole, side), None
        return F.conv3d(whole, self.conv.weight, None, self.conv.stride, (0, side, side)), self.conv.bias

    def _by_slices(self, whole: Tensor, side: int) -> Tensor:
        (step, *strides), reach = self.conv.stride, self.conv.kernel_size[0] - 1
        output: Tensor | None = None
        for index in range(reach + 1):
            images = fold_frames(whole[:, :, index : whole.shape[2] - reach + index : step])
            bias = self.conv.bias if index == 0 else None
            part = F.conv2d(images, self.conv.weight[:, :, index], bias, strides, side)
            output = part if output is None else output.add_(part)
        assert output is not None, "a kernel has at least one slice"
        return unfold_frames(output, whole.shape[0])


def _sum(frames: Tensor, bias: Tensor | None) -> Tensor:
    return frames if bias is None else frames.add_(bias.view(-1, 1, 1, 1))


class CellLinear(nn.Module):
    """A product of matrices for each cell. Key: `conv`, a convolution over 1x1x1 cells."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, cells: Tensor) -> Tensor:
        """[..., C] -> [..., O]."""
        return F.linear(cells, self.conv.weight.flatten(1), self.conv.bias)


@dataclass(frozen=True)
class Told:
    """What a decoder knows beside the latents: timesteps [B] in fp32, as embedders take them, and where its random
    numbers come from, None being torch's own generator."""

    timesteps: Tensor | None = None
    generator: torch.Generator | None = None


class TimeEmbedder(nn.Module):
    """Embeds timesteps: [B] -> [B, D]. Key: `timestep_embedder`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_FREQUENCIES, width)

    def forward(self, told: Told) -> Tensor:
        assert told.timesteps is not None, "a decoder with timestep_conditioning is told a timestep"
        return self.timestep_embedder(sinusoidal_embedding(told.timesteps, _FREQUENCIES))


def scale_shifts(temb: Tensor, table: Tensor) -> list[ScaleShift]:
    """An embedding [B, 2·n·C] and a learned table [2·n, C], shifts before scales -> n modulations, in fp32."""
    rows = temb.float().unflatten(1, table.shape) + table.float()
    return [ScaleShift(scale=pair[:, 1], shift=pair[:, 0]) for pair in rows.split(2, dim=1)]


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, beside a shortcut: [B, C, T, H, W] -> [B, O, T, H, W].

    `is_timed`: the norms are modulated by a timestep. `is_noisy`: random numbers, the same for all frames and channels,
    are added with a weight for each channel behind each convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        coder: Coder,
        *,
        is_timed: bool = False,
        is_noisy: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = EndConv3d(in_channels, out_channels, coder)
        self.conv2 = EndConv3d(out_channels, out_channels, coder)
        self.norm3 = self.conv_shortcut = None
        if in_channels != out_channels:
            self.norm3, self.conv_shortcut = nn.LayerNorm(in_channels, coder.eps), CellLinear(in_channels, out_channels)
        self.per_channel_scale1 = self.per_channel_scale2 = self.scale_shift_table = None
        if is_noisy:
            self.per_channel_scale1 = nn.Parameter(torch.zeros(in_channels, 1, 1))
            self.per_channel_scale2 = nn.Parameter(torch.zeros(in_channels, 1, 1))
        if is_timed:
            self.scale_shift_table = nn.Parameter(torch.zeros(4, in_channels))

    def forward(self, frames: Tensor, told: Told, temb: Tensor | None = None) -> Tensor:
        """`temb`: [B, 4·C], of the block that this one is a part of."""
        first: ScaleShift | None = None
        second: ScaleShift | None = None
        if self.scale_shift_table is not None:
            assert temb is not None, "its block has an embedder"
            first, second = scale_shifts(temb, self.scale_shift_table)
        seen = self.conv1.activated(frames, first)
        hidden_states, bias = self.conv1.over(seen)
        del seen  # what is no longer needed goes before there is more: a quarter of the peak
        hidden_states = _with_noise(hidden_states, self.per_channel_scale1, told)
        seen = self.conv2.activated(hidden_states, second, bias)
        del hidden_states
        hidden_states, bias = self.conv2.over(seen)
        del seen
        hidden_states = _with_noise(hidden_states, self.per_channel_scale2, told)
        return sum_frames(hidden_states, self._shortcut(frames), bias=bias)

    def _shortcut(self, frames: Tensor) -> Tensor:
        if self.norm3 is None or self.conv_shortcut is None:
            return frames
        return self.conv_shortcut(self.norm3(frames.movedim(1, -1))).movedim(-1, 1)


def _with_noise(frames: Tensor, scale: Tensor | None, told: Told) -> Tensor:
    """Frames [B, C, T, H, W], which may be overwritten, plus random numbers [H, W] times `scale` [C, 1, 1]."""
    if scale is None:
        return frames
    size = frames.shape[-2:]
    noise = torch.randn(size, generator=told.generator, device=frames.device, dtype=frames.dtype)
    return frames.add_((noise * scale).unsqueeze(1))


class Blocks(nn.Module):
    """Residual blocks one after the other, which share an embedding of the timestep where they are timed."""

    def __init__(
        self,
        channels: int,
        count: int,
        coder: Coder,
        *,
        is_timed: bool = False,
        is_noisy: bool = False,
    ) -> None:
        super().__init__()
        self.time_embedder = TimeEmbedder(4 * channels) if is_timed else None
        self.resnets = nn.ModuleList(
            [ResidualBlock(channels, channels, coder, is_timed=is_timed, is_noisy=is_noisy) for _ in range(count)]
        )

    def forward(self, frames: Tensor, told: Told) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H, W]."""
        temb = None if self.time_embedder is None else self.time_embedder(told)
        for block in self.resnets:
            frames = block(frames, told, temb)
        return frames


class StridedStage(Blocks):
    """One resolution of the encoder up to 0.9.1: residual blocks, a convolution with strides, and where the width
    changes a block that does it."""

    def __init__(self, in_channels: int, out_channels: int, count: int, coder: Coder, *, strides: bool) -> None:
        super().__init__(in_channels, count, coder)
        self.downsamplers = nn.ModuleList([EndConv3d(in_channels, in_channels, coder, stride=2)] if strides else [])
        self.conv_out = None
        if in_channels != out_channels:
            self.conv_out = ResidualBlock(in_channels, out_channels, coder)

    def forward(self, frames: Tensor, told: Told) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']."""
        frames = super().forward(frames, told)
        for layer in self.downsamplers:
            frames = layer(frames)
        return frames if self.conv_out is None else self.conv_out(frames, told)


class FoldedStage(Blocks):
    """One resolution of the encoder from 0.9.5 on: residual blocks, then neighbouring cells become channels."""

    def __init__(self, in_channels: int, out_channels: int, count: int, coder: Coder, *, strides: Strides) -> None:
        super().__init__(in_channels, count, coder)
        self.downsamplers = nn.ModuleList([Downsample(in_channels, out_channels, coder, strides=strides)])

    def forward(self, frames: Tensor, told: Told) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']."""
        return self.downsamplers[0](super().forward(frames, told))


class Downsample(nn.Module):
    """A convolution whose neighbouring cells become channels, beside averages of what came in. Key: `conv`.

    The clip's first frame is doubled where two frames become one.
    """

    def __init__(self, in_channels: int, out_channels: int, coder: Coder, *, strides: Strides) -> None:
        super().__init__()
        self.strides, self.out_channels = strides, out_channels
        self.conv = EndConv3d(in_channels, out_channels // math.prod(strides), coder, repeats=strides[0] - 1)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']."""
        update = _folded(self.conv(frames), self.strides)
        if self.strides[0] > 1:
            frames = torch.cat((frames[:, :, :1], frames), dim=2)
        averages = _folded(frames, self.strides).unflatten(-1, (self.out_channels, -1)).mean(dim=-1)
        return (update + averages).movedim(-1, 1)


def _folded(frames: Tensor, strides: Strides) -> Tensor:
    """Cells with the channels of n neighbouring ones, of which the cell changes fastest: [B, C, T, H, W] ->
    [B, T', H', W', C·n]."""
    cells = frames.movedim(1, -1)
    for dim, stride in zip((1, 3, 5), strides, strict=True):
        cells = cells.unflatten(dim, (-1, stride))
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)


class Upsample(nn.Module):
    """A convolution whose channels become cells, where asked beside what came in, spread likewise. Key: `conv`."""

    def __init__(self, channels: int, coder: Coder, *, factor: int, has_residual: bool) -> None:
        super().__init__()
        self.factor, self.has_residual = factor, has_residual
        self.conv = EndConv3d(channels, 8 * channels // factor, coder)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C/f, 2·T - 1, 2·H, 2·W] for the factor f."""
        parts, bias = self.conv.without_bias(frames)
        return spread_frames(parts, bias=bias, residual=frames if self.has_residual else None)


class UpStage(Blocks):
    """One resolution of the decoder: upsampling where there is some, which may narrow, and residual blocks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        coder: Coder,
        *,
        upsample: Upsample | None,
        is_timed: bool,
        is_noisy: bool,
    ) -> None:
        """Without an `upsample` that narrows to them, a residual block in front makes `out_channels` of the others."""
        super().__init__(out_channels, count, coder, is_timed=is_timed, is_noisy=is_noisy)
        narrows = upsample is not None and upsample.factor > 1
        self.conv_in = None
        if in_channels != out_channels and not narrows:
            self.conv_in = ResidualBlock(in_channels, out_channels, coder)
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample])

    def forward(self, frames: Tensor, told: Told) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']."""
        if self.conv_in is not None:
            frames = self.conv_in(frames, told)
        for layer in self.upsamplers:
            frames = layer(frames)
        return super().forward(frames, told)
