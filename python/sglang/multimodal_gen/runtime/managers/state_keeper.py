"""When requests' states are saved, where the files are, and who makes room for whom."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from sglang.multimodal_gen.runtime.managers.dispatcher import Dispatcher
from sglang.multimodal_gen.runtime.managers.messages import SaveState, StateSaved
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.worker_group import WorkerGroup
from sglang.multimodal_gen.runtime.observability.logging_setup import fields
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

logger = logging.getLogger(__name__)

# Each time costs writing and reading the state; after so many a request runs to its end.
_MAX_PREEMPTIONS = 3


class StateKeeper:
    """Asks the workers to save states and owns the files, which go when their request ends."""

    def __init__(self, execution: ExecutionArgs, workers: WorkerGroup, directory: Path) -> None:
        self.execution = execution
        self.workers = workers
        self.directory = directory
        for leftover in directory.glob("state-*"):  # of a scheduler that died
            leftover.unlink(missing_ok=True)

    def after_step(self, record: RequestRecord) -> None:
        """A denoising step of the request is done: save its state if it is time."""
        every, step, total = self.execution.checkpoint_every, *record.steps()
        if every and step % every == 0 and step < total and record.status == "running":
            self.save(record)

    def save(self, record: RequestRecord) -> None:
        """Ask for the state as it is between two ticks; `saved` hears of it."""
        if record.state_file is None:
            record.state_file = f"state-{secrets.token_hex(12)}.safetensors"
        self.workers.send(SaveState(request_id=record.request_id, state_file=record.state_file))

    def saved(self, message: StateSaved, record: RequestRecord | None) -> None:
        """The answer to `save`."""
        if record is None:
            self._unlink(message.state_file)  # its request ended while it was written
        elif message.error is None:
            record.has_saved_state = True

    def drop(self, record: RequestRecord) -> None:
        """The request has ended."""
        if record.state_file is not None:
            self._unlink(record.state_file)

    def _unlink(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def preempt(self, requests: Mapping[str, RequestRecord], dispatcher: Dispatcher) -> None:
        """Begin to park a request, for one that has waited long enough for memory: of a lower priority, or of the same
        one and with more work left; the lowest priority first, then whoever has most left.

        One at a time, and nobody who is decoding: frames that have left cannot be taken back.
        """
        patience = self.execution.preempt_after_s
        if not patience or any(record.status == "parking" for record in requests.values()):
            return
        blocked = dispatcher.longest_blocked(requests)
        if blocked is None or time.monotonic() - blocked.admitted_at < patience:
            return
        holders = dispatcher.holders(requests)
        for record in sorted(holders, key=_standing):
            others = [other for other in holders if other is not record]
            may_go = record.lane != "decode" and record.num_preemptions < _MAX_PREEMPTIONS
            if may_go and _standing(record) < _standing(blocked) and dispatcher.budget().has_room(blocked, others):
                facts = fields(request_id=record.request_id, request_ids=[blocked.request_id])
                logger.info("is put aside, to make room for %s", blocked.request_id, extra=facts)
                record.status = "parking"
                record.num_preemptions += 1
                self.save(record)
                return


def _standing(record: RequestRecord) -> tuple[int, float]:
    """Who has less makes room for who has more."""
    return record.params.priority, -record.remaining_cost
