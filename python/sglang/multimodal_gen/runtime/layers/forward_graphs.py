"""A transformer's forward as a CUDA graph: where it is short, the host takes as long to begin its kernels as the GPU to
run them, and a graph begins all of them at once.

What a graph reads must lie where it lay when it was captured. So inputs are copied to a place of their own, which
graphs of one transformer share where shapes are equal, tables are kept (`table_cache`), and whatever else a forward
depends on is part of the graph's key.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.cost_model import MOST_GRAPHED_TOKENS
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRunner
from sglang.multimodal_gen.runtime.layers.table_cache import tables_kept
from sglang.multimodal_gen.runtime.layers.token_sharding import TokenSharding

MOST_GRAPHS = 16
"""Of one transformer; those not used for longest go first."""
LEFT_ALONE = 512
"""For how many forwards a graph is not used before another may take its place. Capturing takes as long as several short
forwards, so of more shapes in turns than there may be graphs, some run without."""
MOST_INPUT_BYTES = 256 * 2**20
"""Of a forward that is captured. One that is given more, such as keys and values of texts, has blocks that compute for
longer than the host takes to begin them."""
_MOST_KEYS = 256

logger = logging.getLogger(__name__)


class Graph(Protocol):
    """A forward that was captured."""

    def replay(self) -> None:
        """Run it again over the same memory."""
        ...


class _CudaGraph:
    """One on a GPU."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.replay = graph.replay


class CudaCapture:
    """Captures on a GPU. All graphs of a process share memory, since one runs after another."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[_CudaGraph] = weakref.WeakSet()
        self._held_bytes = 0
        self._pool: Any = None

    @property
    def held_bytes(self) -> int:
        """What the graphs that there are keep from others; nothing once the last has gone."""
        return self._held_bytes if len(self._alive) else 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """The graph of what `run` does, and where its output lies; nothing has been computed yet."""
        if not len(self._alive):
            # The memory of graphs that have gone cannot be taken up again.
            self._pool, self._held_bytes = torch.cuda.graph_pool_handle(), 0
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that watches collectives, may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._held_bytes += max(0, torch.cuda.memory_reserved() - before)
        captured = _CudaGraph(graph)
        self._alive.add(captured)
        return captured, output


cuda_capture = CudaCapture()
"""That of this process."""


@dataclass
class _Captured:
    graph: Graph
    inputs: tuple[Tensor, ...]
    output: Tensor
    kept: tuple[object, ...]
    last_used: int = 0


class ForwardGraphs:
    """In place of a module's `forward`: the same, from the second call with inputs of the same shapes on by a graph.

    Forwards with more than MOST_GRAPHED_TOKENS tokens or MOST_INPUT_BYTES, with gradients, under a compiler, with step
    caches, which decide by what they compute, or adapters, and those of which no graph can be made, run as they always
    do.
    """

    def __init__(self, module: nn.Module, capture: Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]) -> None:
        """Raises AttributeError for a module that does not say how its tokens are dealt and its blocks run."""
        self._name = type(module).__name__
        self._forward: Callable[..., Tensor] = module.forward
        self._tokens: TokenSharding = module.tokens  # type: ignore[assignment]
        self._runner: BlockRunner = module.block_runner  # type: ignore[assignment]
        self._attentions = [layer for layer in module.modules() if isinstance(layer, Attention)]
        self._capture = capture
        self.failure: str | None = None
        """Why no graph could be made of a forward, the last time that this was so."""
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._num_forwards = 0
        self._is_short: OrderedDict[Hashable, bool] = OrderedDict()  # by key that was seen
        # As long as a graph has them: one runs after another, so those of equal shapes need one place.
        self._places: weakref.WeakValueDictionary[Hashable, Tensor] = weakref.WeakValueDictionary()

    @property
    def num_graphs(self) -> int:
        """How many there are now."""
        return len(self._graphs)

    @property
    def input_bytes(self) -> int:
        """What the places of inputs take."""
        return sum(place.nbytes for place in self._places.values())

    def clear(self) -> None:
        """Forget all graphs; before the processes of a replica part, since graphs hold on to their connections."""
        self._graphs.clear()
        self._is_short.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module's forward returns."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._runner.is_plain:
            return self._forward(*args, **kwargs)
        inputs: list[Tensor] = []
        try:
            structure = _taken_apart((args, kwargs), inputs)
            key = (structure, tuple(id(layer.kernel) for layer in self._attentions))
            is_short = self._is_short.get(key)
        except TypeError:  # an input that cannot be compared with those of other calls
            return self._forward(*args, **kwargs)
        if is_short is None:
            output = self._forward(*args, **kwargs)
            self._note(key, output.shape[0], sum(tensor.nbytes for tensor in inputs))
            return output
        self._num_forwards += 1
        if is_short and key not in self._graphs and self._has_room():
            self._add(key, args, kwargs, inputs)
        captured = self._graphs.get(key)
        if captured is None:
            return self._forward(*args, **kwargs)
        self._graphs.move_to_end(key)
        captured.last_used = self._num_forwards
        for place, tensor in zip(captured.inputs, inputs, strict=True):
            place.copy_(tensor)
        captured.graph.replay()
        return captured.output.clone()

    def _note(self, key: Hashable, num_rows: int, input_bytes: int) -> None:
        """That there was such a forward, which has left its segments' lengths behind."""
        held = num_rows * sum(map(self._tokens.share, self._tokens.lengths))
        self._is_short[key] = held <= MOST_GRAPHED_TOKENS and input_bytes <= MOST_INPUT_BYTES
        if len(self._is_short) > _MOST_KEYS:
            self._is_short.popitem(last=False)

    def _has_room(self) -> bool:
        longest_ago = next(iter(self._graphs.values()), None)
        if longest_ago is None or len(self._graphs) < MOST_GRAPHS:
            return True
        return self._num_forwards - longest_ago.last_used > LEFT_ALONE

    def _add(self, key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> None:
        places = self._placed(inputs)
        own_args, own_kwargs = _put_together((args, kwargs), iter(places))
        try:
            with tables_kept() as kept:
                graph, output = self._capture(lambda: self._forward(*own_args, **own_kwargs))
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            logger.warning("a forward of %s stays without a CUDA graph: %s", self._name, reason)
            self._is_short[key], self.failure = False, reason
            return
        self._graphs[key] = _Captured(graph, places, output, tuple(kept))
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _placed(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each input where graphs read it: in the n-th place of its shape, made if there is none."""
        counts: Counter[Hashable] = Counter()
        found = []
        for tensor in inputs:
            kind = (tensor.shape, tensor.dtype, tensor.device)
            key, place = (kind, counts[kind]), self._places.get((kind, counts[kind]))
            counts[kind] += 1
            if place is None:
                place = self._places[key] = tensor.clone(memory_format=torch.contiguous_format)
            else:
                place.copy_(tensor)
            found.append(place)
        return tuple(found)


def use_forward_graphs(module: nn.Module) -> None:
    """Let a transformer on a GPU run by graphs where its forwards are short."""
    module.forward = ForwardGraphs(module, cuda_capture)


def graphs_of(module: nn.Module) -> ForwardGraphs | None:
    """Those that a module runs by; None without."""
    return module.forward if isinstance(module.forward, ForwardGraphs) else None


def forget_graphs(modules: Iterable[object]) -> None:
    """Those of all modules among these; they are made again when they are missed."""
    for graphs in _all_graphs(modules):
        graphs.clear()


def graph_input_bytes(modules: Iterable[object]) -> int:
    """What is kept for the inputs of all graphs of these modules."""
    return sum(graphs.input_bytes for graphs in _all_graphs(modules))


def _all_graphs(modules: Iterable[object]) -> Iterator[ForwardGraphs]:
    for module in modules:
        graphs = graphs_of(module) if isinstance(module, nn.Module) else None
        if graphs is not None:
            yield graphs


def _taken_apart(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a value is made of, apart from the numbers in its tensors, which are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor, tuple(value.shape), value.dtype, value.device
    if isinstance(value, tuple | list):
        return type(value), tuple(_taken_apart(each, tensors) for each in value)
    if isinstance(value, dict):
        return dict, tuple((name, _taken_apart(each, tensors)) for name, each in value.items())
    hash(value)
    return type(value), value


def _put_together(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same value with these tensors in place of its own."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        parts = [_put_together(each, tensors) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: _put_together(each, tensors) for name, each in value.items()}
    return value
