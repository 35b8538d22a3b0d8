"""The workers of one replica: spawn, talk to every rank alike, notice death and silence, replace."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import msgspec

from sglang.multimodal_gen.runtime.managers.child_process import ChildProcess
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import Codec, Message, encode
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.worker_messages import (
    AdmitFailed,
    Admitted,
    FromWorker,
    LoraDone,
    ModelReady,
    RankLost,
    StopWorker,
    Tick,
    ToWorker,
)

logger = logging.getLogger(__name__)

_WORKER_MODULE = "sglang.multimodal_gen.runtime.managers.gpu_worker"
_CODEC = Codec(FromWorker)
ReplicaAnswer = ModelReady | Admitted | AdmitFailed | LoraDone
"""What each rank says of the same thing."""
# A live process answers every second; importing torch on a cold disk can hold the interpreter lock for long.
SILENCE_LOADING_S = 120.0
SILENCE_READY_S = 10.0
_STOP_GRACE_S = 3.0


@dataclass
class InFlight:
    """A tick that is sent and not answered. `deadline_s` counts from when it became the oldest."""

    tick: Tick
    deadline_s: float
    replies: int = 0


@dataclass
class WorkerGroup:
    """All ranks of one replica. `epoch` rises with every failure; `lost` says why the group cannot go on."""

    config: EngineConfig
    replica: int = 0
    ranks: list[ChildProcess] = field(default_factory=list)
    in_flight: dict[int, InFlight] = field(default_factory=dict)
    ready: bool = False
    epoch: int = 0
    budget_bytes: int = 0
    allocated_bytes: int | None = None
    _next_seq: int = 0
    _num_starts: int = 0
    _answers: dict[str, list[ReplicaAnswer]] = field(default_factory=dict)
    _oldest_since: float = 0.0
    _last_heard: list[float] = field(default_factory=list)

    @property
    def num_ranks(self) -> int:
        """Processes of the replica."""
        return self.config.args.parallel.replica.num_ranks

    def start(self) -> None:
        """Spawn every rank; they load at once."""
        self.ready, self.in_flight, self.ranks, self._answers = False, {}, [], {}
        self._num_starts += 1
        meeting = RunDir.at(self.config.run_dir).base / f"replica-{self.replica}-{self._num_starts}"
        for rank in range(self.num_ranks):
            config = msgspec.structs.replace(self.config, replica=self.replica, rank=rank, rendezvous=str(meeting))
            name = f"worker-{config.worker_index}"
            self.ranks.append(ChildProcess(_WORKER_MODULE, config=config.to_bytes(), nice_name=name))
        self._last_heard = [time.monotonic()] * self.num_ranks

    def send(self, message: ToWorker) -> None:
        """The same message to every rank; a dead one is noticed when its pipe is read."""
        payload = encode(cast(Message, message))
        for rank in self.ranks:
            rank.send(payload)

    def submit(self, tick: Tick, deadline_s: float) -> None:
        """Send a tick and wait for it in `in_flight`."""
        if not self.in_flight:
            self._oldest_since = time.monotonic()
        self.in_flight[tick.seq] = InFlight(tick, deadline_s)
        self.send(tick)

    def next_seq(self) -> int:
        """A fresh tick number."""
        self._next_seq += 1
        return self._next_seq

    def settle(self, seq: int) -> InFlight | None:
        """Count one rank's answer; the tick when it was the last one."""
        flight = self.in_flight.get(seq)
        if flight is None:
            return None
        flight.replies += 1
        if flight.replies < self.num_ranks:
            return None
        self._oldest_since = time.monotonic()
        return self.in_flight.pop(seq)

    def has_stale_ticks(self) -> bool:
        """Whether ticks of an earlier epoch are still to be answered as dropped."""
        return any(flight.tick.epoch != self.epoch for flight in self.in_flight.values())

    def receive(self, rank: int) -> Iterator[FromWorker]:
        """Messages that wait on one rank's pipe; of what every rank answers, one for all when the last has come.

        Raises:
            EOFError: the worker is gone, or sent what is no message.
        """
        connection = self.ranks[rank].connection
        try:
            while connection.poll(0):
                self._last_heard[rank] = time.monotonic()
                message = cast(FromWorker, _CODEC.decode(connection.recv_bytes()))
                if not isinstance(message, ReplicaAnswer):
                    yield message
                elif (answer := self._answer_of_all(message)) is not None:
                    yield answer
        except OSError as error:
            raise EOFError from error
        except msgspec.DecodeError as error:
            raise EOFError("the worker sent a message that does not decode") from error

    def _answer_of_all(self, message: ReplicaAnswer) -> FromWorker | None:
        key = _subject(message)
        answers = self._answers.setdefault(key, [])
        answers.append(message)
        if len(answers) < self.num_ranks:
            return None
        del self._answers[key]
        if len({type(answer) for answer in answers}) > 1:
            return RankLost(reason=f"its ranks disagree about {key or 'the model'}")
        if isinstance(message, ModelReady):
            least = min(answer.budget_bytes for answer in answers if isinstance(answer, ModelReady))
            return msgspec.structs.replace(message, budget_bytes=least)
        failed = (answer for answer in answers if isinstance(answer, LoraDone) and answer.error is not None)
        return next(failed, answers[0])

    def silence(self) -> str | None:
        """Why the group counts as stuck, None while all is well."""
        now = time.monotonic()
        limit = SILENCE_READY_S if self.ready else SILENCE_LOADING_S
        for rank, heard in enumerate(self._last_heard):
            if now - heard > limit:
                return f"rank {rank} has been silent for {now - heard:.0f} s"
        if self.in_flight:
            deadline = next(iter(self.in_flight.values())).deadline_s
            if now - self._oldest_since > deadline:
                return f"a tick has run for {now - self._oldest_since:.1f} s, {deadline:.1f} s were expected at most"
        return None

    def stop(self) -> None:
        """End every rank, in order if it listens, by SIGKILL if it does not."""
        self.send(StopWorker())
        self._close(_STOP_GRACE_S)

    def kill(self) -> str:
        """End every rank now; how they ended, in words."""
        for rank in self.ranks:
            rank.process.kill()
        ranks = self.ranks
        self._close(_STOP_GRACE_S)
        return ", ".join(f"{rank.name} (pid {rank.pid}) {rank.describe_exit()}" for rank in ranks)

    def _close(self, grace_s: float) -> None:
        for rank in self.ranks:
            rank.close(grace_s=grace_s)
        self.ranks, self.in_flight, self.ready = [], {}, False


def _subject(message: ReplicaAnswer) -> str:
    """Equal for what each rank says of the same thing."""
    if isinstance(message, LoraDone):
        return f"adapters, {message.query_id}"
    return "" if isinstance(message, ModelReady) else message.request_id
