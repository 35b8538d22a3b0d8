"""The replicas of the model: each has workers of its own and the requests that they hold, and one queue feeds all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sglang.multimodal_gen.runtime.managers.admission import Admission
from sglang.multimodal_gen.runtime.managers.dispatcher import Dispatcher
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.intake import Intake
from sglang.multimodal_gen.runtime.managers.memory import LearnedMemory
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes
from sglang.multimodal_gen.runtime.managers.waiting_queue import WaitingQueue
from sglang.multimodal_gen.runtime.managers.warm_up import WarmUp
from sglang.multimodal_gen.runtime.managers.worker_group import WorkerGroup
from sglang.multimodal_gen.runtime.managers.worker_messages import ToWorker

# Inputs are resized and a state is read from a slow disk; several ranks agree about memory.
SILENCE_ADMITTING_S = 120.0


@dataclass(kw_only=True)
class Replica:
    """One of them. `depth` ticks may be under way; one that has `given_up` could not load while others served."""

    index: int
    workers: WorkerGroup
    dispatcher: Dispatcher
    intake: Intake
    warm_up: WarmUp
    active: dict[str, RequestRecord]
    depth: int = 1
    load_attempts: int = 0
    given_up: bool = False

    @property
    def serves(self) -> bool:
        """Whether clients' requests run on it now."""
        return self.workers.ready and not (self.warm_up.mode == "server" and self.warm_up.under_way)

    @property
    def work_left(self) -> float:
        """Of the requests that it holds."""
        return sum(record.cost * record.fraction_left for record in self.active.values())

    def next_to_start(self, may_start: Callable[[RequestRecord], bool]) -> RequestRecord | None:
        """Whom it takes next from the queue."""
        if not self.workers.ready:
            return None
        return self.intake.next_to_start(
            lambda record: may_start(record) and not self.warm_up.blocks(record.params),
            is_busy=bool(self.workers.in_flight),
        )

    def silence(self) -> str | None:
        """Why its workers count as stuck, None while all is well."""
        if not self.workers.ranks:
            return None
        reason = self.workers.silence()
        if reason is not None or self.workers.in_flight:  # a tick waits in the pipe for who is being admitted
            return reason
        since = min((r.handed_at for r in self.active.values() if r.status == "admitting"), default=math.inf)
        waited_s = time.monotonic() - since
        return f"a request has been admitted for {waited_s:.0f} s" if waited_s > SILENCE_ADMITTING_S else None

    def take(self, record: RequestRecord) -> None:
        """It holds the request from now on."""
        self.active[record.request_id] = record
        record.replica = self.index

    def issue(self) -> None:
        """Send ticks, as many as may be under way."""
        if not self.intake.must_rest and not self.intake.suspect_is_starting:
            self.dispatcher.issue(self.active, depth=self.depth)

    def kill(self) -> str:
        """End its workers now; how they ended, in words."""
        ended = self.workers.kill()
        self.workers.epoch += 1
        self.workers.allocated_bytes = None
        self.warm_up.forget()
        return ended


@dataclass
class Replicas:
    """All of them, and what concerns all."""

    members: tuple[Replica, ...] = field(default=())

    @classmethod
    def of(cls, config: EngineConfig, waiting: WaitingQueue) -> tuple[Replicas, Admission]:
        """As many as the options say, and who lets requests into the queue before them."""
        execution = config.args.execution
        replicas, learned, memory = cls(), LearnedTimes(), LearnedMemory()
        admission = Admission(
            execution, learned, waiting, active=replicas.active, num_serving=lambda: replicas.num_serving
        )
        members = []
        for index in range(config.args.parallel.dp_size):
            workers, active = WorkerGroup(config, replica=index), dict[str, RequestRecord]()
            dispatcher = Dispatcher(execution, workers, learned=learned, memory=memory)
            intake = Intake(admission, dispatcher.share, active, replica=index)
            warm_up = WarmUp(
                config.args.warmup,
                id_prefix=f"{index}_" if index else "",
                is_needed=config.args.execution.needs_warm_up,
            )
            members.append(
                Replica(
                    index=index, workers=workers, dispatcher=dispatcher, intake=intake, warm_up=warm_up, active=active
                )
            )
        replicas.members = tuple(members)
        return replicas, admission

    def __iter__(self) -> Iterator[Replica]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def running(self) -> list[Replica]:
        """Those that have not given up."""
        return [replica for replica in self.members if not replica.given_up]

    @property
    def loaded(self) -> bool:
        """Whether all of them hold the model."""
        return all(replica.workers.ready for replica in self.running)

    @property
    def num_serving(self) -> int:
        """How many take clients' requests now."""
        return sum(replica.serves for replica in self.members)

    def active(self) -> list[RequestRecord]:
        """The requests that do not wait."""
        return [record for replica in self.members for record in replica.active.values()]

    def holder(self, record: RequestRecord) -> Replica:
        """Who holds a request that does not wait."""
        assert record.replica is not None, "it was handed over"
        return self.members[record.replica]

    def send(self, record: RequestRecord, message: ToWorker) -> None:
        """To the workers that hold a request."""
        self.holder(record).workers.send(message)

    def drop(self, record: RequestRecord) -> None:
        """Nobody holds the request any more."""
        del self.holder(record).active[record.request_id]
        if record.client is not None:
            record.replica = None

    def next_to_start(self, may_start: Callable[[RequestRecord], bool]) -> tuple[Replica, RequestRecord] | None:
        """Who starts next, and where: with the replica that has the least work left, or with one that has so little
        more that the request ends no later there. While one rests for a suspect, the others need not."""
        if len(self.members) == 1:
            record = self.members[0].next_to_start(may_start)
            return None if record is None else (self.members[0], record)
        work = {replica.index: replica.work_left for replica in self.members if replica.workers.ready}
        least, somebody_rests = min(work.values(), default=0.0), False
        by_load = sorted(work, key=lambda index: (not self.members[index].intake.must_rest, work[index], index))
        for replica in (self.members[index] for index in by_load):
            surplus = work[replica.index] - least
            record = replica.next_to_start(
                lambda record, surplus=surplus, resting=somebody_rests: (  # type: ignore[misc]
                    may_start(record) and surplus <= record.cost and not (resting and record.is_suspect)
                )
            )
            if record is not None:
                return replica, record
            somebody_rests |= replica.intake.must_rest
        return None

    def forget_memory(self) -> None:
        """Measured memory is measured anew."""
        memory = LearnedMemory()
        for replica in self.members:
            replica.dispatcher.memory = memory

    # -- all workers --

    @property
    def config(self) -> EngineConfig:
        """What their workers are started with."""
        return self.members[0].workers.config

    @config.setter
    def config(self, config: EngineConfig) -> None:
        for replica in self.members:
            replica.workers.config = config

    def start(self) -> None:
        """Spawn the workers of all; they load at once. Who had given up gets another chance."""
        for replica in self.members:
            replica.given_up, replica.load_attempts = False, 0
            replica.workers.start()

    def kill(self) -> None:
        """End the workers of all now."""
        for replica in self.members:
            replica.kill()

    def stop(self) -> None:
        """End the workers of all in order."""
        for replica in self.members:
            replica.workers.stop()
