"""How far outputs are from those of the same weights in fp32 throughout."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.bench.messages import OutputError
from sglang.multimodal_gen.runtime.pipelines_core.workload import Inputs, Workload, WorkSize

_PIXEL_RANGE = 2.0  # from -1 to 1


def exact_output(workload: Workload, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
    """What our module gives in fp32. The module stays as it is."""
    wide = copy.deepcopy(module).float()
    with _without_tf32():
        return workload.forward(wide, tuple(tensor.float() for tensor in inputs), size)


def output_error(output: Tensor, exact: Tensor, *, of_pixels: bool) -> OutputError:
    """How far an output is from the exact one, of the same shape."""
    assert output.shape == exact.shape, "the same work"
    difference = (output.float() - exact).square_()
    psnr_db = None
    if of_pixels and (mean := difference.mean().item()) > 0:
        psnr_db = 10 * math.log10(_PIXEL_RANGE**2 / mean)
    return OutputError(relative=math.sqrt(difference.sum().item()) / exact.norm().item(), psnr_db=psnr_db)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """On GPUs fp32 products and convolutions are of fp32 meanwhile."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
