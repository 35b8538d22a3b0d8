"""What surrounds the convolutions of an autoencoder, each in one pass over the cells where a kernel serves; a norm over
whole frames takes one more for their moments.

On a GPU with Triton these are kernels of `triton_frame_kernels`; elsewhere, and where gradients are wanted, the
references below, which say what is computed. Both compute in fp32 and return the dtype that came in. Activations are in
channels-last order.

Shapes: B batch, C channels, G groups of them, T frames, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The published form divides by max(‖x‖, 1e-12); this does the same for all but vanishing input.
_NORM_EPS = 1e-24


@cache
def _kernels() -> Any:
    """The module with the kernels; None where Triton is not installed."""
    try:
        from sglang.multimodal_gen.runtime.layers import triton_frame_kernels  # late: it imports Triton
    except ImportError:
        return None
    return triton_frame_kernels


def serves(frames: Tensor) -> bool:
    """Whether kernels take these frames, and a bias costs nothing on the way. They have no gradients."""
    return frames.is_cuda and not torch.is_grad_enabled() and _kernels() is not None


class ScaleShift(NamedTuple):
    """What becomes of a norm x for each sample: x · (1 + scale) + shift, both [B, C]."""

    scale: Tensor
    shift: Tensor


def norm_frames(
    frames: Tensor,
    weight: Tensor | None = None,
    *,
    modulation: ScaleShift | None = None,
    bias: Tensor | None = None,
    silu: bool = True,
    eps: float = _NORM_EPS,
    out: Tensor | None = None,
) -> Tensor:
    """Root-mean-square norm of frames + bias over the channels, times `weight` [C], modulated, and SiLU of that.

    [B, C, T, H, W] -> the same shape, in `out` where given, whose frames and lines may lie apart.
    """
    if serves(frames):
        if out is not None and out.stride(1) != 1:  # not in channels-last order
            normed = norm_frames(frames, weight, modulation=modulation, bias=bias, silu=silu, eps=eps)
            return out.copy_(normed)
        cells, step = _spaced_cells(frames)
        target = cells.new_empty(cells.shape) if out is None else out.movedim(1, -1)
        _kernels().norm_frames(
            cells, weight, target, source_cell=step, modulation=modulation, bias=bias, silu=silu, eps=eps
        )
        return target.movedim(-1, 1)
    wide = frames.movedim(1, -1).float()
    if bias is not None:
        wide = wide + bias.float()
    normed = F.rms_norm(wide, wide.shape[-1:], None if weight is None else weight.float(), eps=eps)
    if modulation is not None:
        scale, shift = (part.float()[:, None, None, None] for part in modulation)
        normed = normed * (1 + scale) + shift
    normed = (F.silu(normed) if silu else normed).to(frames.dtype).movedim(-1, 1)
    return normed if out is None else out.copy_(normed)


def sum_frames(frames: Tensor, residual: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """frames + bias + residual, [B, C, T, H, W] each and the bias [C]. The frames may be overwritten."""
    if serves(frames):
        cells, step = _spaced_cells(frames)
        summed = cells if cells.is_contiguous() else cells.new_empty(cells.shape)
        _kernels().norm_frames(
            cells, None, None, source_cell=step, bias=bias, residual=_cells(residual), summed=summed, eps=_NORM_EPS
        )
        return summed.movedim(-1, 1)
    if bias is None:
        return frames + residual
    wide = frames.float() + bias.float().view(-1, *(1,) * (frames.ndim - 2)) + residual.float()
    return wide.to(frames.dtype)


class Moments(NamedTuple):
    """Variance and mean in fp32, [B, G] each, over all cells and the channels of each group."""

    variance: Tensor
    mean: Tensor


def group_moments(frames: Tensor, num_groups: int, *, bias: Tensor | None = None) -> Moments:
    """Of frames + bias, [B, C, T, H, W] or pictures [B, C, H, W], and the bias [C]."""
    if serves(frames):
        cells, step = _spaced_cells(as_clip(frames))
        return Moments(*_kernels().group_moments(cells, num_groups, source_cell=step, bias=bias))
    grouped = _wide(frames, bias).unflatten(1, (num_groups, -1)).flatten(2)
    return Moments(*torch.var_mean(grouped, dim=-1, correction=0))


def sum_with_moments(
    frames: Tensor, residual: Tensor, num_groups: int, *, bias: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """As `sum_frames`, also of pictures [B, C, H, W], and the sum's moments, where they are found on the way."""
    if not serves(frames):
        return sum_frames(frames, residual, bias=bias), None
    cells, step = _spaced_cells(as_clip(frames))
    summed = cells if cells.is_contiguous() else cells.new_empty(cells.shape)
    moments = _kernels().group_moments(
        cells, num_groups, source_cell=step, bias=bias, residual=_cells(as_clip(residual)), summed=summed
    )
    return _like(summed.movedim(-1, 1), frames), Moments(*moments)


def norm_groups(
    frames: Tensor,
    weight: Tensor,
    offset: Tensor,
    num_groups: int,
    *,
    eps: float,
    bias: Tensor | None = None,
    moments: Moments | None = None,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Group norm of frames + bias, times `weight` [C], plus `offset` [C], and SiLU of that.

    [B, C, T, H, W] or pictures [B, C, H, W] -> the same shape, in `out` where given, whose frames and lines may lie
    apart. `moments` are those of frames + bias where somebody knows them, or of more that they are a part of.
    """
    if serves(frames):
        if out is not None and out.stride(1) != 1:  # not in channels-last order
            normed = norm_groups(frames, weight, offset, num_groups, eps=eps, bias=bias, moments=moments, silu=silu)
            return out.copy_(normed)
        cells, step = _spaced_cells(as_clip(frames))
        if moments is None:
            moments = Moments(*_kernels().group_moments(cells, num_groups, source_cell=step, bias=bias))
        target = cells.new_empty(cells.shape) if out is None else as_clip(out).movedim(1, -1)
        _kernels().norm_groups(cells, weight, offset, moments, target, source_cell=step, bias=bias, silu=silu, eps=eps)
        return _like(target.movedim(-1, 1), frames) if out is None else out
    wide = _wide(frames, bias)
    if moments is None:
        # Of numbers in channels-last order torch's loses the digits that a large mean has: 1e-2 of a hundred.
        normed = F.group_norm(wide.contiguous(), num_groups, weight.float(), offset.float(), eps)
    else:
        width, cells_alike = wide.shape[1] // num_groups, (1,) * (wide.ndim - 2)
        scale = (moments.variance + eps).rsqrt().repeat_interleave(width, dim=1) * weight.float()
        centre = moments.mean.repeat_interleave(width, dim=1).unflatten(1, (-1, *cells_alike))
        normed = (wide - centre) * scale.unflatten(1, (-1, *cells_alike)) + offset.float().view(-1, *cells_alike)
    normed = (F.silu(normed) if silu else normed).to(frames.dtype)
    return normed if out is None else out.copy_(normed)


def as_clip(frames: Tensor) -> Tensor:
    """Pictures [B, C, H, W] as clips of one frame; clips as they are."""
    return frames.unsqueeze(2) if frames.ndim == 4 else frames


def _like(clip: Tensor, frames: Tensor) -> Tensor:
    """What `as_clip` made of the frames, as they were."""
    return clip.squeeze(2) if frames.ndim == 4 else clip


def _wide(frames: Tensor, bias: Tensor | None) -> Tensor:
    """frames + bias in fp32."""
    wide = frames.float()
    return wide if bias is None else wide + bias.float().view(-1, *(1,) * (frames.ndim - 2))


class Footage(NamedTuple):
    """Frames [B, P·C, T, H, W] of which each is `shared` P ones, one behind the other in the channels, and the bias
    [P·C] that is still to be added. Each frame of one alone comes `repeats` times."""

    frames: Tensor
    shared: int = 1
    bias: Tensor | None = None
    repeats: int = 1

    @property
    def length(self) -> int:
        """How many frames come of it."""
        assert 1 in (self.shared, self.repeats), "one or the other"
        return self.frames.shape[2] * self.shared * self.repeats


def upsample_frames(parts: Sequence[Footage]) -> Tensor:
    """Twice the height and width, by repetition, of all the parts' frames in order: [B, C, Σlength, 2·H, 2·W]."""
    first = parts[0].frames
    if serves(first):
        return upsampled_by(_kernels(), parts)
    clips = [_one_by_one(part) for part in parts]
    frames = clips[0] if len(clips) == 1 else torch.cat(clips, dim=2)
    images = F.interpolate(frames.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest-exact")
    return images.unflatten(0, (first.shape[0], -1)).transpose(1, 2)


def upsampled_by(kernels: Any, parts: Sequence[Footage]) -> Tensor:
    """The same by a kernel."""
    batch, width_in_channels, _, height, width = parts[0].frames.shape
    lengths = [part.length for part in parts]
    channels = width_in_channels // parts[0].shared
    target = parts[0].frames.new_empty((batch, sum(lengths), 2 * height, 2 * width, channels))
    for part, room in zip(parts, target.split(lengths, dim=1), strict=True):
        for place in range(part.repeats):
            target_frames = room[:, place :: part.repeats]
            kernels.upsample_frames(_cells(part.frames), part.bias, target_frames, shared=part.shared)
    return target.movedim(-1, 1)


def spread_frames(frames: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Eight channels become the frames, lines and columns of one: [B, 8·C, T, H, W] -> [B, C, 2·T - 1, 2·H, 2·W].

    Of a channel's eight parts the first four are of the earlier frame, and of four the first two of the upper line. The
    clip's first frame stays single: it is the later one of its two. `bias` [8·C] is added, and then the residual
    [B, 8·R, T, H, W] in the same way, as often one behind the other in the channels as makes C of its R.
    """
    if serves(frames):
        return spread_by(_kernels(), frames, bias=bias, residual=residual)
    video = _spread(frames if bias is None else frames.float() + bias.float().view(-1, 1, 1, 1))
    if residual is not None:
        other = _spread(residual).float()
        video = video.float() + other.repeat(1, video.shape[1] // other.shape[1], 1, 1, 1)
    return video.to(frames.dtype)


def spread_by(kernels: Any, frames: Tensor, *, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The same by a kernel."""
    cells = _cells(frames)
    batch, length, height, width, channels = cells.shape
    target = cells.new_empty((batch, 2 * length - 1, 2 * height, 2 * width, channels // 8))
    kernels.spread_frames(cells, bias, None if residual is None else _cells(residual), target)
    return target.movedim(-1, 1)


def _spread(frames: Tensor) -> Tensor:
    """[B, 8·C, T, H, W] -> [B, C, 2·T - 1, 2·H, 2·W], in channels-last order."""
    parts = frames.movedim(1, -1).unflatten(-1, (-1, 2, 2, 2))  # [B, T, H, W, C, 2, 2, 2]
    cells = parts.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return cells[:, 1:].movedim(-1, 1)


def _one_by_one(part: Footage) -> Tensor:
    """[B, P·C, T, H, W] -> [B, C, length, H, W] with the bias."""
    frames = part.frames.permute(0, 2, 3, 4, 1)
    if part.bias is not None:
        frames = frames + part.bias
    if part.shared > 1:
        frames = frames.unflatten(-1, (part.shared, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    if part.repeats > 1:
        frames = frames.repeat_interleave(part.repeats, dim=1)
    return frames.permute(0, 4, 1, 2, 3)


def _cells(frames: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, T, H, W, C] with each sample's cells side by side: a view of what is channels-last."""
    cells = frames.movedim(1, -1)
    return cells if cells[0].is_contiguous() else cells.contiguous()


def _spaced_cells(frames: Tensor) -> tuple[Tensor, int]:
    """[B, C, T, H, W] -> [B, T, H, W, C], in each sample's memory one cell every so many numbers: a view of what is
    channels-last, or of some of the channels of that."""
    cells = frames.movedim(1, -1)
    step = cell_step(cells)
    return (cells.contiguous(), cells.shape[-1]) if step is None else (cells, step)


def cell_step(cells: Tensor) -> int | None:
    """How many numbers of memory apart the cells of a sample are, [B, T, H, W, C]; None where that is not the same for
    all, or channels do not lie side by side."""
    *_, channels = cells.shape
    if channels > 1 and cells.stride(4) != 1:
        return None
    step, count = None, 1
    for dim in (3, 2, 1):
        if cells.shape[dim] > 1:
            step = cells.stride(dim) // count if step is None else step
            if cells.stride(dim) != step * count:
                return None
        count *= cells.shape[dim]
    return channels if step is None else step
