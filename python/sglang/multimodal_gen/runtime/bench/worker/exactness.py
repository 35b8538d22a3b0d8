"""How far outputs are from those of the same weights in fp32 throughout."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.bench.messages import OutputError
from sglang.multimodal_gen.runtime.loader.component_loader import DtypeOf
from sglang.multimodal_gen.runtime.loader.quantized_layers import LayerQuantizer
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer
from sglang.multimodal_gen.runtime.pipelines_core.workload import Inputs, Workload, WorkSize

_PIXEL_RANGE = 2.0  # from -1 to 1


@dataclass(frozen=True)
class SameWeights:
    """A ComponentSource: copies of the tensors that a module of ours has. One that is loaded from it has attention,
    products and graphs of its own, which a copy of the module would share or could not have in another precision."""

    module: nn.Module

    def tensors_for(
        self,
        directory: Path,
        module: nn.Module,
        *,
        dtype_of: DtypeOf,
        device: torch.device,
        quantizer: LayerQuantizer | None = None,
    ) -> dict[str, Tensor]:
        """See ComponentSource."""
        return {
            name: tensor.to(device, dtype_of(name) if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in self.module.state_dict().items()
        }

    def tokenizer(self, directory: Path) -> TextTokenizer:
        """See ComponentSource."""
        raise AssertionError("a module has none")


def exact_output(workload: Workload, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
    """What our module gives in fp32. The module stays as it is."""
    return output_in_fp32(workload, copy.deepcopy(module).float(), inputs, size)


def output_in_fp32(workload: Workload, wide: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
    """What a module of fp32 gives, of inputs in any precision."""
    exact = tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)
    with _without_tf32():
        return workload.forward(wide, exact, size)


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
