"""Causal convolution over video, and the memory that lets a clip pass chunk by chunk.

Shapes: B batch, C channels, T frames, H, W height and width. Activations are kept in channels-last order, where norms
run along contiguous memory and frames fold into the batch without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.fused_frames import norm_frames
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


# Between these numbers of output channels a convolution is faster with the latter: see `_weight_for`.
_FEW_CHANNELS, _FULL_CHANNELS = 64, 128
_HOPPER = (9, 0)


class Room(NamedTuple):
    """Memory for what a convolution sees: `whole` with the frames before the chunk and, of a strip, the neighbours'
    lines; `inner` is where the chunk itself belongs."""

    whole: Tensor
    inner: Tensor


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
        if self.kernel_size == (1, 1, 1):
            # A product of matrices, which adds its bias on the way.
            cells = F.linear(frames.movedim(1, -1), self.weight.flatten(1), self.bias)
            return cells.movedim(-1, 1)
        return _sum(*self.without_bias(frames, state))

    def after(self, norm: ChannelRMSNorm, frames: Tensor, state: TemporalState) -> Tensor:
        """The same of SiLU of the norm of the frames."""
        return _sum(*self.over(activated(self, norm, frames, state), frames.shape[2], state))

    def without_bias(self, frames: Tensor, state: TemporalState) -> tuple[Tensor, Tensor | None]:
        """The same, and the bias [O] where it is still to be added: on GPUs that is a pass of its own over the result,
        unless what comes next does it on its way."""
        room = self.room(frames, state)
        if room is not None:
            room.inner.copy_(frames)
        return self.over(frames if room is None else room.whole, frames.shape[2], state)

    def room(self, frames: Tensor, state: TemporalState) -> Room | None:
        """Where to write the chunk [B, C, T, H, W], so that nothing needs to be put around it afterwards; the past is
        there already. None where nothing is around it, and the convolution takes the chunk as it is."""
        tail = state.tail(self)
        past = 0 if tail is None else tail.shape[2]
        lead = past if self._is_sliced(frames.shape[2], past, frames.device) else self.kernel_size[0] - 1
        edges = self.edges if self.strips.is_dealt else (0, 0, 0, 0)
        if not (lead or any(edges)):
            return None
        whole, inner = self.strips.room(frames, edges, lead=lead)
        if tail is not None:
            whole[:, :, lead - past : lead] = tail
        if lead > past:
            whole[:, :, : lead - past].zero_()
        return Room(whole, inner)

    def over(self, frames: Tensor, num_frames: int, state: TemporalState) -> tuple[Tensor, Tensor | None]:
        """What comes of the last `num_frames` in the whole of a room, or of a chunk that needs none: see
        `without_bias`."""
        lead = frames.shape[2] - num_frames
        if self.strips.is_dealt:
            self.strips.exchange(frames[:, :, lead:], self.edges)
        if self.kernel_size[0] > 1:
            state.remember(self, frames, self.kernel_size[0] - 1)
        padding = (0, 0) if self.strips.is_dealt else (self.edges[2], self.edges[0])
        if self._is_sliced(num_frames, lead, frames.device):
            return self._by_slices(frames, num_frames, padding), None
        return F.conv3d(frames, self._weight_for(frames), padding=(0, *padding))[:, : self.out_channels], self.bias

    def _weight_for(self, frames: Tensor) -> Tensor:
        """The weight, behind which are output channels of zeros where those make it faster.

        For 96 of them cuDNN 9.19 takes a kernel of the GPUs of 2020, with 284 TFLOP/s on an H200, for 128 one of 2022.
        """
        between = self.in_channels >= _FEW_CHANNELS and _FEW_CHANNELS < self.out_channels < _FULL_CHANNELS
        if not (between and self.fills_channels(frames)):
            return self.weight
        shape = (_FULL_CHANNELS, *self.weight.shape[1:])
        weight = torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=torch.channels_last_3d)
        weight[: self.out_channels] = self.weight
        weight[self.out_channels :].zero_()
        return weight

    @staticmethod
    def fills_channels(frames: Tensor) -> bool:
        """Whether device and precision are those for which that was seen."""
        is_half = frames.dtype in (torch.bfloat16, torch.float16)
        return is_half and frames.is_cuda and torch.cuda.get_device_capability(frames.device) >= _HOPPER

    @staticmethod
    def computes_at_once(device: torch.device) -> bool:
        """Whether the kernel's temporal slices are one 3-D convolution there. On the CPU torch has no fast one below
        B·C·T·H = 20,480 (32 channels, 8x64x64: 146 ms, in slices 14 ms) and none faster than slices above."""
        return device.type != "cpu"

    def _is_sliced(self, num_frames: int, lead: int, device: torch.device) -> bool:
        """A single frame without a past meets only one slice of the kernel."""
        return (num_frames == 1 and lead == 0) or not self.computes_at_once(device)

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
    """Root-mean-square norm over the channels of video, with the weight shaped as checkpoints have it."""

    def __init__(self, channels: int, *, num_trailing: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * num_trailing))

    @property
    def weight(self) -> Tensor:
        """[C]."""
        return self.gamma.flatten()

    def forward(self, frames: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        return norm_frames(frames, self.weight, silu=False)


def activated(
    conv: CausalConv3d, norm: ChannelRMSNorm, frames: Tensor, state: TemporalState, *, bias: Tensor | None = None
) -> Tensor:
    """SiLU of the norm of frames + bias, [B, C, T, H, W], as `conv.over` takes it: in its room, where it needs one."""
    room = conv.room(frames, state)
    active = norm_frames(frames, norm.weight, bias=bias, out=None if room is None else room.inner)
    return active if room is None else room.whole


def both(bias: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of what is to be added to the same frames, not rounded."""
    if bias is None or other is None:
        return other if bias is None else bias
    return bias.float() + other.float()


def _sum(frames: Tensor, bias: Tensor | None) -> Tensor:
    return frames if bias is None else frames.add_(bias.view(-1, 1, 1, 1))
