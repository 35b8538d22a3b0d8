"""The Triton kernel that quantises activations: each row is read, its largest number found, and its values written.

Its reference, and the choice between the two, are in `quantization/rows.py`. Shapes: N tokens, K features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(448.0)
# A row of so many features is held at once; of a longer one, which no model has yet, parts are read twice.
_MOST_FEATURES = 16_384


@triton.jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    tokens,
    values,
    scales,
    token_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its largest number by amount over that of fp8 is the scale, and the row over the scale its values."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    source = tokens + row * token_stride
    target = values + row * WIDTH
    if WIDTH <= BLOCK:
        wide = tl.load(source + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=0)
        scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, _LARGEST))
        held = tl.minimum(tl.maximum(tl.div_rn(wide, scale), -_LARGEST), _LARGEST)
        tl.store(target + columns, held.to(tl.float8e4nv), mask=columns < WIDTH)
    else:
        found = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            found = tl.maximum(found, tl.abs(tl.load(source + start + columns, mask=inside, other=0.0).to(tl.float32)))
        largest = tl.max(found, axis=0)
        scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, _LARGEST))
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            wide = tl.load(source + start + columns, mask=inside, other=0.0).to(tl.float32)
            held = tl.minimum(tl.maximum(tl.div_rn(wide, scale), -_LARGEST), _LARGEST)
            tl.store(target + start + columns, held.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(tokens: Tensor, *, most_features: int = _MOST_FEATURES) -> tuple[Tensor, Tensor]:
    """[N, K], features side by side -> values [N, K] in fp8 and scales [N, 1] in fp32; see `rows.quantize_rows`."""
    assert tokens.ndim == 2, "tokens of all rows one after the other"
    assert tokens.stride(1) == 1, "features lie side by side"
    num_tokens, width = tokens.shape
    values = torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn, device=tokens.device)
    scales = torch.empty(num_tokens, 1, dtype=torch.float32, device=tokens.device)
    block = min(triton.next_power_of_2(width), most_features)
    _quantize_rows_kernel[(num_tokens,)](
        tokens,
        values,
        scales,
        tokens.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=4 if block <= 4096 else 8,
    )
    return values, scales
