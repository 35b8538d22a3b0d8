"""Triton kernels for what surrounds the convolutions of a video autoencoder: one pass over the cells each.

Their references, and the choice between the two, are in `fused_frames.py`. Channels of a cell lie side by side. Cells
are read and written in their own dtype and computed in fp32. Shapes: B samples, C channels, T frames, H, W height and
width, P frames that share a cell, R channels of a residual.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Elements that a program holds at a time: 16 for each of its threads."""


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
