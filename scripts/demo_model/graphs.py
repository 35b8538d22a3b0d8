"""CUDA graphs of a training step: the host issues one launch where it would issue thousands."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from demo_model.session import Session, logger

_WARM_UP_CALLS, _TIMED_CALLS = 3, 5


class RecordedFunction:
    """A function of tensors that is replayed for input shapes it was recorded with, and called for others.

    The function must not look at values on the host. What it adds to gradients it adds in every replay too.
    """

    def __init__(self, session: Session, stage: str, function: Callable[..., Tensor]) -> None:
        self.session, self.stage, self.function = session, stage, function
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result; it is overwritten by the next call with the same shapes."""
        recorded = self._graphs.get(_key(inputs))
        if recorded is None:
            return self.function(*inputs)
        graph, places, output = recorded
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return output

    def record(self, *inputs: Tensor) -> None:
        """Call a few times, then record for these shapes; where that fails, say why and go on without."""
        places = tuple(tensor.clone() for tensor in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(side)
        called_s = _seconds(lambda: self.function(*places))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.function(*places)
        except RuntimeError as error:
            logger.warning("%s step cannot be recorded: %s", self.stage, str(error)[:2000])
            return
        self._graphs[_key(inputs)] = (graph, places, output)
        shape = "x".join(map(str, inputs[0].shape))
        self.session.log(self.stage, recorded=shape, called_s=called_s, replayed_s=_seconds(graph.replay))


def _key(inputs: tuple[Tensor, ...]) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in inputs)


def _seconds(action: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(_TIMED_CALLS):
        action()
    torch.cuda.synchronize()
    return (time.monotonic() - start) / _TIMED_CALLS
