"""What layers held before adapters became part of their weights: on the host, bit for bit, until it is back."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.host_weights import host_memory
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear
from sglang.multimodal_gen.runtime.pipelines_core.memory import free_bytes

logger = logging.getLogger(__name__)

# Pinned memory cannot be swapped out, so some must be left to everybody else.
_HOST_SHARE = 0.5
_ALIGNMENT = 64


class OriginalWeights:
    """Copies of weights and biases by layer.

    Those of layers on a GPU lie in pinned memory where the host has enough of it: another adapter begins from them each
    time, and from there they come eight times as fast. Pinning takes longer than merging, so they stay until `clear`,
    also when all layers are as they were.
    """

    def __init__(self) -> None:
        self._kept: dict[AdaptableLinear, tuple[Tensor, Tensor | None]] = {}
        self._changed: set[AdaptableLinear] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, layers: Iterable[AdaptableLinear]) -> None:
        """Copy what these hold, where it is not kept yet: it is the checkpoint's."""
        new = [layer for layer in layers if layer not in self._kept]
        tensors = [tensor.detach() for layer in new for tensor in (layer.weight, layer.bias) if tensor is not None]
        copies = iter(_on_host(tensors))
        for layer in new:
            self._kept[layer] = next(copies), None if layer.bias is None else next(copies)

    def of(self, layer: AdaptableLinear) -> tuple[Tensor, Tensor | None]:
        """The checkpoint's weight and bias, on the host; the layer is about to hold others."""
        self._changed.add(layer)
        return self._kept[layer]

    def restore(self, *, but: Collection[AdaptableLinear] = ()) -> None:
        """Every layer that holds another weight gets its own again, except these."""
        for layer in self._changed.difference(but):
            weight, bias = self._kept[layer]
            layer.weight.data.copy_(weight, non_blocking=True)
            if bias is not None:
                layer.bias.data.copy_(bias, non_blocking=True)
        self._changed.intersection_update(but)

    def clear(self) -> None:
        """Restore all, and keep nothing."""
        self.restore()
        self._kept.clear()


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in one piece of memory; those of a GPU are on their way there, in order with what it computes."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    memory = memory_for(sum(sizes), pin=any(tensor.is_cuda for tensor in tensors))
    copies = []
    for tensor, part in zip(tensors, memory.split(sizes), strict=True):
        copies.append(part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        copies[-1].copy_(tensor, non_blocking=True)
    return copies


def memory_for(num_bytes: int, *, pin: bool) -> Tensor:
    """Bytes of the host [num_bytes], pinned if that is wished and possible."""
    if pin and num_bytes <= _HOST_SHARE * free_bytes(torch.device("cpu")):
        try:
            return host_memory(num_bytes, pin=True)
        except (OSError, RuntimeError) as error:  # the system has a limit of its own
            logger.warning("weights that adapters change are kept in memory that is not pinned: %s", error)
    return host_memory(num_bytes, pin=False)
