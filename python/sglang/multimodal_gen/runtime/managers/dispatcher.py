"""From requests to ticks, and from the workers' answers to progress."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.request_plan import LANES, Lane, Phase
from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.managers.batching import Limits, UnitCursor, plan
from sglang.multimodal_gen.runtime.managers.fair_share import FairShare
from sglang.multimodal_gen.runtime.managers.memory import Budget, LearnedMemory
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.timing import UNLEARNED_DEADLINE_S, LearnedTimes
from sglang.multimodal_gen.runtime.managers.worker_group import WorkerGroup
from sglang.multimodal_gen.runtime.managers.worker_messages import LaneDone, Tick, TickDone, Unit, UnitFailure
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

# Requests that came later may pass one that waits for memory, but not for longer than this.
_OVERTAKING_S = 30.0

Requests = Mapping[str, RequestRecord]


@dataclass(frozen=True)
class DoneUnit:
    """One unit of a request that is still wanted; `batch_size` units shared the forward, this one included."""

    record: RequestRecord
    phase: Phase
    seconds: float
    batch_size: int


@dataclass
class Settled:
    """What one answered tick means: units that are done, and requests that cannot go on."""

    done: list[DoneUnit] = field(default_factory=list)
    failed: list[tuple[RequestRecord, ErrorInfo]] = field(default_factory=list)


@dataclass
class Dispatcher:
    """Issues ticks to one replica and settles them. Keeps what is learned of the units' times and memory, and what each
    class of requests has had. The requests that its methods take are those that workers hold."""

    execution: ExecutionArgs
    workers: WorkerGroup
    learned: LearnedTimes = field(default_factory=LearnedTimes)
    memory: LearnedMemory = field(default_factory=LearnedMemory)
    share: FairShare = field(default_factory=FairShare)
    choose_previews: Callable[[tuple[Unit, ...], Requests], tuple[str, ...]] = lambda units, requests: ()
    num_ticks: int = 0
    _quarantine: int | None = None
    batch_sizes: Counter[int] = field(default_factory=Counter)

    @property
    def num_batches(self) -> int:
        """Denoising forwards so far."""
        return sum(self.batch_sizes.values())

    @property
    def num_batched(self) -> int:
        """Requests that they held."""
        return sum(size * count for size, count in self.batch_sizes.items())

    # -- memory --

    def budget(self) -> Budget:
        """What the requests may take together."""
        return Budget(self.workers.budget_bytes, self.memory)

    def holders(self, requests: Requests) -> list[RequestRecord]:
        """Requests with a reservation."""
        return [r for r in requests.values() if r.reserved and r.status in ("running", "parking")]

    def _blocked(self, requests: Requests) -> list[RequestRecord]:
        """Admitted requests without a reservation: first those that nobody may overtake, then by whose turn it is."""
        blocked = [r for r in requests.values() if r.status == "running" and not r.reserved]
        overdue = sorted((r for r in blocked if _is_overdue(r)), key=lambda r: r.admitted_at)
        others = (r for r in blocked if not _is_overdue(r))
        return overdue + sorted(others, key=lambda r: (self.share.account(r.share_class).turn, r.order))

    def longest_blocked(self, requests: Requests) -> RequestRecord | None:
        """The request that has waited longest for memory."""
        return min(self._blocked(requests), key=lambda r: r.admitted_at, default=None)

    def _reserve(self, requests: Requests) -> None:
        """Set memory aside for those who wait, as far as it goes."""
        blocked = self._blocked(requests)
        if not blocked:
            return
        budget, holders = self.budget(), self.holders(requests)
        for record in blocked:
            if budget.has_room(record, holders):
                record.reserved = True
                holders.append(record)
            elif _is_overdue(record):
                return

    # -- ticks --

    def issue(self, requests: Requests, *, depth: int) -> None:
        """Send ticks until `depth` of them are under way or nobody has a unit to run."""
        group = self.workers
        if not group.ready or group.has_stale_ticks() or self._quarantine in group.in_flight:
            return
        self._reserve(requests)
        holders = self.holders(requests)
        limits = self._limits(holders)
        cursors = [r.cursor for r in holders if r.cursor is not None and r.status == "running"]
        while len(group.in_flight) < depth:
            self.share.begin_turn({cursor.account for cursor in cursors if cursor.has_work})
            lanes = plan(cursors, limits)
            if not lanes:
                return
            previews = self.choose_previews(lanes.get("denoise", ()), requests)
            tick = Tick(seq=group.next_seq(), epoch=group.epoch, **lanes, previews=previews)
            in_quarantine = self._is_quarantined(tick, requests)
            if in_quarantine and group.in_flight:
                return
            deadline_s = self.learned.deadline_s(self._advance(tick, requests), has_previews=bool(previews))
            if any(requests[unit.request_id].params.profile for unit in tick.units):
                deadline_s = max(deadline_s, UNLEARNED_DEADLINE_S)  # it may begin or write a profile besides
            group.submit(tick, deadline_s)
            self.num_ticks += 1
            self.batch_sizes[len(tick.denoise)] += bool(tick.denoise)
            if in_quarantine:
                self._quarantine = tick.seq
                return

    def _limits(self, holders: list[RequestRecord]) -> Limits:
        return Limits(
            max_batch_size=self.execution.batching_max_size,
            budget_bytes=self.workers.budget_bytes - self.budget().held_bytes(holders),
            memory=self.memory,
            times=self.learned,
            deterministic=self.execution.deterministic,
        )

    def _is_quarantined(self, tick: Tick, requests: Requests) -> bool:
        """Whether nothing else may run beside this tick."""
        return any(_cursor(requests[unit.request_id]).in_quarantine for unit in tick.units)

    def _advance(self, tick: Tick, requests: Requests) -> Counter[str]:
        """Count the tick's units as issued; how many of each batch key it holds.

        The class of each lane's leader pays for all of it: those who join at another's turn must not lose their own,
        or one of them whose forwards nobody shares would never have one.
        """
        batches: Counter[str] = Counter()
        for units in (tick.encode, tick.denoise, tick.decode):
            cursors = [_cursor(requests[unit.request_id]) for unit in units]
            for index, cursor in enumerate(cursors):
                batch_key = cursor.position(cursor.issued)[0].batch_key
                batches[batch_key] += 1
                if index == 0:
                    # What a first time takes says nothing, so it is not charged.
                    each = self.learned.steady_seconds(batch_key, len(units)) or 0.0
                    cursor.account.charge(each * len(units))
                cursor.issued += 1
                cursor.last_served = tick.seq
        return batches

    def settle(self, message: TickDone, requests: Requests) -> Settled:
        """Take one rank's answer; empty until the tick's last rank has answered."""
        settled = Settled()
        flight = self.workers.settle(message.seq)
        if flight is None:
            return settled
        tick, failures = flight.tick, {failure.request_id: failure for failure in message.failures}
        if message.dropped:
            for record in self._wanted(tick.units, requests):
                assert record.cursor is not None
                record.cursor.rollback()
        self._retry(tick, failures, requests, settled)
        for lane in message.lanes:
            self._credit(lane, _lane_units(tick, lane.lane), message.peak_bytes, failures, requests, settled)
        if message.preview_ms > 0:
            self._charge_previews(tick, message.preview_ms / 1000, requests)
        if failures and tick.epoch == self.workers.epoch:
            self.workers.epoch += 1
        return settled

    def _charge_previews(self, tick: Tick, seconds: float, requests: Requests) -> None:
        """The classes that looked pay for what everybody waited for."""
        self.learned.record_preview(seconds)
        shown = [unit for unit in tick.denoise if unit.request_id in tick.previews]
        for record in self._wanted(tuple(shown), requests):
            _cursor(record).account.charge(seconds / len(shown))

    def _wanted(self, units: tuple[Unit, ...], requests: Requests) -> list[RequestRecord]:
        """The units' requests, in order, without those that have ended or left the workers meanwhile."""
        records = (requests.get(unit.request_id) for unit in units)
        return [record for record in records if record is not None and record.cursor is not None]

    def _retry(self, tick: Tick, failures: Mapping[str, UnitFailure], requests: Requests, settled: Settled) -> None:
        """What becomes of requests whose unit failed; the others of the tick stand."""
        for lane in LANES if failures else ():
            units = _lane_units(tick, lane)
            for record in self._wanted(units, requests):
                failure, cursor = failures.get(record.request_id), record.cursor
                assert cursor is not None
                if failure is None:
                    continue
                phase, _ = cursor.position(cursor.done)
                cursor.rollback()
                if failure.retry == "smaller_batch":
                    self.memory.ran_out(phase.batch_key, len(units))
                elif failure.retry == "smaller_units":
                    record.replan(failure.phases, failure.notes)
                elif failure.retry == "alone" and not cursor.solo:
                    cursor.solo = True
                else:
                    settled.failed.append((record, failure.error))

    def _credit(
        self,
        lane: LaneDone,
        units: tuple[Unit, ...],
        peak_bytes: int,
        failures: Mapping[str, UnitFailure],
        requests: Requests,
        settled: Settled,
    ) -> None:
        records = [record for record in self._wanted(units, requests) if record.request_id not in failures]
        phases = [record.cursor.position(record.cursor.done)[0] for record in records if record.cursor is not None]
        # A step that left something out says nothing of what others take that share its batch key.
        left_out = any(cached.skipped for cached in lane.cached.values())
        if phases and len(phases) == len(units) and lane.peak_bytes is not None and not left_out:
            estimated = sum(phase.peak_bytes for phase in phases)
            self.memory.record(phases[0].batch_key, estimated_bytes=estimated, measured_bytes=lane.peak_bytes)
        seconds = lane.ms / 1000
        for index, (record, phase) in enumerate(zip(records, phases, strict=True)):
            if index == 0 and not left_out:
                self.learned.record(phase.batch_key, seconds, len(units))
            record.record_unit(phase, seconds, peak_bytes, batch_size=len(units))
            record.cached = lane.cached.get(record.request_id, record.cached)
            settled.done.append(DoneUnit(record, phase, seconds, len(units)))


def _is_overdue(record: RequestRecord) -> bool:
    return time.monotonic() - record.admitted_at > _OVERTAKING_S


def _cursor(record: RequestRecord) -> UnitCursor:
    assert record.cursor is not None, "only running requests are planned"
    return record.cursor


def _lane_units(tick: Tick, lane: Lane) -> tuple[Unit, ...]:
    units: tuple[Unit, ...] = getattr(tick, lane)
    return units
