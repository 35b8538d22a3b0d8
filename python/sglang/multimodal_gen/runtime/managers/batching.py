"""Which units run in the next tick: fair between classes of requests, batched where keys agree, within memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.request_plan import LANES, Lane, Phase
from sglang.multimodal_gen.runtime.managers.fair_share import Account
from sglang.multimodal_gen.runtime.managers.memory import LearnedMemory
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes
from sglang.multimodal_gen.runtime.managers.worker_messages import Unit

# Decoding is heavy and gains nothing from batching on the sizes that matter, so one request's chunk is a tick's share.
_LANE_LIMIT: dict[Lane, int] = {"decode": 1}
MOST_BY_MEASUREMENT = 16


@dataclass(kw_only=True)
class UnitCursor:
    """How far one request has come: `issued` units are sent to the workers, `done` are answered.

    `account` is that of the request's class. Units before number `quarantined` run with nothing beside them: a worker
    was lost while the request ran them.
    """

    request_id: str
    phases: tuple[Phase, ...]
    order: int
    account: Account = field(default_factory=Account)
    solo: bool = False
    quarantined: int = 0
    issued: int = 0
    done: int = 0
    last_served: int = -1

    def position(self, unit: int) -> tuple[Phase, int]:
        """The phase that holds flat unit number `unit`, and the unit's index within it."""
        for phase in self.phases:
            if unit < phase.units:
                return phase, unit
            unit -= phase.units
        raise AssertionError("a unit past the end of the request")

    @property
    def total(self) -> int:
        """All units of all phases."""
        return sum(phase.units for phase in self.phases)

    @property
    def finished(self) -> bool:
        """Whether every unit is answered."""
        return self.done >= self.total

    @property
    def has_work(self) -> bool:
        """Whether a unit is left to issue."""
        return self.issued < self.total

    @property
    def in_quarantine(self) -> bool:
        """Whether the next unit must run with nothing beside it."""
        return self.issued < self.quarantined

    @property
    def turn(self) -> tuple[float, int, int, int]:
        """The least is served next: the class that is behind, in it the request that has waited longest."""
        return *self.account.turn, self.last_served, self.order

    def rollback(self) -> None:
        """Forget what was issued and not answered: those ticks are dropped or lost."""
        self.issued = self.done


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a tick may hold: requests of a shared forward, and bytes above the weights and what requests hold.

    `max_batch_size` None: as many as were measured to pay.
    """

    budget_bytes: int
    max_batch_size: int | None = None
    memory: LearnedMemory = field(default_factory=LearnedMemory)
    times: LearnedTimes = field(default_factory=LearnedTimes)
    deterministic: bool = False

    def largest_batch(self, batch_key: str) -> int:
        """How many requests of this key may share a forward."""
        if self.deterministic:
            return 1
        most = self.max_batch_size
        if most is None:
            most = self.times.best_batch(batch_key, MOST_BY_MEASUREMENT)
        return self.memory.largest_batch(batch_key, most)


def plan(cursors: Iterable[UnitCursor], limits: Limits) -> dict[Lane, tuple[Unit, ...]]:
    """The next tick's units by lane; empty when nobody has work to issue.

    The request whose turn it is leads its lane; others join it when their batch key agrees, in the order of their
    turns. Other lanes run in the same tick when their leaders are of the same turn: a worker does one lane after the
    other, so one more only adds to the tick. A request is in one lane at a time, and its next unit is issued only when
    it follows all issued ones.
    """
    waiting: dict[Lane, list[UnitCursor]] = {lane: [] for lane in LANES}
    for cursor in cursors:
        if cursor.has_work:
            phase, _ = cursor.position(cursor.issued)
            waiting[phase.lane].append(cursor)
    leaders = {lane: min(found, key=lambda c: c.turn) for lane, found in waiting.items() if found}
    if not leaders:
        return {}
    first = min(leaders, key=lambda lane: leaders[lane].turn)
    if leaders[first].in_quarantine:
        return {first: (_next_unit(leaders[first]),)}
    return {
        lane: tuple(_next_unit(cursor) for cursor in _group(leader, waiting[lane], lane, limits))
        for lane, leader in leaders.items()
        if leader.account.virtual_s <= leaders[first].account.virtual_s and not leader.in_quarantine
    }


def _group(leader: UnitCursor, candidates: Sequence[UnitCursor], lane: Lane, limits: Limits) -> list[UnitCursor]:
    """Those who share the leader's forward, itself included."""
    phase, _ = leader.position(leader.issued)
    most = min(limits.largest_batch(phase.batch_key), _LANE_LIMIT.get(lane, 64))
    if leader.solo or phase.alone or most == 1:
        return [leader]
    group, used = [leader], phase.peak_bytes
    for cursor in sorted(candidates, key=lambda c: c.turn)[1:]:
        if len(group) >= most:
            break
        other, _ = cursor.position(cursor.issued)
        if other.batch_key != phase.batch_key or cursor.solo or cursor.in_quarantine:
            continue
        if limits.memory.needed_bytes(phase.batch_key, used + other.peak_bytes) <= limits.budget_bytes:
            group.append(cursor)
            used += other.peak_bytes
    return group


def _next_unit(cursor: UnitCursor) -> Unit:
    phase, index = cursor.position(cursor.issued)
    return Unit(cursor.request_id, phase.name, index)
