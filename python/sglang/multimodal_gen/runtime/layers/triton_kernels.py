"""Triton kernels for what surrounds the matrix products of a transformer block: one pass over the tokens each.

Their references, and the choice between the two, are in `fused.py`. Tokens are read and written in their own dtype and
computed in fp32. Shapes: B samples, S tokens, D hidden_size, H heads, E head_dim, G groups of tokens per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_norm_kernel(  # type: ignore[no-untyped-def]
    residual,
    update,
    gate,
    scale,
    shift,
    summed,
    normed,
    num_tokens,
    group_size,
    residual_batch,
    residual_token,
    update_batch,
    update_token,
    gate_batch,
    gate_group,
    scale_batch,
    scale_group,
    shift_batch,
    shift_group,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
    NORM_UPDATE: tl.constexpr,
):
    """ROWS neighbouring tokens of one group: residual + gate · update, and the norm of that times scale plus shift."""
    first = tl.program_id(0) * ROWS
    batch = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    group = first // group_size
    if HAS_GATE:
        gates = tl.load(gate + batch * gate_batch + group * gate_group + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + batch * scale_batch + group * scale_group + columns, mask=inside, other=0.0)
        factor = factor.to(tl.float32)
        if ONE_PLUS:
            factor += 1.0
    if HAS_SHIFT:
        offset = tl.load(shift + batch * shift_batch + group * shift_group + columns, mask=inside, other=0.0)
        offset = offset.to(tl.float32)
    for row in tl.static_range(ROWS):
        token = (first + row).to(tl.int64)
        here = residual + batch.to(tl.int64) * residual_batch + token * residual_token + columns
        stored = tl.load(here, mask=inside, other=0.0)
        value = stored.to(tl.float32)
        out = (batch.to(tl.int64) * num_tokens + token) * WIDTH + columns
        if HAS_UPDATE:
            there = update + batch.to(tl.int64) * update_batch + token * update_token + columns
            change = tl.load(there, mask=inside, other=0.0).to(tl.float32)
            if NORM_UPDATE:
                change *= tl.rsqrt(tl.sum(change * change, axis=0) / WIDTH + eps)
            if HAS_GATE:
                change *= gates
            value += change
            rounded = value.to(stored.dtype)
            tl.store(summed + out, rounded, mask=inside)
            # The norm sees what the next layer will see of the sum.
            value = rounded.to(tl.float32)
        if NORM:
            if not RMS:
                # What lies outside is zero, and must not count as far from the mean.
                value = tl.where(inside, value - tl.sum(value, axis=0) / WIDTH, 0.0)
            result = value * tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
            if HAS_SCALE:
                result *= factor
            if HAS_SHIFT:
                result += offset
            tl.store(normed + out, result.to(stored.dtype), mask=inside)


def sum_norm(
    residual: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    eps: float,
    one_plus: bool,
    norm: bool,
    rms: bool = False,
    norm_update: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `fused.sum_norm`; either result is `residual` where it is not asked for.

    Tokens [B, S, D] with neighbouring features; gate, scale and shift [B or 1, G, D], or [D].
    """
    batch, num_tokens, width = residual.shape
    parts = [_per_group(part) for part in (gate, scale, shift)]
    read = [tensor for tensor in (residual, update, *parts) if tensor is not None]
    assert all(tensor.stride(-1) == 1 for tensor in read), "features lie side by side"
    num_groups = max([1, *(part.shape[1] for part in parts if part is not None)])
    group_size = num_tokens // num_groups
    rows = next(rows for rows in (4, 2, 1) if group_size % rows == 0)
    summed = residual if update is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    normed = torch.empty_like(residual, memory_format=torch.contiguous_format) if norm else residual
    block = triton.next_power_of_2(width)
    strides = [stride for part in parts for stride in _strides(part, batch, num_groups)]
    change = residual if update is None else update
    _sum_norm_kernel[(num_tokens // rows, batch)](
        residual,
        change,
        *(residual if part is None else part for part in parts),
        summed,
        normed,
        num_tokens,
        group_size,
        residual.stride(0),
        residual.stride(1),
        change.stride(0),
        change.stride(1),
        *strides,
        eps,
        WIDTH=width,
        BLOCK=block,
        ROWS=rows,
        HAS_UPDATE=update is not None,
        HAS_GATE=gate is not None,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        ONE_PLUS=one_plus,
        NORM=norm,
        RMS=rms,
        NORM_UPDATE=norm_update,
        num_warps=max(4, min(16, block // 512)),
    )
    return summed, normed


def _per_group(part: Tensor | None) -> Tensor | None:
    return part if part is None or part.ndim == 3 else part.view(1, 1, -1)


def _strides(part: Tensor | None, batch: int, num_groups: int) -> tuple[int, int]:
    """By sample and by group, zero where one value is for all of them."""
    if part is None:
        return 0, 0
    return part.stride(0) if part.shape[0] > 1 else 0, part.stride(1) if part.shape[1] > 1 else 0


@triton.jit
def _norm_rotate_kernel(  # type: ignore[no-untyped-def]
    source,
    other_source,
    weight,
    other_weight,
    table,
    target,
    other_target,
    source_batch,
    source_token,
    table_batch,
    table_token,
    table_head,
    target_batch,
    target_token,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    ROTATE: tl.constexpr,
    TABLE_HEADS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The heads of one token, and with two PARTS the other's, which share the table: root-mean-square norm over each
    (or over all, WIDE) and rotation of neighbours."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    heads = tl.arange(0, HEAD_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    inside = (heads[:, None] < HEADS) & (dims[None, :] < HEAD_DIM)
    place = heads[:, None] * HEAD_DIM + dims[None, :]
    if ROTATE:
        angles = table + batch * table_batch + token * table_token
        pair = tl.arange(0, DIM_BLOCK // 2)
        turns = pair[None, :] < HEAD_DIM // 2
        if TABLE_HEADS:
            angles = angles + heads[:, None] * table_head + pair[None, :] * 2
            turns = turns & (heads[:, None] < HEADS)
        else:
            angles = angles + pair[None, :] * 2
        cosine = tl.load(angles, mask=turns, other=1.0)
        sine = tl.load(angles + 1, mask=turns, other=0.0)
    for part in tl.static_range(PARTS):
        origin, scales, goal = source, weight, target
        if part == 1:
            origin, scales, goal = other_source, other_weight, other_target
        stored = tl.load(origin + batch * source_batch + token * source_token + place, mask=inside, other=0.0)
        value = stored.to(tl.float32)
        if NORM:
            squares = tl.sum(value * value, axis=1)
            if WIDE:
                value *= tl.rsqrt(tl.sum(squares, axis=0) / (HEADS * HEAD_DIM) + eps)
                value *= tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
            else:
                value *= tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
                value *= tl.load(scales + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
        if ROTATE:
            real, imaginary = tl.split(tl.reshape(value, (HEAD_BLOCK, DIM_BLOCK // 2, 2)))
            value = tl.reshape(
                tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine), (HEAD_BLOCK, DIM_BLOCK)
            )
        tl.store(goal + batch * target_batch + token * target_token + place, value.to(stored.dtype), mask=inside)


def norm_rotate(
    sources: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    table: Tensor | None,
    targets: Sequence[Tensor],
    *,
    eps: float,
    wide: bool,
) -> None:
    """One or two of [B, S, H, E] -> `targets` of that shape, which may be the sources: normed with `weights` [E]
    (`wide`: [H·E], over all heads), then rotated by `table` [1 or B, S, 1 or H, E/2, 2]. The heads of a token lie side
    by side in all of them, and both sources are laid out alike, and both targets."""
    (source, *_), (target, *_) = sources, targets
    batch, num_tokens, heads, head_dim = source.shape
    for like, tensors in ((source, sources), (target, targets)):
        assert all(tensor.stride() == like.stride() for tensor in tensors), "both are laid out alike"
        assert like.stride()[2:] == (head_dim, 1), "heads lie side by side"
    rotation: Any = source if table is None else table
    factors = sources if weights is None else weights
    by_batch, by_token, by_head = (0, 0, 0) if table is None else table.stride()[:3]
    _norm_rotate_kernel[(num_tokens, batch)](
        source,
        sources[-1],
        factors[0],
        factors[-1],
        rotation,
        target,
        targets[-1],
        source.stride(0),
        source.stride(1),
        by_batch if table is not None and table.shape[0] > 1 else 0,
        by_token,
        by_head,
        target.stride(0),
        target.stride(1),
        eps,
        HEADS=heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(heads),
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        NORM=weights is not None,
        WIDE=wide,
        ROTATE=table is not None,
        TABLE_HEADS=table is not None and table.shape[2] > 1,
        PARTS=len(sources),
        num_warps=max(1, min(8, triton.next_power_of_2(heads) * triton.next_power_of_2(head_dim) // 512)),
    )


@triton.jit
def _gated_silu_kernel(  # type: ignore[no-untyped-def]
    gate, value, target, gate_token, value_token, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """SiLU of one, times the other, of a part of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    stored = tl.load(gate + token * gate_token + columns, mask=inside, other=0.0)
    gates = stored.to(tl.float32)
    product = gates * tl.sigmoid(gates) * tl.load(value + token * value_token + columns, mask=inside).to(tl.float32)
    tl.store(target + token * WIDTH + columns, product.to(stored.dtype), mask=inside)


def gated_silu(gate: Tensor, value: Tensor) -> Tensor:
    """[..., D] twice, each token's numbers side by side -> SiLU(gate) · value."""
    width = gate.shape[-1]
    gates, values = gate.reshape(-1, width), value.reshape(-1, width)
    target = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = min(2048, triton.next_power_of_2(width))
    _gated_silu_kernel[(len(gates), triton.cdiv(width, block))](
        gates, values, target, gates.stride(0), values.stride(0), WIDTH=width, BLOCK=block, num_warps=4
    )
    return target
