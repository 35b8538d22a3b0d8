"""Triton kernels for what surrounds the convolutions of a video autoencoder: one pass over the cells each.

Their references, and the choice between the two, are in `fused_frames.py`. Channels of a cell lie side by side. Cells
are read and written in their own dtype and computed in fp32. Shapes: B samples, C channels, T frames, H, W height and
width, P frames that share a cell.
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
    summed,
    normed,
    num_cells,
    frame_cells,
    line_cells,
    source_batch,
    residual_batch,
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
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    DENSE: tl.constexpr,
):
    """ROWS neighbouring cells of one sample: source + bias + residual, and SiLU of the norm of that times weight."""
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
        value *= tl.load(weight + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)[None, :]
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
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    summed: Tensor | None = None,
    silu: bool = True,
    eps: float,
) -> None:
    """Of cells [B, T, H, W, C], one every `source_cell` numbers in each sample: source + bias + residual, which goes
    into `summed` where there is a residual, and with `weight` [C] its norm into `normed`. Residual and sum are dense in
    each sample; the frames and lines of `normed` may lie apart. The sum may be the source itself."""
    batch, _, height, width, channels = source.shape
    num_cells = source[0, ..., 0].numel()
    for dense in (residual, summed):
        assert dense is None or dense[0].is_contiguous(), "cells lie side by side"
    is_dense, strides = True, [0, 0, 0]
    if normed is not None:
        assert channels == 1 or normed.stride(4) == 1, "channels lie side by side"
        assert width == 1 or normed.stride(3) == channels, "cells of a line lie side by side"
        is_dense, strides = normed[0].is_contiguous(), list(normed.stride()[:3])
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    _norm_kernel[(triton.cdiv(num_cells, rows), batch)](
        source,
        source if bias is None else bias,
        source if residual is None else residual,
        source if weight is None else weight,
        source if summed is None else summed,
        source if normed is None else normed,
        num_cells,
        height * width,
        width,
        source.stride(0),
        0 if residual is None else residual.stride(0),
        0 if summed is None else summed.stride(0),
        *strides,
        eps,
        CHANNELS=channels,
        SOURCE_CELL=source_cell,
        BLOCK=block,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        NORM=weight is not None,
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
