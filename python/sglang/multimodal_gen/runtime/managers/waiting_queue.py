"""Requests that wait for a worker: within each class whoever is due first starts first.

Among requests without a deadline that is first come, first served: such a one counts as due `PATIENCE_S` after it came,
so that those with a shorter deadline overtake it for no longer than that. Finding the next costs the same with ten
thousand requests as with ten, and so does adding one that overtakes nobody.
"""

from __future__ import annotations

import bisect
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


# As long as clients wait for pictures, so that those with their usual deadline and those without are one line.
PATIENCE_S = 600.0


class _Rank(NamedTuple):
    """The least starts first; those that had their turn and lost it come before all others."""

    is_new: bool
    due_at: float
    order: int

    @classmethod
    def of(cls, record: RequestRecord, *, front: bool) -> _Rank:
        due_at = record.received_at + PATIENCE_S if record.deadline_at is None else record.deadline_at
        return cls(not front, due_at, record.order)


@dataclass
class _Line:
    """One class, in the order in which its requests start; `ranks` has the same order."""

    records: list[RequestRecord] = field(default_factory=list)
    ranks: list[_Rank] = field(default_factory=list)
    cost: int = 0

    def add(self, rank: _Rank, record: RequestRecord) -> None:
        index = bisect.bisect(self.ranks, rank)
        self.ranks.insert(index, rank)
        self.records.insert(index, record)
        self.cost += record.cost

    def remove(self, rank: _Rank) -> None:
        index = bisect.bisect_left(self.ranks, rank)
        del self.ranks[index]
        self.cost -= self.records.pop(index).cost

    def cost_before(self, index: int) -> int:
        """The work of those who start earlier, counted from the nearer end."""
        if index <= len(self.records) // 2:
            return sum(record.cost for record in self.records[:index])
        return self.cost - sum(record.cost for record in self.records[index:])


@dataclass
class WaitingQueue:
    """`cost` is the work of all that wait but warm-ups, which come before everybody."""

    cost: int = 0
    _lines: dict[ShareClass, _Line] = field(default_factory=dict)
    _warm_ups: OrderedDict[str, RequestRecord] = field(default_factory=OrderedDict)
    _ranks: dict[str, _Rank] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._ranks) + len(self._warm_ups)

    def push(self, record: RequestRecord, *, front: bool = False) -> None:
        """In the order of its class; one that had its turn already and lost it, at the front."""
        if record.client is None:
            self._warm_ups[record.request_id] = record
            return
        rank = self._ranks[record.request_id] = _Rank.of(record, front=front)
        self._lines.setdefault(record.share_class, _Line()).add(rank, record)
        self.cost += record.cost

    def remove(self, record: RequestRecord) -> None:
        """It starts, or it has ended."""
        if record.client is None:
            del self._warm_ups[record.request_id]
            return
        line = self._lines[record.share_class]
        line.remove(self._ranks.pop(record.request_id))
        self.cost -= record.cost
        if not line.records:
            del self._lines[record.share_class]

    def warm_up(self, replica: int) -> RequestRecord | None:
        """The warm-up of this replica whose turn it is."""
        return next((record for record in self._warm_ups.values() if record.replica == replica), None)

    def heads(self) -> list[RequestRecord]:
        """The first of each class."""
        return [line.records[0] for line in self._lines.values()]

    def counts_by_priority(self) -> dict[int, int]:
        """How many of each priority wait, warm-ups apart; every priority is there."""
        counts = dict.fromkeys(range(-MOST_PRIORITY, MOST_PRIORITY + 1), 0)
        for share_class, line in self._lines.items():
            counts[share_class.priority] += len(line.records)
        return counts

    def place(self, record: RequestRecord) -> Place:
        """That of a client's request that waits."""
        line = self._lines[record.share_class]
        index = bisect.bisect_left(line.ranks, self._ranks[record.request_id])
        return self._place(record.share_class, index, line.cost_before(index), record.cost)

    def places(self) -> Iterator[tuple[RequestRecord, Place]]:
        """Those of everybody, as they are now."""
        for share_class, line in list(self._lines.items()):
            cost_before = 0
            for index, record in enumerate(list(line.records)):
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
