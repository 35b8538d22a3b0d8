"""Triton kernels for what surrounds the convolutions of a video autoencoder: one pass over the cells each.

Their references, and the choice between the two, are in `fused_frames.py`. Channels of a cell lie side by side. Cells
are read and written in their own dtype and computed in fp32. Shapes: B samples, C channels, T frames, H, W height and
width, P frames that share a cell, R channels of a residual, G groups of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Elements that a program holds at a time: 16 for each of its threads."""
# Of moments: so many programs fill a GPU; with more work for each of them, what they find takes less memory.
_ENOUGH_PARTS = 1024
_MOST_STEPS = 64
# Of a norm by groups: what belongs to the channels is loaded once for so many tiles.
_NORM_STEPS = 4


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    source,
    bias,
    residual,
    weight,
    scale,
    shift,
    summed,
    normed,
    num_cells,
    frame_cells,
    line_cells,
    source_batch,
    residual_batch,
    scale_batch,
    shift_batch,
    summed_batch,
    normed_batch,
    normed_frame,
    normed_line,
    eps,
    CHANNELS: tl.constexpr,
    SOURCE_CELL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    MODULATED: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    DENSE: tl.constexpr,
):
    """ROWS neighbouring cells of one sample: source + bias + residual, and SiLU of what weight and modulation make of
    the norm of that."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < num_cells - first) & (columns[None, :] < CHANNELS)
    place = rows[:, None] * CHANNELS + columns[None, :]
    wide_place = rows[:, None] * SOURCE_CELL + columns[None, :]
    stored = tl.load(source + batch * source_batch + first * SOURCE_CELL + wide_place, mask=inside, other=0.0)
    value = stored.to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        other = tl.load(residual + batch * residual_batch + first * CHANNELS + place, mask=inside, other=0.0)
        rounded = (value + other.to(tl.float32)).to(stored.dtype)
        tl.store(summed + batch * summed_batch + first * CHANNELS + place, rounded, mask=inside)
        # The norm sees what the next layer will see of the sum.
        value = rounded.to(tl.float32)
    if NORM:
        mean_square = tl.sum(value * value, axis=1) / CHANNELS
        value *= tl.rsqrt(mean_square + eps)[:, None]
        if HAS_WEIGHT:
            value *= tl.load(weight + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)[None, :]
        if MODULATED:
            factor = tl.load(scale + batch * scale_batch + columns, mask=columns < CHANNELS, other=0.0)
            added = tl.load(shift + batch * shift_batch + columns, mask=columns < CHANNELS, other=0.0)
            value = value * (1.0 + factor.to(tl.float32)[None, :]) + added.to(tl.float32)[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        target = normed + batch * normed_batch
        if DENSE:
            tl.store(target + first * CHANNELS + place, value.to(stored.dtype), mask=inside)
        else:
            cells = first + rows
            frames, cell = cells // frame_cells, cells % frame_cells
            lines, column = cell // line_cells, cell % line_cells
            start = frames * normed_frame + lines * normed_line + column * CHANNELS
            tl.store(target + start[:, None] + columns[None, :], value.to(stored.dtype), mask=inside)


def norm_frames(
    source: Tensor,
    weight: Tensor | None,
    normed: Tensor | None,
    *,
    source_cell: int,
    modulation: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    summed: Tensor | None = None,
    silu: bool = True,
    eps: float,
) -> None:
    """Of cells [B, T, H, W, C], one every `source_cell` numbers in each sample: source + bias + residual, which goes
    into `summed` where there is a residual, and its norm, times `weight` [C] and modulated by scale and shift [B, C],
    into `normed` where there is one. Residual and sum are dense in each sample; the frames and lines of `normed` may
    lie apart. The sum may be the source itself."""
    batch, _, height, width, channels = source.shape
    num_cells = source[0, ..., 0].numel()
    for dense in (residual, summed):
        assert dense is None or dense[0].is_contiguous(), "cells lie side by side"
    is_dense, strides = True, [0, 0, 0]
    if normed is not None:
        assert channels == 1 or normed.stride(4) == 1, "channels lie side by side"
        assert width == 1 or normed.stride(3) == channels, "cells of a line lie side by side"
        is_dense, strides = normed[0].is_contiguous(), list(normed.stride()[:3])
    scale, shift = (source, source) if modulation is None else modulation
    assert (scale.stride(1) == 1 and shift.stride(1) == 1) or modulation is None, "channels lie side by side"
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    _norm_kernel[(triton.cdiv(num_cells, rows), batch)](
        source,
        source if bias is None else bias,
        source if residual is None else residual,
        source if weight is None else weight,
        scale,
        shift,
        source if summed is None else summed,
        source if normed is None else normed,
        num_cells,
        height * width,
        width,
        source.stride(0),
        0 if residual is None else residual.stride(0),
        scale.stride(0),
        shift.stride(0),
        0 if summed is None else summed.stride(0),
        *strides,
        eps,
        CHANNELS=channels,
        SOURCE_CELL=source_cell,
        BLOCK=block,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        MODULATED=modulation is not None,
        NORM=normed is not None,
        SILU=silu,
        DENSE=is_dense,
        num_warps=4,
    )


@triton.jit
def _upsample_kernel(  # type: ignore[no-untyped-def]
    source,
    bias,
    target,
    num_cells,
    line_cells,
    source_batch,
    source_frame,
    target_batch,
    target_frame,
    CHANNELS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """ROWS neighbouring cells of one of the frames that share them: each goes to four cells of the target's frame."""
    first = tl.program_id(0) * ROWS
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    cells = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (cells[:, None] < num_cells) & (columns[None, :] < CHANNELS)
    part = frame % SHARED
    start = source + batch * source_batch + (frame // SHARED).to(tl.int64) * source_frame + part * CHANNELS
    value = tl.load(start + cells[:, None] * (SHARED * CHANNELS) + columns[None, :], mask=inside, other=0.0)
    if HAS_BIAS:
        added = tl.load(bias + part * CHANNELS + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + added[None, :]).to(value.dtype)
    line, column = cells // line_cells, cells % line_cells
    # A line of the target has twice the cells, and two of them come of one.
    corner = (4 * line * line_cells + 2 * column) * CHANNELS
    out = target + batch * target_batch + frame.to(tl.int64) * target_frame + corner[:, None] + columns[None, :]
    below = 2 * line_cells * CHANNELS
    tl.store(out, value, mask=inside)
    tl.store(out + CHANNELS, value, mask=inside)
    tl.store(out + below, value, mask=inside)
    tl.store(out + below + CHANNELS, value, mask=inside)


def upsample_frames(source: Tensor, bias: Tensor | None, target: Tensor, *, shared: int) -> None:
    """Cells [B, T, H, W, P·C], plus bias [P·C], to `target` [B, T·P, 2·H, 2·W, C]: `shared` P frames of the target come
    of one, of a part of the channels each; every cell becomes four."""
    batch, num_frames, height, width, _ = source.shape
    channels = target.shape[-1]
    assert source[0, 0].is_contiguous() and target[0, 0].is_contiguous(), "cells of a frame lie side by side"
    # What is counted inside a frame is counted in 32 bits.
    assert max(source[0, 0].numel(), target[0, 0].numel()) < 2**31, "a frame of less than 2**31 numbers"
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    _upsample_kernel[(triton.cdiv(height * width, rows), num_frames * shared, batch)](
        source,
        source if bias is None else bias,
        target,
        height * width,
        width,
        source.stride(0),
        source.stride(1),
        target.stride(0),
        target.stride(1),
        CHANNELS=channels,
        SHARED=shared,
        BLOCK=block,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )


@triton.jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    source,
    bias,
    residual,
    summed,
    means,
    squares,
    num_cells,
    steps,
    source_batch,
    residual_batch,
    summed_batch,
    CHANNELS: tl.constexpr,
    SOURCE_CELL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Of `steps` times ROWS neighbouring cells of one sample: source + bias + residual, which is kept where there is a
    residual, and for each channel the mean of that and the sum of squares around it."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS * steps
    count = tl.minimum(num_cells - first, ROWS * steps)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    live = columns < CHANNELS
    start = source + batch * source_batch + first * SOURCE_CELL
    beside = residual + batch * residual_batch + first * CHANNELS
    out = summed + batch * summed_batch + first * CHANNELS
    added = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + columns, mask=live, other=0.0).to(tl.float32)
    # Sums of squares around the mean of the first rows: around zero they lose the digits that a large mean has.
    inside = (rows[:, None] < count) & live[None, :]
    value = tl.load(start + rows[:, None] * SOURCE_CELL + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(beside + rows[:, None] * CHANNELS + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    near = tl.sum(value, axis=0) / tl.minimum(count, ROWS).to(tl.float32) + added
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    square = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for _ in range(steps):
        inside = (rows[:, None] < count) & live[None, :]
        stored = tl.load(start + rows[:, None] * SOURCE_CELL + columns[None, :], mask=inside, other=0.0)
        value = stored.to(tl.float32) + added[None, :]
        if HAS_RESIDUAL:
            place = rows[:, None] * CHANNELS + columns[None, :]
            value += tl.load(beside + place, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(stored.dtype)
            tl.store(out + place, rounded, mask=inside)
            # The moments are those of what the next layer will see of the sum.
            value = rounded.to(tl.float32)
        difference = tl.where(inside, value - near[None, :], 0.0)
        total += difference
        square += difference * difference
        rows += ROWS
    moved = tl.sum(total, axis=0) / count.to(tl.float32)
    place = (batch * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + columns
    tl.store(means + place, near + moved, mask=live)
    tl.store(squares + place, tl.maximum(tl.sum(square, axis=0) - moved * moved * count, 0.0), mask=live)


@triton.jit
def _whole_moments_kernel(  # type: ignore[no-untyped-def]
    means,
    squares,
    variance,
    mean,
    num_cells,
    part_cells,
    num_parts,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Variance and mean of one group of WIDTH channels of one sample, of those of its parts' channels."""
    group = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    live = columns < WIDTH
    start = batch * num_parts * CHANNELS + group * WIDTH
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, num_parts, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows[:, None] < num_parts) & live[None, :]
        cells = tl.minimum(num_cells - rows * part_cells, part_cells)
        share = cells.to(tl.float32) / num_cells
        place = start + rows[:, None] * CHANNELS + columns[None, :]
        total += tl.load(means + place, mask=inside, other=0.0) * share[:, None]
    centre = tl.sum(total) / WIDTH
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, num_parts, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows[:, None] < num_parts) & live[None, :]
        cells = tl.minimum(num_cells - rows * part_cells, part_cells)
        share = cells.to(tl.float32) / num_cells
        place = start + rows[:, None] * CHANNELS + columns[None, :]
        away = tl.load(means + place, mask=inside, other=0.0) - centre
        around = tl.load(squares + place, mask=inside, other=0.0) / num_cells
        total += tl.where(inside, around + away * away * share[:, None], 0.0)
    groups: tl.constexpr = CHANNELS // WIDTH
    tl.store(mean + batch * groups + group, centre)
    tl.store(variance + batch * groups + group, tl.sum(total) / WIDTH)


def group_moments(
    source: Tensor,
    num_groups: int,
    *,
    source_cell: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    summed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Variance and mean in fp32, [B, G] each, over all cells and each of G groups of neighbouring channels, of cells
    [B, T, H, W, C], one every `source_cell` numbers in each sample, plus bias [C], plus residual. With a residual the
    sum goes into `summed`, which may be the source itself; both are dense in each sample."""
    batch, channels = source.shape[0], source.shape[-1]
    num_cells = source[0, ..., 0].numel()
    assert channels % num_groups == 0, f"{channels} channels are {num_groups} groups"
    assert (residual is None) == (summed is None), "a sum is kept where there is one"
    for dense in (residual, summed):
        assert dense is None or dense[0].is_contiguous(), "cells lie side by side"
    # Inside of a sample cells are counted in 32 bits.
    assert num_cells < 2**31 - _TILE * _MOST_STEPS, "a sample of less than 2**31 cells"
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    steps = min(_MOST_STEPS, triton.next_power_of_2(max(1, num_cells // (rows * _ENOUGH_PARTS))))
    num_parts = triton.cdiv(num_cells, rows * steps)
    means, squares = source.new_empty((2, batch, num_parts, channels), dtype=torch.float32)
    _moments_kernel[(num_parts, batch)](
        source,
        source if bias is None else bias,
        source if residual is None else residual,
        source if summed is None else summed,
        means,
        squares,
        num_cells,
        steps,
        source.stride(0),
        0 if residual is None else residual.stride(0),
        0 if summed is None else summed.stride(0),
        CHANNELS=channels,
        SOURCE_CELL=source_cell,
        BLOCK=block,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=4,
    )
    return _whole_moments(means, squares, num_groups, num_cells=num_cells, part_cells=rows * steps)


def _whole_moments(
    means: Tensor, squares: Tensor, num_groups: int, *, num_cells: int, part_cells: int
) -> tuple[Tensor, Tensor]:
    """Variance and mean [B, G], of those of the channels of parts of so many cells, [B, parts, C] each."""
    batch, num_parts, channels = means.shape
    width = channels // num_groups
    block = triton.next_power_of_2(width)
    variance, mean = means.new_empty((2, batch, num_groups))
    _whole_moments_kernel[(num_groups, batch)](
        means,
        squares,
        variance,
        mean,
        num_cells,
        part_cells,
        num_parts,
        CHANNELS=channels,
        WIDTH=width,
        BLOCK=block,
        ROWS=max(1, _TILE // block),
        num_warps=4,
    )
    return variance, mean


@triton.jit
def _group_norm_kernel(  # type: ignore[no-untyped-def]
    source,
    bias,
    weight,
    offset,
    variance,
    mean,
    normed,
    num_cells,
    frame_cells,
    line_cells,
    source_batch,
    normed_batch,
    normed_frame,
    normed_line,
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SOURCE_CELL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    DENSE: tl.constexpr,
):
    """STEPS times ROWS neighbouring cells of one sample: SiLU of the norm of source + bias by its groups' moments."""
    first = tl.program_id(0).to(tl.int64) * ROWS * STEPS
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    live = columns < CHANNELS
    group = batch * GROUPS + columns // (CHANNELS // GROUPS)
    scale = tl.rsqrt(tl.load(variance + group, mask=live, other=1.0) + eps)
    scale *= tl.load(weight + columns, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(offset + columns, mask=live, other=0.0).to(tl.float32)
    centre = tl.load(mean + group, mask=live, other=0.0)
    if HAS_BIAS:
        centre -= tl.load(bias + columns, mask=live, other=0.0).to(tl.float32)
    target = normed + batch * normed_batch
    for _ in range(STEPS):
        rows = tl.arange(0, ROWS)
        inside = (rows[:, None] < num_cells - first) & live[None, :]
        place = rows[:, None] * SOURCE_CELL + columns[None, :]
        stored = tl.load(source + batch * source_batch + first * SOURCE_CELL + place, mask=inside, other=0.0)
        value = (stored.to(tl.float32) - centre[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            # What is no cell may lie as far from zero as the mean, beyond what has an exponential.
            value = tl.where(inside, value, 0.0)
            value = value / (1.0 + tl.exp(-value))
        if DENSE:
            place = rows[:, None] * CHANNELS + columns[None, :]
            tl.store(target + first * CHANNELS + place, value.to(stored.dtype), mask=inside)
        else:
            cells = first + rows
            frames, cell = cells // frame_cells, cells % frame_cells
            lines, column = cell // line_cells, cell % line_cells
            start = frames * normed_frame + lines * normed_line + column * CHANNELS
            tl.store(target + start[:, None] + columns[None, :], value.to(stored.dtype), mask=inside)
        first += ROWS


def norm_groups(
    source: Tensor,
    weight: Tensor,
    offset: Tensor,
    moments: tuple[Tensor, Tensor],
    normed: Tensor,
    *,
    source_cell: int,
    bias: Tensor | None = None,
    silu: bool = True,
    eps: float,
) -> None:
    """Of cells [B, T, H, W, C], one every `source_cell` numbers in each sample: the norm of source + bias by variance
    and mean [B, G] of that, times weight [C], plus offset [C], and SiLU of it, into `normed`, whose frames and lines
    may lie apart."""
    batch, _, height, width, channels = source.shape
    variance, mean = moments
    assert variance.is_contiguous() and mean.is_contiguous(), "groups lie side by side"
    assert channels == 1 or normed.stride(4) == 1, "channels lie side by side"
    assert width == 1 or normed.stride(3) == channels, "cells of a line lie side by side"
    num_cells = source[0, ..., 0].numel()
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    _group_norm_kernel[(triton.cdiv(num_cells, rows * _NORM_STEPS), batch)](
        source,
        source if bias is None else bias,
        weight,
        offset,
        variance,
        mean,
        normed,
        num_cells,
        height * width,
        width,
        source.stride(0),
        *normed.stride()[:3],
        eps,
        CHANNELS=channels,
        GROUPS=variance.shape[1],
        SOURCE_CELL=source_cell,
        BLOCK=block,
        ROWS=rows,
        STEPS=_NORM_STEPS,
        HAS_BIAS=bias is not None,
        SILU=silu,
        DENSE=normed[0].is_contiguous(),
        num_warps=4,
    )


@triton.jit
def _spread_kernel(  # type: ignore[no-untyped-def]
    source,
    bias,
    residual,
    target,
    num_cells,
    line_cells,
    source_batch,
    residual_batch,
    target_batch,
    CHANNELS: tl.constexpr,
    RESIDUAL_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """ROWS neighbouring cells of a frame and BLOCK channels of the target: eight parts go to two frames, two lines and
    two columns of each. The first frame has no earlier one."""
    num_blocks = tl.cdiv(CHANNELS, BLOCK)
    first = tl.program_id(0) // num_blocks * ROWS
    frame = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    cells = first + tl.arange(0, ROWS)
    channels = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, 8)
    inside = (cells[:, None, None] < num_cells) & (channels[None, :, None] < CHANNELS)
    number = channels[:, None] * 8 + part[None, :]
    start = source + batch * source_batch + frame * num_cells * (8 * CHANNELS)
    whole = tl.load(start + cells[:, None, None] * (8 * CHANNELS) + number[None, :, :], mask=inside, other=0.0)
    value = whole.to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + number, mask=channels[:, None] < CHANNELS, other=0.0).to(tl.float32)
        value += added[None, :, :]
    if HAS_RESIDUAL:
        other = (channels % RESIDUAL_CHANNELS)[:, None] * 8 + part[None, :]
        start = residual + batch * residual_batch + frame * num_cells * (8 * RESIDUAL_CHANNELS)
        place = start + cells[:, None, None] * (8 * RESIDUAL_CHANNELS) + other[None, :, :]
        value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    later = 2 * frame - 1 + part // 4
    line, column = cells // line_cells, cells % line_cells
    # A line of the target has twice the cells.
    corner = 4 * line * line_cells + 2 * column
    shift = part % 4 // 2 * (2 * line_cells) + part % 2
    out = target + batch * target_batch + (later * (4 * num_cells))[None, None, :] * CHANNELS
    out = out + (corner[:, None, None] + shift[None, None, :]) * CHANNELS + channels[None, :, None]
    tl.store(out, value.to(whole.dtype), mask=inside & (later >= 0)[None, None, :])


_SPREAD_TILE, _SPREAD_CHANNELS = 4096, 64


def spread_frames(source: Tensor, bias: Tensor | None, residual: Tensor | None, target: Tensor) -> None:
    """Cells [B, T, H, W, 8·C], plus bias [8·C] and the residual's [B, T, H, W, 8·R], to `target`
    [B, 2·T - 1, 2·H, 2·W, C]: see `fused_frames.spread_frames`."""
    batch, num_frames, height, width, _ = source.shape
    channels = target.shape[-1]
    for dense in (source, residual, target):
        assert dense is None or dense[0].is_contiguous(), "cells lie side by side"
    # What is counted inside a frame is counted in 32 bits.
    assert max(source[0, 0].numel(), target[0, 0].numel()) < 2**31, "a frame of less than 2**31 numbers"
    block = min(_SPREAD_CHANNELS, triton.next_power_of_2(channels))
    rows = max(1, _SPREAD_TILE // (8 * block))
    num_programs = triton.cdiv(height * width, rows) * triton.cdiv(channels, block)
    _spread_kernel[(num_programs, num_frames, batch)](
        source,
        source if bias is None else bias,
        source if residual is None else residual,
        target,
        height * width,
        width,
        source.stride(0),
        0 if residual is None else residual.stride(0),
        target.stride(0),
        CHANNELS=channels,
        RESIDUAL_CHANNELS=1 if residual is None else residual.shape[-1] // 8,
        BLOCK=block,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=4,
    )
