"""When requests' states are saved, where the files are, and who makes room for whom."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path

from sglang.multimodal_gen.runtime.managers.messages import StopEngine
from sglang.multimodal_gen.runtime.managers.replica import Replica, Replicas
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.worker_messages import SaveState, StateSaved
from sglang.multimodal_gen.runtime.observability.logging_setup import fields
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

logger = logging.getLogger(__name__)

# Each time costs writing and reading the state; after so many a request runs to its end.
_MAX_PREEMPTIONS = 3
_OF_ONE_ENGINE, _OF_A_JOB = "state-", "job-"
_LAST_SAVES_S = 3.5  # the supervisor waits a little longer for the scheduler's end


class StateKeeper:
    """Asks the workers to save states and owns the files, which go when their request ends."""

    def __init__(self, execution: ExecutionArgs, replicas: Replicas, directory: Path) -> None:
        self.execution = execution
        self.replicas = replicas
        self.directory = directory
        self.saving_s = _LAST_SAVES_S
        self._kept: set[str] = set()
        for leftover in directory.glob(f"{_OF_ONE_ENGINE}*"):  # of a scheduler that died
            leftover.unlink(missing_ok=True)

    def may_take(self, message: StopEngine) -> None:
        """How much longer the last saves may take: they begin when the running steps have ended."""
        self.saving_s = _LAST_SAVES_S + message.saving_s

    def after_step(self, record: RequestRecord) -> None:
        """A denoising step of the request is done: save its state if it is time."""
        every, step, total = self.execution.checkpoint_every, *record.steps()
        if every and step % every == 0 and step < total and record.status == "running":
            self.save(record)

    def find(self, record: RequestRecord) -> None:
        """Let a durable request go on from what was saved of it before its client, or the engine, ended."""
        if record.durable:
            record.state_file = state_name(record.request_id)
            self._kept.discard(record.state_file)
            record.has_saved_state = (self.directory / record.state_file).is_file()

    def save(self, record: RequestRecord) -> None:
        """Ask for the state as it is between two ticks; `saved` hears of it."""
        if record.state_file is None:
            record.state_file = f"{_OF_ONE_ENGINE}{secrets.token_hex(12)}.safetensors"
        self.replicas.send(record, SaveState(request_id=record.request_id, state_file=record.state_file))

    def saved(self, message: StateSaved, record: RequestRecord | None) -> None:
        """The answer to `save`."""
        if record is None:
            if message.state_file not in self._kept:
                self._unlink(message.state_file)  # its request ended while it was written
        elif message.error is None:
            record.has_saved_state = True

    def drop(self, record: RequestRecord, *, comes_again: bool = False) -> None:
        """The request has ended; with `comes_again` a durable one is only interrupted, and its state stays."""
        if record.state_file is None:
            return
        if comes_again and record.durable:
            self._kept.add(record.state_file)
        else:
            self._unlink(record.state_file)

    def save_before_end(self, requests: Mapping[str, RequestRecord]) -> None:
        """Save durable requests that run, so that they lose no step; as far as it goes before the engine must end."""
        unsaved = {
            record.request_id
            for record in requests.values()
            if record.durable and record.status == "running" and record.lane == "denoise" and record.steps()[0] > 0
        }
        for request_id in unsaved:
            self.save(requests[request_id])
        deadline = time.monotonic() + self.saving_s
        leaders = [replica.workers for replica in self.replicas if replica.workers.ready]
        while unsaved and leaders and time.monotonic() < deadline:
            wait([workers.ranks[0].connection for workers in leaders], timeout=0.2)
            for workers in list(leaders):
                try:
                    unsaved -= {m.request_id for m in workers.receive(0) if isinstance(m, StateSaved)}
                except EOFError:
                    leaders.remove(workers)

    def _unlink(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def preempt(self, replica: Replica) -> None:
        """Begin to park a request, for one that has waited long enough for memory: of a lower priority, or of the same
        one and with more work left; the lowest priority first, then whoever has most left.

        One at a time, and nobody who is decoding: frames that have left cannot be taken back.
        """
        patience, requests, dispatcher = self.execution.preempt_after_s, replica.active, replica.dispatcher
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


def state_name(request_id: str) -> str:
    """The file in which a durable request's state is saved."""
    return f"{_OF_A_JOB}{request_id}.safetensors"


def _standing(record: RequestRecord) -> tuple[int, float]:
    """Who has less makes room for who has more."""
    return record.params.priority, -record.remaining_cost
