"""How much arithmetic a forward is, and how fast this machine multiplies matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.device_timing import timer_for
from sglang.multimodal_gen.runtime.loader.component_loader import without_memory

# Large enough that a GPU or a few cores are busy, small enough that a core is done in a second.
_MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
_MATMUL_RUNS = 3


def _product_flops(_: torch.Size, first: torch.Size, second: torch.Size, **options: object) -> int:
    """Of matrices, or of batches of them, by their shapes."""
    return 2 * math.prod(first) * second[-1]


# Products that are added to what is there, which torch does not count by itself.
_ADDED_IN_PLACE = {torch.ops.aten.addmm_: _product_flops, torch.ops.aten.baddbmm_: _product_flops}


def count_flops(module_class: type[nn.Module], config: ModelConfig, forward: Callable[[nn.Module], object]) -> int:
    """FLOPs of `forward(module)`: 2 for each multiply-add of matrix products and convolutions, padding counted.

    Counted on the meta device with torch's own attention, so the number is the work's and no kernel's.
    """
    module = without_memory(module_class, config, LayerContext()).to("meta").eval()
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=_ADDED_IN_PLACE) as counter:
        forward(module)
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product: the best of several, because clocks vary."""
    size = _MATMUL_SIZE[device.type]
    # Values matter: a GPU that multiplies zeros draws less power and clocks higher.
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    timer = timer_for(device)
    return 2 * size**3 / min(timer(lambda: a @ b) for _ in range(_MATMUL_RUNS))
