"""Activations to fp8 with a scale for each token, while the model runs: one pass over them on a GPU.

Shapes: N tokens, K features.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.quantization.schemes import FP8, scaled


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


def quantize_rows(tokens: Tensor) -> QuantizedRows:
    """[N, K] of any floating dtype; the largest number of each row becomes the largest of fp8."""
    if tokens.is_cuda and not torch.compiler.is_compiling() and _kernels() is not None:
        return QuantizedRows(*_kernels().quantize_rows(tokens))
    return reference_rows(tokens)


def reference_rows(tokens: Tensor) -> QuantizedRows:
    """What the kernel computes, in several passes."""
    wide = tokens.float()
    return QuantizedRows(*scaled(wide, wide.abs().amax(dim=1, keepdim=True), FP8))
