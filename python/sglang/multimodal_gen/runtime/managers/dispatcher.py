"""From requests to ticks, and from the workers' answers to progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.request_plan import LANES, Phase
from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.managers.batching import Limits, plan
from sglang.multimodal_gen.runtime.managers.messages import Tick, TickDone, Unit, UnitFailure
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes
from sglang.multimodal_gen.runtime.managers.worker_group import InFlight, WorkerGroup
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs


@dataclass(frozen=True)
class DoneUnit:
    """One unit of a request that is still wanted."""

    record: RequestRecord
    phase: Phase
    seconds: float


@dataclass
class Settled:
    """What one answered tick means: units that are done, and requests that cannot go on."""

    done: list[DoneUnit] = field(default_factory=list)
    failed: list[tuple[RequestRecord, ErrorInfo]] = field(default_factory=list)


@dataclass
class Dispatcher:
    """Issues ticks to one replica and settles them. Keeps what is learned of the units' times."""

    execution: ExecutionArgs
    workers: WorkerGroup
    learned: LearnedTimes = field(default_factory=LearnedTimes)
    num_ticks: int = 0
    batch_sizes: Counter[int] = field(default_factory=Counter)

    @property
    def mean_batch_size(self) -> float:
        """Requests per denoising forward so far."""
        batches = sum(self.batch_sizes.values())
        return sum(size * count for size, count in self.batch_sizes.items()) / batches if batches else 0.0

    def issue(self, requests: Mapping[str, RequestRecord], *, depth: int) -> None:
        """Send ticks until `depth` of them are under way or nobody has a unit to run."""
        group = self.workers
        if not group.ready or group.has_stale_ticks():
            return
        limits = Limits(
            max_batch_size=self.execution.max_batch_size,
            budget_bytes=group.budget_bytes,
            deterministic=self.execution.deterministic,
        )
        while len(group.in_flight) < depth:
            cursors = [r.cursor for r in requests.values() if r.cursor is not None and r.status == "running"]
            lanes = plan(cursors, limits)
            if not lanes:
                return
            tick = Tick(seq=group.next_seq(), epoch=group.epoch, **lanes)
            group.submit(tick, self.learned.deadline_s(self._advance(tick, requests)))
            self.num_ticks += 1
            self.batch_sizes[len(tick.denoise)] += bool(tick.denoise)

    def _advance(self, tick: Tick, requests: Mapping[str, RequestRecord]) -> Counter[str]:
        """Count the tick's units as issued; how many of each batch key it holds."""
        batches: Counter[str] = Counter()
        for unit in tick.units:
            cursor = requests[unit.request_id].cursor
            assert cursor is not None, "only running requests are planned"
            phase, _ = cursor.position(cursor.issued)
            batches[phase.batch_key] += 1
            cursor.issued += 1
            cursor.last_served = tick.seq
        return batches

    def settle(self, message: TickDone, requests: Mapping[str, RequestRecord]) -> Settled:
        """Take one rank's answer; empty until the tick's last rank has answered."""
        settled = Settled()
        flight = self.workers.settle(message.seq)
        if flight is None:
            return settled
        failures = {failure.request_id: failure for failure in message.failures}
        if message.dropped or failures:
            self._roll_back(flight, failures, requests, settled)
        if not message.dropped:
            self._credit(flight, message, set(failures), requests, settled)
        return settled

    def _roll_back(
        self,
        flight: InFlight,
        failures: Mapping[str, UnitFailure],
        requests: Mapping[str, RequestRecord],
        settled: Settled,
    ) -> None:
        for unit in flight.tick.units:
            record = requests.get(unit.request_id)
            if record is None or record.cursor is None:
                continue
            failure = failures.get(unit.request_id)
            if failure is None and failures:
                continue  # its unit stands
            record.cursor.rollback()
            if failure is None:
                continue
            if failure.retry_alone and not record.cursor.solo:
                record.cursor.solo = True
            else:
                settled.failed.append((record, failure.error))
        if failures and flight.tick.epoch == self.workers.epoch:
            self.workers.epoch += 1

    def _credit(
        self,
        flight: InFlight,
        message: TickDone,
        failed: set[str],
        requests: Mapping[str, RequestRecord],
        settled: Settled,
    ) -> None:
        for lane in LANES:
            units: tuple[Unit, ...] = getattr(flight.tick, lane)
            seconds = getattr(message, f"{lane}_ms") / 1000
            wanted = [requests[u.request_id] for u in units if u.request_id not in failed and u.request_id in requests]
            for index, record in enumerate(wanted):
                if record.cursor is None:
                    continue
                phase, _ = record.cursor.position(record.cursor.done)
                if index == 0:
                    self.learned.record(phase.batch_key, seconds, len(units))
                record.record_unit(phase, seconds, message.peak_bytes)
                settled.done.append(DoneUnit(record, phase, seconds))
