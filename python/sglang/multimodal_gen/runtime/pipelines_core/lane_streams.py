"""Where the lanes of a tick run on a GPU: denoising in the main stream, texts and frames of other requests beside it.

The order of a tick is denoising first, then what runs beside it. The rules that keep results what they are in one
stream:

- What runs beside waits for the main stream as it was before this tick's denoising, on which nothing of its own
  requests is; where that denoising made tables that layers keep, it waits for all of it.
- A request's denoising waits for what ran beside for it; where that made tables, whoever denoises next does.
- A stream's memory is given to its next kernels as soon as the host lets go of it, though the other stream may still
  read it. So all that a tick's requests hold, and all tables that it met, are kept until both streams are through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from sglang.multimodal_gen.configs.request_plan import Lane
from sglang.multimodal_gen.runtime.layers.table_cache import num_tables_made, tables_kept
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req


class Streams(Protocol):
    """The two of a device. Events are what the one gives and the other waits for."""

    def main_event(self) -> Any:
        """Behind all that was given to the main stream so far."""
        ...

    def side_event(self) -> Any:
        """Behind all that was given to the other one."""
        ...

    def main_waits(self, event: Any) -> None:
        """What comes next in the main stream begins after this."""
        ...

    def side_waits(self, event: Any) -> None:
        """What comes next in the other one does."""
        ...

    def beside(self) -> AbstractContextManager[Any]:
        """What is computed within goes to the other one."""
        ...


class CudaStreams:
    """Of a GPU. The main one is the current one of whoever makes this."""

    def __init__(self, device: torch.device) -> None:
        self._main, self._side = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def main_event(self) -> torch.cuda.Event:
        """See Streams."""
        return self._main.record_event()

    def side_event(self) -> torch.cuda.Event:
        """See Streams."""
        return self._side.record_event()

    def main_waits(self, event: torch.cuda.Event) -> None:
        """See Streams."""
        self._main.wait_event(event)

    def side_waits(self, event: torch.cuda.Event) -> None:
        """See Streams."""
        self._side.wait_event(event)

    def beside(self) -> AbstractContextManager[Any]:
        """See Streams."""
        return torch.cuda.stream(self._side)


class LaneStreams:
    """Of one pipeline. Without `streams` everything runs where it is called."""

    def __init__(self, streams: Streams | None = None) -> None:
        self._streams = streams
        self._opened: Any = None
        self._last: Any = None
        self._is_beside = False
        self._num_tables = 0
        self._left_tables = False
        self._pending: dict[str, Any] = {}

    @property
    def are_two(self) -> bool:
        """Whether there is a stream beside the main one."""
        return self._streams is not None

    @contextmanager
    def tick(self, requests: Sequence[Req], *, beside: bool) -> Iterator[list[Any]]:
        """Around the lanes of one, of these requests: what is to be kept until the device is through with it. `beside`:
        texts and frames may run beside its denoising."""
        if self._streams is None:
            yield []
            return
        self._is_beside = beside
        if not beside:
            self.join()
        self._opened, self._num_tables = self._streams.main_event(), num_tables_made()
        kept: list[Any] = [(vars(req).copy(), dict(req.conditioning)) for req in requests]
        with tables_kept() as tables:
            yield kept
        kept.append(tables)

    def lane(self, lane: Lane, requests: Sequence[Req]) -> AbstractContextManager[None]:
        """Around the units of one lane, for these requests; denoising comes first."""
        if self._streams is None:
            return nullcontext()
        return self._denoising(requests) if lane == "denoise" else self._beside(requests)

    @contextmanager
    def _denoising(self, requests: Sequence[Req]) -> Iterator[None]:
        assert self._streams is not None, "there are two"
        events = [event for req in requests if (event := self._pending.pop(req.request_id, None)) is not None]
        if self._left_tables:
            self.join()
        for event in events:
            self._streams.main_waits(event)
        yield

    @contextmanager
    def _beside(self, requests: Sequence[Req]) -> Iterator[None]:
        if self._streams is None or not self._is_beside:
            yield
            return
        made = num_tables_made()
        self._streams.side_waits(self._opened if made == self._num_tables else self._streams.main_event())
        try:
            with self._streams.beside():
                yield
        finally:
            self._last = self._streams.side_event()
            self._left_tables |= num_tables_made() != made
            self._pending |= {req.request_id: self._last for req in requests}

    def join(self) -> None:
        """What comes next in the main stream begins when all that runs beside is done."""
        if self._streams is not None and self._last is not None:
            self._streams.main_waits(self._last)
            self._last, self._left_tables, self._pending = None, False, {}

    def forget(self, request_id: str) -> None:
        """The request has left."""
        self._pending.pop(request_id, None)
