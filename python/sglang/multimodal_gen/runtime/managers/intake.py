"""Who is let from the queue into the workers of one replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sglang.multimodal_gen.runtime.managers.admission import Admission
from sglang.multimodal_gen.runtime.managers.batching import MOST_BY_MEASUREMENT
from sglang.multimodal_gen.runtime.managers.fair_share import FairShare, ShareClass
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord

# Requests that hold state in the workers: enough to fill two batches, so that the next is encoded while one denoises.
_ACTIVE_BATCHES = 2


@dataclass
class Intake:
    """Reads whom the replica's workers hold (`active`) and what each class has had of them (`share`).

    `must_rest`: a suspect has the next turn, so no tick is sent until the workers have nothing to do.
    """

    admission: Admission
    share: FairShare
    active: Mapping[str, RequestRecord]
    replica: int = 0
    must_rest: bool = False

    @property
    def suspect_is_starting(self) -> bool:
        """Whether a worker is taking a request that another one may have been lost by."""
        return any(record.status == "admitting" and record.is_suspect for record in self.active.values())

    def next_to_start(self, may_start: Callable[[RequestRecord], bool], *, is_busy: bool) -> RequestRecord | None:
        """Who starts next; None when nobody can yet. `is_busy`: ticks are under way, which a suspect must wait for."""
        if self.suspect_is_starting:
            return None
        record = self.admission.waiting.warm_up(self.replica)
        if record is None:
            record = self._next_in_line([head for head in self.admission.waiting.heads() if may_start(head)])
        is_busy = is_busy or any(other.status == "admitting" for other in self.active.values())
        self.must_rest = record is not None and record.is_suspect and is_busy
        return None if self.must_rest else record

    def _next_in_line(self, heads: Iterable[RequestRecord]) -> RequestRecord | None:
        """Which of the classes' first ones has the next turn.

        Places in the workers go to classes by weight, and a class that has none always gets one, beyond the limit: it
        then gets its share of the time, and memory is made for it as for anyone.
        """
        held = Counter(record.share_class for record in self.active.values() if record.status != "saving")
        is_full = held.total() >= self._most_active(None)
        ready = [
            record
            for record in heads
            if not held[record.share_class]
            or (not is_full and held[record.share_class] < self._most_active(record.share_class))
        ]

        def turn(record: RequestRecord) -> tuple[float, tuple[float, int], int]:
            share_class = record.share_class
            return (held[share_class] + 1) / share_class.weight, self.share.account(share_class).turn, record.order

        return min(ready, key=turn, default=None)

    def _most_active(self, share_class: ShareClass | None) -> int:
        """Requests of a class, or of all, that hold state in the workers."""
        most = self.admission.execution.batching_max_size
        key = None if share_class is None else self.admission.key_of(share_class)
        if most is None:
            most = MOST_BY_MEASUREMENT if key is None else self.admission.times.best_batch(key, MOST_BY_MEASUREMENT)
        return _ACTIVE_BATCHES * most
