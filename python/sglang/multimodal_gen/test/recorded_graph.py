"""A stand-in for CUDA graphs on any device: operators are recorded as they run, and replayed over the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph:
    """Replays operators in order. As with a graph on a GPU no Python of the recorded function runs, inputs are read
    where they lay, and numbers that Python had computed stay what they were."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        for operator, args, kwargs, output in self.calls:
            places = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if operator._schema.is_mutable:  # type: ignore[attr-defined]
                operator(*args, **kwargs)
            elif not any(
                place.untyped_storage()._cdata == own.untyped_storage()._cdata for place in places for own in read
            ):
                found = [leaf for leaf in tree_leaves(operator(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for place, value in zip(places, found, strict=True):
                    place.copy_(value)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, output))
        return output


def record(run: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
    """The graph of what `run` does, and its output's place."""
    graph = RecordedGraph()
    with _Recorder(graph):
        output = run()
    return graph, output
