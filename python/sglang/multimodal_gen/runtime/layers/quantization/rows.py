"""Activations to fp8 with a scale for each token, while the model runs: one pass over them on a GPU.

Shapes: N tokens, K features of all parts.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.quantization.schemes import FP8, LARGEST, SMALLEST_ROW


class QuantizedRows(NamedTuple):
    """Values [N, K] in fp8 and scales [N, 1] in fp32."""

    values: Tensor
    scales: Tensor


@cache
def _kernels() -> Any:
    """The module with the kernel; None where Triton is not installed."""
    try:
        from sglang.multimodal_gen.runtime.layers import triton_quantization  # late: it imports Triton
    except ImportError:
        return None
    return triton_quantization


def quantize_rows(*parts: Tensor, gelu_from: int | None = None) -> QuantizedRows:
    """Parts [N, K_i] of any floating dtype, side by side; the largest number of each row becomes the largest of fp8.

    `gelu_from`: from this part on, of which it is the tanh-GELU.
    """
    if parts[0].is_cuda and not torch.compiler.is_compiling() and _kernels() is not None and _kernels().serves(parts):
        return QuantizedRows(*_kernels().quantize_rows(parts, gelu_from=len(parts) if gelu_from is None else gelu_from))
    return reference_rows(*parts, gelu_from=gelu_from)


def reference_rows(*parts: Tensor, gelu_from: int | None = None) -> QuantizedRows:
    """What the kernel computes, in several passes."""
    plain = len(parts) if gelu_from is None else gelu_from
    wide = [part.float() for part in parts]
    wide = [part if number < plain else F.gelu(part, approximate="tanh") for number, part in enumerate(wide)]
    row = torch.cat(wide, dim=1) if len(wide) > 1 else wide[0]
    largest, limit = row.abs().amax(dim=1, keepdim=True), LARGEST[FP8]
    # Over a tensor: GPUs multiply with the reciprocal of a number, which rounds twice.
    scales = largest.clamp_min(SMALLEST_ROW) / torch.full_like(largest, limit)
    # Multiplied with one reciprocal for each row: dividing each number takes a GPU twice as long as all the rest.
    return QuantizedRows((row * scales.reciprocal()).clamp_(-limit, limit).to(FP8), scales)
