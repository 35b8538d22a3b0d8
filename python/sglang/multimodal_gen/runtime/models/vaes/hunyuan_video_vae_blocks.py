"""Layers of the HunyuanVideo autoencoder. Source: arXiv:2412.03603, https://github.com/Tencent/HunyuanVideo.

Norms run over all frames that a layer sees. Shapes: B batch, C channels, T frames, H, W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.fused_frames import Footage, upsample_frames
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding, repeat_edges
from sglang.multimodal_gen.runtime.layers.strips import StripGroupNorm
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import fold_frames, unfold_frames

NORM_EPS = 1e-6


class EdgeCausalConv3d(nn.Module):
    """Convolution over this frame and those before it; beyond the edges of clip and picture are copies of the edge.

    Key: `conv`. With a stride the first frame is kept, so that 1 + 2·k frames become 1 + k.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        *,
        strips: StripSharding,
    ) -> None:
        super().__init__()
        self.strips = strips
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)
        side = kernel_size // 2
        self.edges = (side, side, side, side, kernel_size - 1, 0)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T', H', W']."""
        return self._over(self.strips.pad(frames, self.edges, "replicate"))

    def after(self, norm: StripGroupNorm, frames: Tensor) -> Tensor:
        """The same of SiLU of the norm of the frames, which is written between the edges right away."""
        padded, inner = self.strips.room(frames, self.edges)
        norm(frames, silu=True, out=inner)
        repeat_edges(padded, self.edges)
        self.strips.exchange(padded, self.edges)
        return self._over(padded)

    def _over(self, padded: Tensor) -> Tensor:
        # On the CPU torch has no 3-D convolution as fast as 2-D ones for each temporal slice of the kernel.
        return self._by_slices(padded) if padded.device.type == "cpu" else self.conv(padded)

    def _by_slices(self, frames: Tensor) -> Tensor:
        reach, stride = self.conv.kernel_size[0] - 1, self.conv.stride
        output: Tensor | None = None
        for delay in range(reach + 1):
            images = fold_frames(frames[:, :, reach - delay : frames.shape[2] - delay : stride[0]])
            bias = self.conv.bias if delay == 0 else None
            part = F.conv2d(images, self.conv.weight[:, :, reach - delay], bias, stride[1:])
            output = part if output is None else output + part
        assert output is not None, "a kernel has at least one slice"
        return unfold_frames(output, frames.shape[0])


class ResidualBlock(nn.Module):
    """Two group norms, activations and convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, strips: StripSharding) -> None:
        super().__init__()
        self.norm1 = StripGroupNorm(num_groups, in_channels, NORM_EPS, strips=strips)
        self.conv1 = EdgeCausalConv3d(in_channels, out_channels, strips=strips)
        self.norm2 = StripGroupNorm(num_groups, out_channels, NORM_EPS, strips=strips)
        self.conv2 = EdgeCausalConv3d(out_channels, out_channels, strips=strips)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = EdgeCausalConv3d(in_channels, out_channels, 1, strips=strips)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, O, T, H, W]."""
        hidden_states = self.conv1.after(self.norm1, frames)
        hidden_states = self.conv2.after(self.norm2, hidden_states)
        return hidden_states + (frames if self.conv_shortcut is None else self.conv_shortcut(frames))


class CausalAttention(nn.Module):
    """One head as wide as the channels; a cell attends to all cells of its own frame and of those before it."""

    def __init__(self, channels: int, num_groups: int, context: LayerContext) -> None:
        super().__init__()
        self.group_norm = StripGroupNorm(num_groups, channels, NORM_EPS, strips=context.strips)
        self.to_q = ReplicatedLinear(channels, channels)
        self.to_k = ReplicatedLinear(channels, channels)
        self.to_v = ReplicatedLinear(channels, channels)
        self.to_out = nn.ModuleList([ReplicatedLinear(channels, channels)])
        self.attention = context.frame_attention.build(channels)
        self.strips = context.strips

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H, W]."""
        tokens = self.group_norm(frames).flatten(3).permute(0, 2, 3, 1)  # [B, T, H·W, C]
        query = self.to_q(tokens)
        key, value = (self.strips.gather(layer(tokens), dim=2) for layer in (self.to_k, self.to_v))
        # Frame by frame, because a mask of all cells would have the square of their number: 10 GB at 720p.
        attended = [
            self.attention(
                query[:, index, :, None], *(seen[:, : index + 1].flatten(1, 2)[:, :, None] for seen in (key, value))
            )
            for index in range(frames.shape[2])
        ]
        update = self.to_out[0](torch.cat(attended, dim=1).flatten(2))
        return frames + update.transpose(1, 2).reshape(frames.shape)


class MidBlock(nn.Module):
    """Residual block, attention where the model has it, residual block, at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, context: LayerContext, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, num_groups, context.strips) for _ in range(2)])
        self.attentions = nn.ModuleList([CausalAttention(channels, num_groups, context)] if attention else [])

    def forward(self, frames: Tensor) -> Tensor:
        frames = self.resnets[0](frames)
        for attention in self.attentions:
            frames = attention(frames)
        return self.resnets[1](frames)


class Downsample(nn.Module):
    """Convolution with a stride of 1 or 2 in time and in space. Key: `conv`."""

    def __init__(self, channels: int, time_stride: int, space_stride: int, strips: StripSharding) -> None:
        super().__init__()
        stride = (time_stride, space_stride, space_stride)
        self.conv = EdgeCausalConv3d(channels, channels, stride=stride, strips=strips)

    def forward(self, frames: Tensor) -> Tensor:
        return self.conv(frames)


class Upsample(nn.Module):
    """Repeats cells and, but for the clip's first, frames; then a convolution. Key: `conv`."""

    def __init__(self, channels: int, time_factor: int, space_factor: int, strips: StripSharding) -> None:
        super().__init__()
        self.time_factor, self.space_factor = time_factor, space_factor
        self.conv = EdgeCausalConv3d(channels, channels, strips=strips)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 1 + f·(T - 1), s·H, s·W] for the factors f and s."""
        alone, later = frames.split((1, frames.shape[2] - 1), dim=2)
        if self.space_factor == 1:
            return self.conv(torch.cat((alone, later.repeat_interleave(self.time_factor, dim=2)), dim=2))
        assert self.space_factor == 2, "a stage doubles the sides or leaves them"
        parts = [Footage(alone), Footage(later, repeats=self.time_factor)] if later.shape[2] else [Footage(alone)]
        return self.conv(upsample_frames(parts))


class DownStage(nn.Module):
    """One resolution of the encoder: residual blocks, then the way to the next."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        num_groups: int,
        strides: tuple[int, int],
        strips: StripSharding,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(residual_blocks(in_channels, out_channels, count, num_groups, strips))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, *strides, strips)] if max(strides) > 1 else [])

    def forward(self, frames: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            frames = layer(frames)
        return frames


class UpStage(nn.Module):
    """One resolution of the decoder: residual blocks, then the way to the next."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        num_groups: int,
        factors: tuple[int, int],
        strips: StripSharding,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(residual_blocks(in_channels, out_channels, count, num_groups, strips))
        self.upsamplers = nn.ModuleList([Upsample(out_channels, *factors, strips)] if max(factors) > 1 else [])

    def forward(self, frames: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            frames = layer(frames)
        return frames


def residual_blocks(
    in_channels: int, out_channels: int, count: int, num_groups: int, strips: StripSharding
) -> list[nn.Module]:
    """`count` blocks, of which the first changes the number of channels."""
    return [
        ResidualBlock(out_channels if index else in_channels, out_channels, num_groups, strips)
        for index in range(count)
    ]
