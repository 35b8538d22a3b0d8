"""Which units run in the next tick: fair between requests, batched where keys agree, within memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.request_plan import LANES, Lane, Phase
from sglang.multimodal_gen.runtime.managers.memory import LearnedMemory
from sglang.multimodal_gen.runtime.managers.messages import Unit

# Decoding is heavy and gains nothing from batching on the sizes that matter, so one request's chunk is a tick's share.
_LANE_LIMIT: dict[Lane, int] = {"decode": 1}


@dataclass(kw_only=True)
class UnitCursor:
    """How far one request has come: `issued` units are sent to the workers, `done` are answered."""

    request_id: str
    phases: tuple[Phase, ...]
    order: int
    solo: bool = False
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

    def rollback(self) -> None:
        """Forget what was issued and not answered: those ticks are dropped or lost."""
        self.issued = self.done


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a tick may hold: requests of a shared forward, and bytes above the weights and what requests hold."""

    max_batch_size: int
    budget_bytes: int
    memory: LearnedMemory = field(default_factory=LearnedMemory)
    deterministic: bool = False


def plan(cursors: Iterable[UnitCursor], limits: Limits) -> dict[Lane, tuple[Unit, ...]]:
    """The next tick's units by lane; empty when nobody has work to issue.

    The request that has waited longest leads its lane; others join it when their batch key agrees. A request is in
    one lane at a time, and its next unit is issued only when it follows all issued ones.
    """
    waiting: dict[Lane, list[UnitCursor]] = {lane: [] for lane in LANES}
    for cursor in cursors:
        if cursor.issued < cursor.total:
            phase, _ = cursor.position(cursor.issued)
            waiting[phase.lane].append(cursor)
    chosen = {}
    for lane in LANES:
        group = _group(sorted(waiting[lane], key=lambda c: (c.last_served, c.order)), lane, limits)
        if group:
            chosen[lane] = tuple(_next_unit(cursor) for cursor in group)
    return chosen


def _group(candidates: Sequence[UnitCursor], lane: Lane, limits: Limits) -> list[UnitCursor]:
    if not candidates:
        return []
    leader = candidates[0]
    phase, _ = leader.position(leader.issued)
    most = limits.memory.largest_batch(phase.batch_key, min(limits.max_batch_size, _LANE_LIMIT.get(lane, 64)))
    if leader.solo or phase.alone or limits.deterministic:
        most = 1
    group, used = [leader], phase.peak_bytes
    for cursor in candidates[1:]:
        if len(group) >= most:
            break
        other, _ = cursor.position(cursor.issued)
        fits = limits.memory.needed_bytes(phase.batch_key, used + other.peak_bytes) <= limits.budget_bytes
        if other.batch_key == phase.batch_key and fits and not cursor.solo:
            group.append(cursor)
            used += other.peak_bytes
    return group


def _next_unit(cursor: UnitCursor) -> Unit:
    phase, index = cursor.position(cursor.issued)
    return Unit(cursor.request_id, phase.name, index)
