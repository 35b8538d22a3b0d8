"""Activations to fp8 and products in fp8 against what they stand for, in the sizes of real layers."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_checks.report import Report
from sglang.multimodal_gen.runtime.layers.linear import RowParallelLinear
from sglang.multimodal_gen.runtime.layers.quantization.products import (
    Quantization,
    QuantizedWeight,
    computes_in_fp8,
    reference_product,
)
from sglang.multimodal_gen.runtime.layers.quantization.rows import quantize_rows, reference_rows
from sglang.multimodal_gen.runtime.layers.quantization.schemes import Scheme

# Tokens, features in, features out: a large block, few tokens of a text, an odd number, one.
_SHAPES = ((4608, 3072, 12_288), (77, 3072, 3072), (1001, 1536, 8960), (1, 64, 48))
_PARTS = (3072, 12_288)
# Of the norm. Fast sums of fp8 products have some 14 bits; the result is rounded to bf16.
_TOLERANCE = 5e-3


def check_quantization(report: Report, device: torch.device) -> None:
    """One check for rows, for products of each granularity and dtype, and for parts side by side."""
    with report.check("activations to fp8: the kernel's bits") as result:
        wrong = sum(_wrong_values(tokens, features, device) for tokens, features, _ in (*_SHAPES, (9, 20_000, 0)))
        result.expect(wrong == 0, f"{wrong} values or scales other than the reference's", wrong=float(wrong))
    if not computes_in_fp8(device) and device.type == "cuda":
        report.note(f"{device} does not multiply in fp8")
        return
    for granularity in ("row", "tensor"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            with report.check(f"products in fp8, a scale for each {granularity}, {name}") as result:
                error = max(_product_error(*shape, granularity, dtype, device) for shape in _SHAPES)
                result.expect(error <= _TOLERANCE, f"relative error {error:.1e}", error=error)
    with report.check("products in fp8 of two parts side by side") as result:
        error = _parts_error(device)
        result.expect(error <= _TOLERANCE, f"relative error {error:.1e}", error=error)


def _drawn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _wrong_values(tokens: int, features: int, device: torch.device) -> int:
    source = _drawn(tokens, features, device=device, dtype=torch.bfloat16)
    found, expected = quantize_rows(source), reference_rows(source)
    values = (found.values.view(torch.uint8) != expected.values.view(torch.uint8)).sum()
    return int(values + (found.scales != expected.scales).sum())


def _product_error(
    tokens: int, features: int, outputs: int, granularity: str, dtype: torch.dtype, device: torch.device
) -> float:
    weight = Scheme("fp8", granularity).quantize(_drawn(outputs, features, device=device))
    source, bias = (_drawn(*size, device=device, dtype=dtype) for size in ((tokens, features), (outputs,)))
    found = QuantizedWeight(weight).linear(source, bias=bias)
    return _relative(found, reference_product(reference_rows(source), weight, bias, torch.float32))


def _parts_error(device: torch.device) -> float:
    """Of an input in two parts, of which the second takes GELU on the way."""
    layer = RowParallelLinear(sum(_PARTS), _PARTS[0], blocks=_PARTS).to(device, torch.bfloat16).requires_grad_(False)
    weight = Scheme("fp8").quantize(layer.weight)
    layer.quantize(*weight, Quantization(torch.bfloat16, scales_inputs=True))
    parts = [_drawn(2, 512, width, device=device, dtype=torch.bfloat16) for width in _PARTS]
    rows = reference_rows(*(part.flatten(0, 1) for part in parts), gelu_from=1)
    expected = reference_product(rows, weight, layer.bias, torch.float32).view(2, 512, -1)
    return _relative(layer.of_parts(*parts, gelu_from=1), expected)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())
