"""Which requests' time is up."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord

# A request that ends leaves its entry behind; beyond so many such entries they are swept.
_LEFT_BEHIND = 1024


@dataclass
class Deadlines:
    """Of all requests that have one, the earliest first. Times are of the monotonic clock, which nobody sets."""

    _heap: list[tuple[float, int, str]] = field(default_factory=list)

    def watch(self, record: RequestRecord) -> None:
        """A request has arrived."""
        if record.deadline_at is not None:
            heapq.heappush(self._heap, (record.deadline_at, record.order, record.request_id))

    def expired(self, requests: Mapping[str, RequestRecord], now: float) -> list[RequestRecord]:
        """Those of `requests` that should be complete by now; each is told once."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            _, order, request_id = heapq.heappop(self._heap)
            record = requests.get(request_id)
            if record is not None and record.order == order:
                found.append(record)
        if len(self._heap) > 2 * len(requests) + _LEFT_BEHIND:
            self._heap = [entry for entry in self._heap if entry[2] in requests]
            heapq.heapify(self._heap)
        return found

    def seconds_left(self, now: float) -> float | None:
        """Until somebody's time is up; None when nobody has a deadline."""
        return max(0.0, self._heap[0][0] - now) if self._heap else None
