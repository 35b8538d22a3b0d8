"""Everything that is told about requests on their way: log lines and metrics, from the scheduler's transitions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from sglang.multimodal_gen.runtime.managers.dispatcher import DoneUnit
from sglang.multimodal_gen.runtime.managers.messages import Cancelled, Failed, Finished
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.observability.metrics import EngineMetrics, EngineSnapshot, RequeueReason
from sglang.multimodal_gen.runtime.observability.request_log import FinishedFacts, RequestLog


class RequestObserver:
    """The scheduler calls one method per transition; nothing here decides anything.

    Warm-ups are no requests of anybody's: only their units count.
    """

    def __init__(self, logger: logging.Logger, snapshot: Callable[[], EngineSnapshot], *, log_prompts: bool) -> None:
        self.metrics = EngineMetrics(snapshot)
        self._log = RequestLog(logger, log_prompts=log_prompts)

    def refused(self, request_id: str, *, code: str) -> None:
        """A request arrived and was not taken."""
        self.metrics.request_received()
        self.metrics.request_refused(code)
        self._log.refused(request_id, code=code)

    def received(self, record: RequestRecord, *, num_before: int) -> None:
        """A request arrived and waits behind `num_before` others."""
        self.metrics.request_received()
        self._log.received(record.request_id, prompt=record.params.prompt, num_before=num_before)

    def started(self, record: RequestRecord) -> None:
        """A worker holds it, perhaps again."""
        if record.client is None:
            return
        queue_seconds = record.started_at - record.received_at
        if not record.stage_seconds:
            self.metrics.request_started(queue_seconds, priority=record.params.priority)
        self._log.started(record.request_id, queue_seconds=queue_seconds)

    def worker_lost(self) -> None:
        """The worker is gone; what becomes of its requests follows."""
        self.metrics.worker_lost()

    def requeued(self, record: RequestRecord, *, reason: RequeueReason) -> None:
        """It left its worker and waits again."""
        if record.client is not None:
            self.metrics.request_requeued(reason)
            self._log.requeued(record.request_id, reason=reason, attempts=record.attempts)

    def units_done(self, units: Sequence[DoneUnit], *, peak_bytes: int) -> None:
        """A tick was answered. `units` come lane by lane; those of one lane shared a forward."""
        self.metrics.memory_used(peak_bytes)
        lane = None
        for unit in units:
            if unit.phase.lane != lane:
                lane = unit.phase.lane
                self.metrics.lane_done(lane, stage=unit.phase.name, batch_size=unit.batch_size, seconds=unit.seconds)

    def finished(self, record: RequestRecord, event: Finished) -> None:
        """It ended with a result."""
        if record.client is None:
            return
        pixels = event.width * event.height * event.num_frames if record.params.output_type == "pixels" else 0
        self.metrics.request_finished(
            time.monotonic() - record.received_at,
            stage_seconds=event.stage_seconds,
            pixels=pixels,
            frames=event.num_frames if pixels else 0,
        )
        facts = FinishedFacts(
            seconds=event.generation_time,
            queue_seconds=event.queue_seconds,
            steps=len(event.step_ms),
            computed_steps=event.computed_steps,
            batch=record.mean_batch_size,
            attempts=event.attempts,
            stage_seconds=event.stage_seconds,
            peak_memory_bytes=event.peak_memory_bytes,
            pixels=pixels,
            warmup_excluded=event.warmup_excluded,
        )
        self._log.finished(record.request_id, facts)

    def stopped(self, record: RequestRecord, event: Failed | Cancelled) -> None:
        """It ended without a result."""
        if record.client is None:
            return
        seconds = time.monotonic() - record.received_at
        if isinstance(event, Failed):
            self.metrics.request_stopped("failed", seconds, code=event.error.code)
            self._log.failed(record.request_id, code=event.error.code, seconds=seconds)
        else:
            self.metrics.request_stopped("cancelled", seconds)
            self._log.cancelled(record.request_id, reason=event.reason, seconds=seconds)
