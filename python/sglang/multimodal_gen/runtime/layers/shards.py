"""Which part of a checkpoint's tensor a tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An equal part of each of `blocks`, the widths that lie side by side along `dim` of the whole tensor."""

    dim: int
    blocks: tuple[int, ...]
    axis: ProcessAxis

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor whose part has this shape."""
        return (*shape[: self.dim], sum(self.blocks), *shape[self.dim + 1 :])

    def pieces(self) -> tuple[tuple[int, int], ...]:
        """This rank's part of each block: where it begins along `dim` of the whole tensor, and how long it is."""
        begins = accumulate(self.blocks, initial=0)
        return tuple(
            (begin + self.axis.rank * width // self.axis.size, width // self.axis.size)
            for begin, width in zip(begins, self.blocks, strict=False)
        )

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part, contiguous; a view where it can be."""
        parts = [whole.narrow(self.dim, begin, length) for begin, length in self.pieces()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)).contiguous()


@runtime_checkable
class Sharded(Protocol):
    """A layer that holds parts of its parameters."""

    def shards(self) -> Mapping[str, Shard]:
        """By the parameter's name in this layer."""
        ...


def shards_of(module: nn.Module) -> dict[str, Shard]:
    """By dotted name, of all layers that share with other ranks; a layer that has two names comes twice."""
    return {
        f"{path}.{name}" if path else name: shard
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, Sharded)
        for name, shard in layer.shards().items()
        if shard.axis.size > 1
    }


def whole_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of each tensor of the module's state, by dotted name, whatever part of it this rank holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return shapes | {name: shard.whole_shape(shapes[name]) for name, shard in shards_of(module).items()}
