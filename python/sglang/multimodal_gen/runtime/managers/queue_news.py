"""Telling those who wait how far they have come, not more often than anybody reads it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.waiting_queue import Place, WaitingQueue

# A request hears of its place this often at most; a long queue is gone through in slices, between which ticks go on.
_PAUSE_S = 2.0
_SLICE, _SLICE_PAUSE_S = 32, 0.1


@dataclass
class QueueNews:
    """Goes through the queue again and again. Times are of the monotonic clock."""

    _round: Iterator[tuple[RequestRecord, Place]] = field(default_factory=lambda: iter(()))
    _next_round_at: float = 0.0
    _next_slice_at: float = 0.0

    def due(self, waiting: WaitingQueue, now: float) -> list[tuple[RequestRecord, Place]]:
        """Requests whose place has changed since they were told, the first ones of those that are left."""
        if now < self._next_slice_at or not len(waiting):
            return []
        self._next_slice_at = now + _SLICE_PAUSE_S
        looked_at = list(itertools.islice(self._round, _SLICE))
        if not looked_at and now >= self._next_round_at:
            self._round, self._next_round_at = waiting.places(), now + _PAUSE_S
            looked_at = list(itertools.islice(self._round, _SLICE))
        return [
            (record, place)
            for record, place in looked_at
            if record.status == "queued" and record.told_position != place.position and now - record.told_at >= _PAUSE_S
        ]
