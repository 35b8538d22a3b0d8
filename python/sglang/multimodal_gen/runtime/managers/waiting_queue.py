"""Requests that wait for a worker: first come, first served within each class, whatever their number.

Every operation costs the same with ten thousand requests as with ten; what grows is with the number of classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang.multimodal_gen.configs.sample.scheduling_params import MOST_PRIORITY
from sglang.multimodal_gen.runtime.managers.fair_share import ShareClass
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord


class Place(NamedTuple):
    """Where a request stands: how many are expected to start before it, and the work to be done until it is complete,
    itself included and what runs already not."""

    position: int
    work: float


@dataclass
class _Line:
    """One class."""

    records: OrderedDict[str, RequestRecord] = field(default_factory=OrderedDict)
    cost: int = 0

    @property
    def head(self) -> RequestRecord:
        return next(iter(self.records.values()))


@dataclass
class WaitingQueue:
    """`cost` is the work of all that wait but warm-ups, which come before everybody."""

    cost: int = 0
    _lines: dict[ShareClass, _Line] = field(default_factory=dict)
    _warm_ups: OrderedDict[str, RequestRecord] = field(default_factory=OrderedDict)
    _num_clients: int = 0

    def __len__(self) -> int:
        return self._num_clients + len(self._warm_ups)

    def push(self, record: RequestRecord, *, front: bool = False) -> None:
        """At the end of its class; one that had its turn already and lost it, at the front."""
        if record.client is None:
            self._warm_ups[record.request_id] = record
            return
        line = self._lines.setdefault(record.share_class, _Line())
        line.records[record.request_id] = record
        if front:
            line.records.move_to_end(record.request_id, last=False)
        line.cost += record.cost
        self.cost += record.cost
        self._num_clients += 1

    def remove(self, record: RequestRecord) -> None:
        """It starts, or it has ended."""
        if record.client is None:
            del self._warm_ups[record.request_id]
            return
        line = self._lines[record.share_class]
        del line.records[record.request_id]
        line.cost -= record.cost
        self.cost -= record.cost
        self._num_clients -= 1
        if not line.records:
            del self._lines[record.share_class]

    def warm_up(self) -> RequestRecord | None:
        """The warm-up whose turn it is."""
        return next(iter(self._warm_ups.values()), None)

    def heads(self) -> list[RequestRecord]:
        """The first of each class."""
        return [line.head for line in self._lines.values()]

    def counts_by_priority(self) -> dict[int, int]:
        """How many of each priority wait, warm-ups apart; every priority is there."""
        counts = dict.fromkeys(range(-MOST_PRIORITY, MOST_PRIORITY + 1), 0)
        for share_class, line in self._lines.items():
            counts[share_class.priority] += len(line.records)
        return counts

    def last_place(self, share_class: ShareClass) -> Place:
        """That of the newest request of a class."""
        line = self._lines[share_class]
        newest = next(reversed(line.records.values()))
        return self._place(share_class, len(line.records) - 1, line.cost - newest.cost, newest.cost)

    def first_place(self, share_class: ShareClass) -> Place:
        """That of the first request of a class."""
        return self._place(share_class, 0, 0, self._lines[share_class].head.cost)

    def places(self) -> Iterator[tuple[RequestRecord, Place]]:
        """Those of everybody, as they are now."""
        for share_class, line in list(self._lines.items()):
            cost_before = 0
            for index, record in enumerate(list(line.records.values())):
                yield record, self._place(share_class, index, cost_before, record.cost)
                cost_before += record.cost

    def _place(self, share_class: ShareClass, num_before: int, cost_before: int, cost: int) -> Place:
        """While a class does its own work, each other one does as much of its own as their weights say."""
        position, work = float(num_before), float(cost_before + cost)
        for other, line in self._lines.items():
            if other != share_class:
                share = other.weight / share_class.weight
                position += int(min(len(line.records), share * cost_before * len(line.records) / line.cost))
                work += min(float(line.cost), share * (cost_before + cost))
        return Place(int(position), work)
