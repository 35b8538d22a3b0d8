"""The Triton kernel that quantises activations: each row is read, its largest number found, and its values written.

Its reference, and the choice between the two, are in `quantization/rows.py`. Shapes: N tokens, K features of all parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.quantization.schemes import FP8, LARGEST, SMALLEST_ROW

_LARGEST, _SMALLEST_ROW = tl.constexpr(LARGEST[FP8]), tl.constexpr(SMALLEST_ROW)
_MOST_PARTS = 3
# A row is held at once; longer ones would not fit into registers. No model has any.
_MOST_FEATURES = 65_536


@triton.jit
def _read(source, columns, WIDTH: tl.constexpr, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """A part of the row in fp32, and zeros behind it; the sigmoid is another way to write the tanh form of GELU."""
    wide = tl.load(source + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if GELU:
        wide *= tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))
    return wide


@triton.jit
def _write(target, columns, wide, inverse, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    held = tl.minimum(tl.maximum(wide * inverse, -_LARGEST), _LARGEST)
    tl.store(target + columns, held.to(tl.float8e4nv), mask=columns < WIDTH)


@triton.jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    first,
    second,
    third,
    values,
    scales,
    first_stride,
    second_stride,
    third_stride,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    SECOND_BLOCK: tl.constexpr,
    THIRD_BLOCK: tl.constexpr,
    GELU_FROM: tl.constexpr,
):
    """One row: its largest number by amount over that of fp8 is the scale; values are the row times its reciprocal."""
    row = tl.program_id(0).to(tl.int64)
    target = values + row * (FIRST + SECOND + THIRD)
    here = tl.arange(0, FIRST_BLOCK)
    wide = _read(first + row * first_stride, here, FIRST, GELU_FROM <= 0)
    largest = tl.max(tl.abs(wide), axis=0)
    if SECOND > 0:
        there = tl.arange(0, SECOND_BLOCK)
        second_wide = _read(second + row * second_stride, there, SECOND, GELU_FROM <= 1)
        largest = tl.maximum(largest, tl.max(tl.abs(second_wide), axis=0))
    if THIRD > 0:
        yonder = tl.arange(0, THIRD_BLOCK)
        third_wide = _read(third + row * third_stride, yonder, THIRD, GELU_FROM <= 2)
        largest = tl.maximum(largest, tl.max(tl.abs(third_wide), axis=0))
    scale = tl.div_rn(tl.maximum(largest, _SMALLEST_ROW), _LARGEST)
    inverse = tl.div_rn(1.0, scale)
    _write(target, here, wide, inverse, FIRST)
    if SECOND > 0:
        _write(target + FIRST, there, second_wide, inverse, SECOND)
    if THIRD > 0:
        _write(target + FIRST + SECOND, yonder, third_wide, inverse, THIRD)
    tl.store(scales + row, scale)


def serves(parts: Sequence[Tensor]) -> bool:
    """Whether the kernel is for so many parts of these widths."""
    return len(parts) <= _MOST_PARTS and sum(_block(part.shape[1]) for part in parts) <= _MOST_FEATURES


def quantize_rows(parts: Sequence[Tensor], *, gelu_from: int) -> tuple[Tensor, Tensor]:
    """Parts [N, K_i], features side by side -> values [N, K] in fp8 and scales [N, 1] in fp32; see
    `rows.quantize_rows`."""
    assert serves(parts), "the kernel is for these parts"
    assert all(part.ndim == 2 and part.stride(1) == 1 for part in parts), "tokens in rows, features side by side"
    num_tokens, widths = len(parts[0]), [part.shape[1] for part in parts]
    values = torch.empty(num_tokens, sum(widths), dtype=torch.float8_e4m3fn, device=parts[0].device)
    scales = torch.empty(num_tokens, 1, dtype=torch.float32, device=parts[0].device)
    absent = _MOST_PARTS - len(parts)
    blocks = [_block(width) for width in widths]
    _quantize_rows_kernel[(num_tokens,)](
        *parts,
        *(parts[0],) * absent,
        values,
        scales,
        *(part.stride(0) for part in parts),
        *(0,) * absent,
        *widths,
        *(0,) * absent,
        *blocks,
        *(1,) * absent,
        GELU_FROM=gelu_from,
        num_warps=next((warps for warps, most in ((4, 4096), (8, 16_384)) if sum(blocks) <= most), 16),
    )
    return values, scales


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))
