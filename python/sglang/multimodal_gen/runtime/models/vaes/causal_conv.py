"""Causal convolution over video, and the memory that lets a clip pass chunk by chunk.

Shapes: B batch, C channels, T frames, H, W height and width. Activations are kept in channels-last order, where norms
run along contiguous memory and frames fold into the batch without a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding


class TemporalState:
    """What the causal layers remember of the frames before this chunk; one per clip, and per tile of a tiled clip.

    With `carry=False` the chunk is the whole clip and nothing is kept.
    """

    def __init__(self, *, carry: bool) -> None:
        self.carry = carry
        self.is_first = True
        self._tails: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, frames: Tensor, length: int) -> Tensor:
        """Put the layer's remembered frames, `length` at most, in front of [B, C, T, H, W]; remember the last ones."""
        tail = self.tail(layer)
        if tail is not None:
            frames = torch.cat((tail, frames), dim=2)
        self.remember(layer, frames, length)
        return frames

    def tail(self, layer: nn.Module) -> Tensor | None:
        """The layer's remembered frames; None at the start of a clip."""
        return self._tails.get(layer)

    def remember(self, layer: nn.Module, frames: Tensor, length: int) -> None:
        """The last `length` of these frames, for the next chunk."""
        if self.carry:
            # A copy, because a view would keep the whole chunk in memory.
            self._tails[layer] = frames[:, :, -length:].clone()

    def advance(self) -> None:
        """Call when a chunk has passed through all layers: the next one is not the first."""
        self.is_first = False

    def num_bytes(self) -> int:
        """Memory held between chunks."""
        return sum(tail.nbytes for tail in self._tails.values())


def fold_frames(video: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B·T, C, H, W]; a view of a channels-last tensor."""
    return video.transpose(1, 2).flatten(0, 1)


def unfold_frames(images: Tensor, batch_size: int) -> Tensor:
    """[B·T, C, H, W] -> [B, C, T, H, W]."""
    return images.unflatten(0, (batch_size, -1)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """Convolution that sees this frame and the `kernel_size - 1` before it; before the clip there are zeros."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int], *, strips: StripSharding
    ) -> None:
        sides = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_channels, out_channels, sides)
        self.strips = strips
        rows, columns = sides[1] // 2, sides[2] // 2
        self.edges = (columns, columns, rows, rows)

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:  # type: ignore[override]
        """[B, C, T, H, W] -> [B, O, T, H, W]."""
        num_frames, reach = frames.shape[2], self.kernel_size[0] - 1
        padding = (self.edges[2], self.edges[0])
        if self.strips.is_dealt:
            frames, padding = self._surrounded(frames, state, reach), (0, 0)
        elif reach:
            frames = state.extend(self, frames, reach)
        # A single frame without a past meets only one slice of the kernel. On the CPU torch has no fast 3-D convolution
        # below B·C·T·H = 20,480 (32 channels, 8x64x64: 146 ms, in slices 14 ms) and none faster than slices above.
        if frames.shape[2] == 1 or frames.device.type == "cpu":
            return self._by_slices(frames, num_frames, padding)
        missing = num_frames + reach - frames.shape[2]
        frames = F.pad(frames, (0, 0, 0, 0, missing, 0)) if missing else frames
        return F.conv3d(frames, self.weight, self.bias, padding=(0, *padding))

    def _surrounded(self, frames: Tensor, state: TemporalState, reach: int) -> Tensor:
        """A strip between its neighbours' lines, behind what came before it: all in one copy, as with one rank."""
        tail = state.tail(self)
        starts = tail is None and (frames.shape[2] == 1 or frames.device.type == "cpu")
        lead = 0 if starts else reach
        frames = self.strips.pad(frames, (*self.edges, lead, 0))
        if tail is not None:
            frames[:, :, lead - tail.shape[2] : lead] = tail
        if reach:
            state.remember(self, frames, reach)
        return frames

    def _by_slices(self, frames: Tensor, num_frames: int, padding: tuple[int, int]) -> Tensor:
        """The sum of one 2-D convolution for each temporal slice of the kernel, latest slice first."""
        batch_size, total, reach = frames.shape[0], frames.shape[2], self.kernel_size[0] - 1
        output: Tensor | None = None
        for delay in range(reach + 1):
            # Output frame t meets frame t - delay; those before the first are zeros and add nothing.
            first = max(0, total - num_frames - delay)
            last = total - delay
            if last <= first:
                break
            weight = self.weight[:, :, reach - delay]
            bias = self.bias if delay == 0 else None
            images = F.conv2d(fold_frames(frames[:, :, first:last]), weight, bias, padding=padding)
            part = unfold_frames(images, batch_size)
            if output is None:
                output = part
            else:
                output[:, :, num_frames - part.shape[2] :] += part
        assert output is not None, "a chunk has at least one frame"
        return output


class ChannelRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of images or video, with the weight shaped as checkpoints have it."""

    def __init__(self, channels: int, *, num_trailing: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * num_trailing))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]."""
        weight = self.gamma.flatten().to(features.dtype)
        # The published form divides by max(‖x‖, 1e-12); this eps does the same for all but vanishing input.
        normed = F.rms_norm(features.movedim(1, -1), weight.shape, weight, eps=1e-24)
        return normed.to(features.dtype).movedim(-1, 1)
