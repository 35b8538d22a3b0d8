"""Products with the weight of a linear layer, whether it is quantised or not.

A layer says its `matrix`: its weight as it is, its dequantised weight where a chip or a format computes with that, or a
QuantizedWeight, whose products are of activations in fp8.

Shapes: `...` any, N tokens, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.gemm_choice import chosen_product
from sglang.multimodal_gen.runtime.layers.quantization.rows import QuantizedRows, quantize_rows
from sglang.multimodal_gen.runtime.layers.quantization.schemes import FP8, QuantizedTensors

SCALE_NAME = "weight_scale"
"""The parameter that holds a quantised weight's scales, beside `weight`, which holds its values."""
_FP8_CAPABILITY, _ROW_SCALES_CAPABILITY = (8, 9), (9, 0)
_FP8_MULTIPLE = 16
"""Products in fp8 are of so many features, or a multiple."""
# Sums of fp8 products in fewer bits than fp32 has; on Hopper the other way is half as fast.
_FAST_SUMS = True


@dataclass(frozen=True)
class Quantization:
    """How a layer whose `weight` and `weight_scale` are quantised computes: in which dtype its inputs and outputs are,
    and whether with activations in fp8 too."""

    dtype: torch.dtype
    scales_inputs: bool = False

    def matrix(self, values: Tensor, scales: Tensor) -> Matrix:
        """What to multiply with."""
        quantized = QuantizedTensors(values, scales)
        return QuantizedWeight(quantized) if self.scales_inputs else quantized.dequantized(self.dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, I] in fp8 that multiplies activations, which it quantises token by token."""

    tensors: QuantizedTensors

    def linear(
        self, *parts: Tensor, bias: Tensor | None, gelu_from: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """[..., I_k], which would stand side by side, -> [..., O] in the inputs' dtype; in `out` [N, O] where given.

        `gelu_from`: the tanh-GELU of the parts from this one on.
        """
        rows = quantize_rows(*(part.reshape(-1, part.shape[-1]) for part in parts), gelu_from=gelu_from)
        hidden_states = parts[0]
        dtype = hidden_states.dtype
        if dtype == torch.bfloat16 and _has_row_scales(hidden_states.device):
            scales = self.tensors.scales.expand(self.tensors.values.shape[0], 1)
            product = torch._scaled_mm(
                rows.values,
                self.tensors.values.t(),
                scale_a=rows.scales,
                scale_b=scales.t().contiguous() if scales.stride(0) == 0 else scales.t(),
                bias=bias,
                out_dtype=dtype,
                use_fast_accum=_FAST_SUMS,
                out=out,
            )
        else:
            product = scaled_afterwards(rows, self.tensors, bias, dtype)
            product = product if out is None else out.copy_(product)
        return product.view(*hidden_states.shape[:-1], -1)

    def chunk(self, count: int) -> list[QuantizedWeight]:
        """At most so many parts of the outputs."""
        values, scales = self.tensors
        parts = values.chunk(count)
        of_parts = scales.chunk(count) if self.tensors.by_row else [scales] * len(parts)
        return [QuantizedWeight(QuantizedTensors(*part)) for part in zip(parts, of_parts, strict=True)]


Matrix = Tensor | QuantizedWeight
"""A weight [O, I] as products take it."""


def multiply(hidden_states: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """A linear layer's product: [..., I] -> [..., O]."""
    if not isinstance(matrix, Tensor):
        return matrix.linear(hidden_states, bias=bias)
    product = chosen_product(hidden_states, matrix, bias)
    return F.linear(hidden_states, matrix, bias) if product is None else product


def multiply_into(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The product of a weight as it is: [N, I], [O, I] and [O] into [N, O]; without gradients."""
    if chosen_product(inputs, weight, bias, out=out) is None:
        if bias is None:
            torch.mm(inputs, weight.t(), out=out)
        else:
            torch.addmm(bias, inputs, weight.t(), out=out)


def scaled_afterwards(rows: QuantizedRows, weight: QuantizedTensors, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product [N, O] of the values, and then both scales: where the chip or the dtype has no scales by row."""
    one = torch.ones((), device=rows.values.device)
    product = torch._scaled_mm(
        rows.values, weight.values.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=_FAST_SUMS
    )
    product.mul_(rows.scales).mul_(weight.scales.t())
    return (product if bias is None else product.add_(bias)).to(dtype)


def reference_product(rows: QuantizedRows, weight: QuantizedTensors, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What either product in fp8 computes, in fp32: [N, O]."""
    product = (rows.values.float() * rows.scales) @ (weight.values.float() * weight.scales).t()
    return (product if bias is None else product + bias.float()).to(dtype)


@cache
def computes_in_fp8(device: torch.device) -> bool:
    """Whether the device multiplies matrices in fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


@cache
def _has_row_scales(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _ROW_SCALES_CAPABILITY


def fits_fp8(values: Tensor) -> bool:
    """Whether a chip that computes in fp8 can do so with these values [O, I] of a weight."""
    return values.dtype == FP8 and all(size % _FP8_MULTIPLE == 0 for size in values.shape)


def computing_dtype(layer: nn.Linear) -> torch.dtype:
    """Of a layer's inputs and outputs, whatever its weight is stored in."""
    quantization: Quantization | None = getattr(layer, "quantization", None)
    return layer.weight.dtype if quantization is None else quantization.dtype
