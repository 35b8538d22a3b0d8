"""Every attention kernel that loads here against the written-out reference, and every algorithm of products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_checks.report import Report
from sglang.multimodal_gen.runtime.layers.attention.dispatch import KernelReport, describe_kernels
from sglang.multimodal_gen.runtime.layers.attention.kernels import TorchReference
from sglang.multimodal_gen.runtime.layers.attention.registry import load_kernel
from sglang.multimodal_gen.runtime.layers.attention.traits import LayerNeeds
from sglang.multimodal_gen.runtime.layers.gemm_choice import shape_of, usual_product
from sglang.multimodal_gen.runtime.layers.gemm_kernels import CublasLt

# [B, S, L, H, E]: video self-attention, cross-attention to text, odd lengths, the demo model's head.
_SHAPES = ((1, 4096, 4096, 12, 128), (2, 1560, 512, 12, 128), (2, 577, 77, 3, 64))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative to the norm of the exact result: accumulated rounding of inputs, scores and output.
_TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 2e-3}
_LOSSY_TOLERANCE = 8e-2
# Tokens, in and out features, whether with a bias and GELU.
_PRODUCTS = (
    (4352, 3840, 11520, False, False),
    (4097, 2432, 9728, True, True),
    (1024, 3072, 12288, True, False),
    (32760, 1536, 1536, True, False),
)


def check_products(report: Report, device: torch.device) -> None:
    """Every algorithm that is worth measuring against the product in fp32, of shapes as transformers have them."""
    if device.type != "cuda":
        return
    library = CublasLt()
    for tokens, in_features, out_features, biased, gelu in _PRODUCTS:
        with report.check(f"products {tokens} x {in_features} to {out_features}") as result:
            inputs, weight = (
                torch.randn(rows, in_features, device=device, dtype=torch.bfloat16) for rows in (tokens, out_features)
            )
            bias = torch.randn(out_features, device=device, dtype=torch.bfloat16) if biased else None
            exact = usual_product(inputs.float(), weight.float(), None if bias is None else bias.float(), gelu=gelu)
            shape = shape_of(inputs, weight, bias, gelu=gelu)
            assert shape is not None, "it is worth a choice"
            gemms = [library.gemm(shape, algorithm) for algorithm in library.candidates(shape)]
            errors = [_relative(gemm(inputs, weight, bias), exact) for gemm in gemms]
            largest, limit = max(errors, default=math.inf), _TOLERANCE["bf16"]
            detail = f"relative error of {len(errors)} algorithms {largest:.1e}, at most {limit:.0e}"
            result.expect(largest <= limit, detail, error=largest)


def check_kernels(report: Report, device: torch.device) -> None:
    """One check per kernel and precision; those that cannot run are named with the reason."""
    for kernel in describe_kernels(device):
        if kernel.problem is not None:
            report.note(f"{kernel.name}: {kernel.problem}")
            continue
        for precision in kernel.traits.precisions:
            with report.check(f"attention {kernel.name} {precision}") as result:
                error = max(_error(kernel, precision, shape, device) for shape in _SHAPES)
                limit = _LOSSY_TOLERANCE if kernel.traits.lossy else _TOLERANCE[precision]
                result.expect(error <= limit, f"relative error {error:.1e}, at most {limit:.0e}", error=error)


def _error(kernel: KernelReport, precision: str, shape: tuple[int, int, int, int, int], device: torch.device) -> float:
    """The larger of the output's and the log-sum-exp's error; 0 for a shape that the kernel does not take."""
    batch, queries, keys, heads, head_dim = shape
    if kernel.traits.needs_obstacle(LayerNeeds(precision=precision, head_dim=head_dim)) is not None:
        return 0.0
    generator = torch.Generator("cpu").manual_seed(queries)
    query, key, value = (
        torch.randn(batch, length, heads, head_dim, generator=generator).to(device, _DTYPES[precision])
        for length in (queries, keys, keys)
    )
    exact = TorchReference().with_lse(query.float(), key.float(), value.float(), scale=head_dim**-0.5)
    function = load_kernel(kernel.name)
    error = _relative(function(query, key, value, scale=head_dim**-0.5), exact[0])
    if kernel.traits.gives_lse:
        output, lse = function.with_lse(query, key, value, scale=head_dim**-0.5)  # type: ignore[attr-defined]
        error = max(error, _relative(output, exact[0]), _relative(lse, exact[1]))
    return error


def _relative(got: Tensor, exact: Tensor) -> float:
    return ((got.float() - exact).norm() / exact.norm()).item()
