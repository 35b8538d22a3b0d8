"""The scheduler process: it decides every step. No torch, no models; queue, batching, cancel, retry, progress.

Run as `python -m sglang.multimodal_gen.runtime.managers.scheduler FD` by the supervisor.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import zmq

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EngineStopped, ErrorInfo, InvalidRequest, ModelError, StorageError
from sglang.multimodal_gen.runtime.managers.admission import with_cost_limit
from sglang.multimodal_gen.runtime.managers.child_process import inherited_connection
from sglang.multimodal_gen.runtime.managers.clients import Clients
from sglang.multimodal_gen.runtime.managers.control import Control
from sglang.multimodal_gen.runtime.managers.deadlines import Deadlines
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.engine_status import snapshot_of, status_of
from sglang.multimodal_gen.runtime.managers.kept_loras import LoraFile
from sglang.multimodal_gen.runtime.managers.loras import Loras
from sglang.multimodal_gen.runtime.managers.messages import (
    Cancelled,
    CancelRequest,
    ClientLost,
    Codec,
    ControlRequest,
    EngineState,
    Failed,
    GenerateRequest,
    Hello,
    LoraRequest,
    MediaInputs,
    MetricsReply,
    MetricsRequest,
    PreviewTaken,
    Queued,
    RequestEvent,
    StatusRequest,
    StopEngine,
    ToScheduler,
    WatchRequest,
)
from sglang.multimodal_gen.runtime.managers.output_link import Ledger, OutputLink
from sglang.multimodal_gen.runtime.managers.output_messages import (
    DropOutput,
    FromOutput,
    OutputDone,
    OutputFailed,
    OutputFrames,
    OutputHello,
    PreviewRendered,
)
from sglang.multimodal_gen.runtime.managers.previews import Previews
from sglang.multimodal_gen.runtime.managers.queue_news import QueueNews
from sglang.multimodal_gen.runtime.managers.replica import Replica, Replicas
from sglang.multimodal_gen.runtime.managers.request_observer import RequestObserver
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.state_keeper import StateKeeper
from sglang.multimodal_gen.runtime.managers.supervisor_link import SupervisorLink
from sglang.multimodal_gen.runtime.managers.waiting_queue import Place, WaitingQueue
from sglang.multimodal_gen.runtime.managers.warm_up import InputShapes, input_shapes, shape_of
from sglang.multimodal_gen.runtime.managers.worker_messages import (
    Admit,
    AdmitFailed,
    Admitted,
    CacheFlushed,
    Heartbeat,
    LatentsReady,
    LoadFailed,
    Loading,
    LoraDone,
    ModelReady,
    OutputChunk,
    PreviewLatents,
    ProfileReady,
    RankLost,
    Release,
    StateSaved,
    TickDone,
)
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging, fields
from sglang.multimodal_gen.runtime.observability.metrics import EngineSnapshot
from sglang.multimodal_gen.runtime.server_args import model_names

# Started with -m, this module's own name is __main__, which is outside the package's logger.
logger = logging.getLogger("sglang.multimodal_gen.runtime.managers.scheduler")

_POLL_MS = 200
_MAX_LOAD_ATTEMPTS = 3
# Of a flood of messages so many are read before ticks go on.
_MESSAGES_AT_ONCE = 256


class Scheduler:
    """The event loop of all replicas. Every public reaction is `_on_<message>`."""

    def __init__(self, config: EngineConfig, parent: Connection) -> None:
        self.config = config
        self.parent = SupervisorLink(parent)
        self.run_dir = RunDir.at(config.run_dir)
        self.state = EngineState(state="starting")
        self.requests: dict[str, RequestRecord] = {}
        self.waiting = WaitingQueue()
        self.replicas, self.admission = Replicas.of(config, self.waiting)
        self.deadlines = Deadlines()
        self.news = QueueNews()
        self.states = StateKeeper(config.args.execution, self.replicas, config.checkpoint_dir())
        self.ledger = Ledger(self.run_dir)
        self.num_restarts = self.num_arrived = 0
        self.stopping = False
        self.context = zmq.Context()
        self.clients = Clients(self._bind(zmq.ROUTER, self.run_dir.scheduler_address))
        self.output = OutputLink(self._bind(zmq.PAIR, self.run_dir.output_address))
        self.control = Control(self.replicas, self.clients, self.requests, self._set_state, state=lambda: self.state)
        self.loras = Loras(
            config.args.lora,
            self.replicas,
            self.clients,
            self.requests,
            state=lambda: self.state,
            num_arrived=lambda: self.num_arrived,
            file=LoraFile(config.state_dir().adapters, server=self.run_dir.base.name),
        )
        self.observer = RequestObserver(logger, self._snapshot, log_prompts=config.args.logging.log_prompts)
        limit = config.args.execution.preview_max_per_second
        self.previews = Previews(
            self.requests, self._tell, ledger=self.ledger, output=self.output, max_per_second=limit
        )
        for replica in self.replicas:
            replica.dispatcher.choose_previews = self.previews.choose
        self._from_output = Codec(FromOutput)
        self._handlers, self._handlers_of_replica = self._handler_table(), self._replica_handler_table()

    def _bind(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.set_hwm(0)
        socket.linger = 500
        socket.bind(address)
        return socket

    def _handler_table(self) -> dict[type, Callable[[Any], None]]:
        return {
            Loading: self._on_loading,
            Admitted: self._on_admitted,
            AdmitFailed: self._on_failure,
            OutputChunk: self._on_chunk,
            LatentsReady: self._on_latents,
            ProfileReady: self._on_profile,
            PreviewLatents: self.previews.on_latents,
            PreviewRendered: self.previews.on_rendered,
            StateSaved: self._on_state_saved,
            CacheFlushed: self.control.flushed,
            OutputHello: self._on_output_hello,
            OutputDone: self._on_output_done,
            OutputFailed: self._on_failure,
            ClientLost: self._on_client_lost,
            StopEngine: self.states.may_take,
        }

    def _replica_handler_table(self) -> dict[type, Callable[[Replica, Any], None]]:
        """For what workers say of their replica, not of a request."""
        return {
            Heartbeat: self._on_heartbeat,
            ModelReady: self._on_model_ready,
            LoadFailed: self._on_load_failed,
            RankLost: self._on_rank_lost,
            LoraDone: self.loras.done,
            TickDone: self._on_tick_done,
        }

    # -- the loop --

    def run(self) -> None:
        """Until the supervisor's pipe closes: it stops the engine, or it is gone."""
        self.replicas.start()
        self._set_state("loading", detail="starting the worker")
        while not self.stopping:
            self.parent.tell_alive()
            ready = self._poll()
            self._read_parent(ready)
            if self.clients.socket in ready:
                for client, message in itertools.islice(self.clients.receive(), _MESSAGES_AT_ONCE):
                    self._on_client_message(client, message)
            self._read_output(ready)
            for replica in self.replicas:
                self._read_workers(replica, ready)
                self._check_silence(replica)
            self.control.advance()
            self.loras.advance()
            for record in self.deadlines.expired(self.requests, time.monotonic()):
                self._end(record.request_id, Failed(request_id=record.request_id, error=record.deadline_error()))
            self._admit_waiting()
            for replica in self.replicas:
                self.states.preempt(replica)
                replica.issue()
            for record, place in self.news.due(self.waiting, time.monotonic()):
                self._tell_place(record, place)
        self._shut_down()

    def _poll(self) -> set[Any]:
        poller = zmq.Poller()
        poller.register(self.clients.socket, zmq.POLLIN)
        poller.register(self.output.socket, zmq.POLLIN)
        poller.register(self.parent.fileno(), zmq.POLLIN)
        for replica in self.replicas:
            for rank in replica.workers.ranks:
                poller.register(rank.connection.fileno(), zmq.POLLIN)
        left = self.deadlines.seconds_left(time.monotonic())
        return {source for source, _ in poller.poll(_POLL_MS if left is None else min(_POLL_MS, 1 + int(left * 1000)))}

    def _read_parent(self, ready: set[Any]) -> None:
        if self.parent.fileno() not in ready:
            return
        try:
            for note in self.parent.receive():
                self._handlers[type(note)](note)
        except EOFError:
            self.stopping = True

    def _read_output(self, ready: set[Any]) -> None:
        while self.output.socket in ready:
            try:
                message = self._from_output.decode(self.output.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.DecodeError:
                logger.exception("the output process sent a message that does not decode")
                continue
            self._handlers[type(message)](message)

    def _read_workers(self, replica: Replica, ready: set[Any]) -> None:
        for index, rank in enumerate(list(replica.workers.ranks)):
            if rank not in replica.workers.ranks or rank.connection.fileno() not in ready:
                continue
            try:
                for message in replica.workers.receive(index):
                    if of_replica := self._handlers_of_replica.get(type(message)):
                        of_replica(replica, message)
                    else:
                        self._handlers[type(message)](message)
            except EOFError:
                if rank in replica.workers.ranks:  # else a message before it said that loading failed
                    self._on_workers_lost(replica, "")
                return

    # -- clients --

    def _on_client_message(self, client: bytes, message: ToScheduler) -> None:
        if isinstance(message, Hello):
            self.clients.greet(client, message, self.state)
        elif isinstance(message, GenerateRequest):
            self._on_generate(client, message)
        elif isinstance(message, CancelRequest):
            record = self.requests.get(message.request_id)
            if record is not None and record.client == client:
                self._end(message.request_id, Cancelled(request_id=message.request_id))
        elif isinstance(message, WatchRequest | PreviewTaken):
            self.previews.heard(client, message)
        elif isinstance(message, StatusRequest):
            self.clients.send(client, status_of(message.query_id, ledger=self.ledger, **self._facts()))
        elif isinstance(message, MetricsRequest):
            text = self.observer.metrics.text(open_metrics=message.open_metrics)
            self.clients.send(client, MetricsReply(query_id=message.query_id, text=text))
        elif isinstance(message, ControlRequest):
            self.control.asked(client, message)
        elif isinstance(message, LoraRequest):
            self.loras.asked(client, message)

    def _on_generate(self, client: bytes, message: GenerateRequest) -> None:
        message = msgspec.structs.replace(message, params=self.loras.stamped(message.params))
        refusal = self._refusal(message)
        if refusal is not None:
            self.observer.refused(message.request_id, code=refusal.code)
            self.ledger.refuse_inputs(message.inputs)
            self.clients.send(client, Failed(request_id=message.request_id, error=refusal))
            return
        self.ledger.keep_inputs(message.request_id, message.inputs)
        self._warm_up_for(message.params, message.inputs)
        record = self._enqueue(message.request_id, client, message.params, max_attempts=message.max_attempts)
        record.durable = message.durable
        self.states.find(record)
        place = self.waiting.place(record)
        self.observer.received(record, num_before=place.position)
        self._tell_place(record, place)

    def _tell_place(self, record: RequestRecord, place: Place) -> None:
        record.told_position, record.told_at = place.position, time.monotonic()
        eta_s = self.admission.eta_s(place.work)
        uses = record.params.lora_uses
        self._tell(record, Queued(request_id=record.request_id, position=place.position, eta_s=eta_s, lora=uses))

    def _enqueue(
        self,
        request_id: str,
        client: bytes | None,
        params: SamplingParams,
        *,
        max_attempts: int,
        replica: int | None = None,
    ) -> RequestRecord:
        self.num_arrived += 1
        record = self.requests[request_id] = RequestRecord(
            request_id=request_id,
            client=client,
            params=params,
            order=self.num_arrived,
            max_attempts=max_attempts,
            lora_ids=self.loras.ids_of(params),
            replica=replica,
        )
        self.waiting.push(record)
        self.deadlines.watch(record)
        return record

    def _refusal(self, message: GenerateRequest) -> ErrorInfo | None:
        if self.state.state == "failed":
            return self.state.error
        if message.request_id in self.requests:
            return InvalidRequest(f"request_id: {message.request_id} is already running", param="request_id").info()
        unknown = self.loras.refusal(message.params)
        return unknown or self.admission.refusal(message.params, has_inputs=message.inputs is not None)

    def _on_client_lost(self, message: ClientLost) -> None:
        gone = self.clients.forget(message.client_name)
        for record in [r for r in self.requests.values() if r.client in gone]:
            cancelled = Cancelled(request_id=record.request_id, reason="the client is gone")
            self._end(record.request_id, cancelled, comes_again=True)

    def _facts(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "waiting": self.waiting,
            "replicas": self.replicas,
            "num_restarts": self.num_restarts,
        }

    def _snapshot(self) -> EngineSnapshot:
        return snapshot_of(model_names(self.config.args.model)[0], **self._facts())

    def _tell(self, record: RequestRecord, event: RequestEvent) -> None:
        if record.client is not None:
            self.clients.send(record.client, event)

    def _set_state(self, state: Any, *, detail: str = "", error: ErrorInfo | None = None, model: Any = None) -> None:
        self.state = EngineState(state=state, detail=detail, error=error, model=model or self.state.model)
        self.clients.broadcast(self.state)

    # -- workers: loading, loss --

    def _on_loading(self, message: Loading) -> None:
        """An engine that was ready queues what comes while it loads again, or goes on with its other replicas."""
        if self.state.state != "ready":
            again = self.state.state in ("recovering", "reloading")
            self._set_state(self.state.state if again else "loading", detail=message.detail)

    def _on_model_ready(self, replica: Replica, message: ModelReady) -> None:
        model = with_cost_limit(message.model, self.config.args.execution)
        replica.workers.ready = True
        self.loras.ready(replica)
        replica.workers.budget_bytes = message.budget_bytes
        replica.load_attempts = 0
        if self.replicas.loaded and not self.control.took(model):
            return
        self.admission.model_ready(model)
        # On a GPU the next tick waits there while one runs.
        replica.depth = 2 if model.device.startswith("cuda") else 1
        mode = replica.warm_up.choose_mode(serves_http=self.config.serves_http, device=model.device)
        if mode == "server" and not replica.warm_up.under_way:
            try:
                wishes = replica.warm_up.for_server(model)
            except InvalidRequest as error:
                self._fail_engine(error.info())
                return
            for params in wishes:
                self._start_warm_up(replica, params, input_shapes(model.limits.inputs, params))
        self._become_ready(model)

    def _become_ready(self, model: ModelInfo | None = None) -> None:
        """If it can: at first, and with new weights, when all replicas serve; after a loss, as soon as one does."""
        if self.state.state not in ("starting", "loading", "reloading", "recovering"):
            return
        needed = 1 if self.state.state == "recovering" else len(self.replicas.running)
        if self.replicas.num_serving >= needed:
            self._set_state("ready", model=model)
        elif self.replicas.loaded:
            self._set_state(self.state.state, detail="warming up", model=model)

    def _start_warm_up(self, replica: Replica, params: SamplingParams, shapes: InputShapes) -> None:
        """With black inputs of these shapes."""
        request_id = replica.warm_up.start(params)
        try:
            self.ledger.keep_inputs(request_id, shapes.fill(self.run_dir.blank))
        except StorageError as error:
            self._on_warm_up_ended(replica, request_id, Failed(request_id=request_id, error=error.info()))
            return
        self._enqueue(request_id, None, params, max_attempts=1, replica=replica.index)
        logger.info("warm-up of %dx%d, %d frames", params.width, params.height, params.num_frames)

    def _warm_up_for(self, params: SamplingParams, inputs: MediaInputs | None) -> None:
        """Before the first request of a size, a short copy of it, on each replica."""
        for replica in self.replicas.running:
            copy = replica.warm_up.for_request(params)
            if copy is not None:
                self._start_warm_up(replica, copy, InputShapes.of(inputs))

    def _on_warm_up_ended(self, replica: Replica, request_id: str, event: RequestEvent | None) -> None:
        sizes = self.config.args.warmup.warmup_resolutions
        server_waits = replica.warm_up.mode == "server" and replica.workers.ready and self.state.state != "stopping"
        replica.warm_up.ended(request_id, failed=isinstance(event, Failed))
        if isinstance(event, Failed) and server_waits and sizes is not None:
            self._fail_engine(event.error)
            return
        if isinstance(event, Failed):
            logger.warning("a warm-up failed, there are no more: %s", event.error.message)
        if server_waits:
            self._become_ready()

    def _on_heartbeat(self, replica: Replica, message: Heartbeat) -> None:
        replica.workers.allocated_bytes = message.allocated_bytes

    def _on_load_failed(self, replica: Replica, message: LoadFailed) -> None:
        if self._others_serve(replica):
            replica.kill()
            self._replace(replica, why=message.error.message)
        else:
            self._fail_engine(message.error)

    def _others_serve(self, replica: Replica) -> bool:
        """Whether clients need not notice that this replica does not."""
        return self.state.state == "ready" and any(other.serves for other in self.replicas if other is not replica)

    def _fail_engine(self, error: ErrorInfo) -> None:
        """The model cannot run at all: say so to everybody who waits, and to all who come."""
        self.replicas.kill()
        if self.control.goes_back(error):
            return
        self._set_state("failed", error=error)
        for request_id in list(self.requests):
            self._end(request_id, Failed(request_id=request_id, error=error), comes_again=True)

    def _on_rank_lost(self, replica: Replica, message: RankLost) -> None:
        self._on_workers_lost(replica, message.reason)

    def _on_workers_lost(self, replica: Replica, how: str) -> None:
        """A failing rank is a failing replica: replace all of it and requeue what it held. `how`: "" when it died."""
        blamed = {unit.request_id for flight in replica.workers.in_flight.values() for unit in flight.tick.units}
        blamed |= {r.request_id for r in replica.active.values() if r.status == "admitting"}
        loaded = replica.workers.ready
        ended = replica.kill()
        logger.error("worker lost: %s", how or ended, extra=fields(request_ids=sorted(blamed)))
        self.observer.worker_lost()
        self.control.workers_lost()
        self._requeue_running(replica, blamed, how or "its process died")
        if loaded:
            self._start_again(replica)
        else:
            self._replace(replica, why=how or ended)

    def _replace(self, replica: Replica, *, why: str) -> None:
        """Its workers ended before they held the model: another try, as long as there is hope."""
        replica.load_attempts += 1
        if replica.load_attempts < _MAX_LOAD_ATTEMPTS:
            self._start_again(replica)
        elif self._others_serve(replica):
            replica.given_up = True
            for record in [r for r in self.requests.values() if r.client is None and r.replica == replica.index]:
                self._end(record.request_id, Cancelled(request_id=record.request_id))
            logger.error("replica %d stays away, the others serve: %s", replica.index, why)
        else:
            text = f"the worker died {replica.load_attempts} times while loading the model; the log says how"
            self._fail_engine(ModelError(text).info())

    def _start_again(self, replica: Replica) -> None:
        others_serve = self._others_serve(replica)
        self.num_restarts += 1
        replica.workers.start()
        if not others_serve:
            self._set_state("recovering", detail="a worker was lost and is being replaced")

    def _requeue_running(self, replica: Replica, blamed: set[str], how: str) -> None:
        running = [r for r in replica.active.values() if r.status in ("admitting", "running", "parking")]
        for record in sorted(running, key=lambda r: r.order, reverse=True):
            if record.request_id in blamed and record.attempts >= record.max_attempts:
                text = f"the worker was lost {record.attempts} times while it ran this request; the last time, {how}"
                self._end(record.request_id, Failed(request_id=record.request_id, error=record.loss(text, blamed)))
                continue
            if record.request_id in blamed:
                record.blame()
            self.observer.requeued(record, reason="worker_lost")
            self._back_to_queue(record)

    def _back_to_queue(self, record: RequestRecord) -> None:
        """It has had its turn, so it comes first in its class."""
        self.output.send(DropOutput(request_id=record.request_id))
        self.ledger.drop_request(record.request_id)
        record.reset()
        self.replicas.drop(record)
        self.waiting.push(record, front=True)

    def _check_silence(self, replica: Replica) -> None:
        reason = replica.silence()
        if reason is not None:
            self._on_workers_lost(replica, reason)

    # -- requests --

    def _admit_waiting(self) -> None:
        """Hand over as many as the replicas take."""
        while len(self.waiting):
            found = self.replicas.next_to_start(lambda r: not self.control.holds(r) and not self.loras.holds(r))
            if found is None:
                return
            replica, record = found
            has_inputs = self.ledger.inputs_of(record.request_id) is not None
            error = self.admission.too_late(record, has_inputs=has_inputs)
            if error is None:
                self._hand_over(replica, record)
            else:
                self._end(record.request_id, Failed(request_id=record.request_id, error=error))

    def _hand_over(self, replica: Replica, record: RequestRecord) -> None:
        self.waiting.remove(record)
        replica.take(record)
        record.status = "admitting"
        record.handed_at = time.monotonic()
        record.started_at = record.started_at or record.handed_at
        record.warmup_excluded = shape_of(record.params) in replica.warm_up.warm
        replica.workers.send(
            Admit(
                request_id=record.request_id,
                params=record.params,
                state_file=record.state_file if record.has_saved_state else None,
                inputs=self.ledger.inputs_of(record.request_id),
                lora_ids=record.lora_ids,
            )
        )

    def _on_admitted(self, message: Admitted) -> None:
        record = self.requests.get(message.request_id)
        if record is None:  # cancelled meanwhile; its Release follows the Admit in the pipe
            return
        self.observer.started(record)
        record.begin(message, self.replicas.holder(record).dispatcher.share.account(record.share_class))
        self.admission.admitted(record)
        if record.needs_pixels:
            self.output.send(record.open_output(self.config.args.storage.output_path))
        self._tell(record, record.started_event())

    def _on_tick_done(self, replica: Replica, message: TickDone) -> None:
        settled = replica.dispatcher.settle(message, replica.active)
        self.observer.units_done(settled.done, peak_bytes=message.peak_bytes)
        self.admission.units_done(settled.done, seconds=sum(lane.ms for lane in message.lanes) / 1000)
        for record, error in settled.failed:
            self._end(record.request_id, Failed(request_id=record.request_id, error=error))
        running = sum(record.status == "running" for record in replica.active.values())
        for unit in settled.done:
            self._tell(unit.record, unit.record.progress(replica.dispatcher.learned, running))
            if unit.phase.lane == "denoise":
                self.states.after_step(unit.record)
            self._finish_if_complete(unit.record)

    def _on_state_saved(self, message: StateSaved) -> None:
        record = self.requests.get(message.request_id)
        self.states.saved(message, record)
        if record is None or record.status != "parking":
            return
        if message.error is not None:
            record.status = "running"
            return
        self.replicas.send(record, Release(request_id=record.request_id))
        self.observer.requeued(record, reason="preempted")
        self._back_to_queue(record)
        self._tell_place(record, self.waiting.place(record))

    def _on_chunk(self, message: OutputChunk) -> None:
        record = self.requests.get(message.request_id)
        if record is None or not record.needs_pixels:
            self.run_dir.discard(message.frames)
            return
        self.ledger.add(message.request_id, message.frames)
        self.output.send(
            OutputFrames(
                request_id=message.request_id,
                first_frame=message.first_frame,
                last=message.last,
                frames=message.frames,
            )
        )

    def _on_latents(self, message: LatentsReady) -> None:
        record = self.requests.get(message.request_id)
        if record is None:
            self.run_dir.discard(message.latents)
            return
        self.ledger.add(message.request_id, message.latents)
        record.latents = message.latents

    def _on_profile(self, message: ProfileReady) -> None:
        record = self.requests.get(message.request_id)
        if record is not None:
            record.profile_path = message.path
            record.notes += () if message.note is None else (message.note,)

    def _on_output_hello(self, message: OutputHello) -> None:
        if self.output.greeted():
            error = StorageError("the process that writes results was restarted while it held this one").info()
            for record in [r for r in self.replicas.active() if r.needs_pixels and r.cursor is not None]:
                self._end(record.request_id, Failed(request_id=record.request_id, error=error))

    def _on_output_done(self, message: OutputDone) -> None:
        record = self.requests.get(message.request_id)
        if record is None or record.cursor is None:
            for array in (message.frames, message.encoded):
                if array is not None:
                    self.run_dir.discard(array)
            self.output.remove(message)
            return
        self.ledger.add(message.request_id, message.frames, message.encoded)
        record.output = message
        self._finish_if_complete(record)

    def _finish_if_complete(self, record: RequestRecord) -> None:
        assert record.cursor is not None
        if record.cursor.finished and record.status in ("running", "parking"):
            record.status = "saving"
            self.replicas.send(record, Release(request_id=record.request_id))
        if record.complete:
            finished = record.finished_event()
            self.observer.finished(record, finished)
            self.ledger.drop_inputs(record.request_id)
            self._tell(record, finished)
            del self.requests[record.request_id]
            self.replicas.drop(record)
            self._after_end(record, None)

    def _on_failure(self, message: AdmitFailed | OutputFailed) -> None:
        self._end(message.request_id, Failed(request_id=message.request_id, error=message.error))

    def _end(self, request_id: str, event: Failed | Cancelled, *, comes_again: bool = False) -> None:
        """The one place where a request ends without a result. The Release follows all its ticks in the pipe.

        `comes_again`: the client or the engine ends, not the request's purpose; a durable one keeps its saved state.
        """
        record = self.requests.pop(request_id, None)
        if record is None:
            return
        if record.status == "queued":
            self.waiting.remove(record)
        else:
            self.replicas.send(record, Release(request_id=request_id))
            self.replicas.drop(record)
            if record.needs_pixels:
                self.output.send(DropOutput(request_id=request_id))
            self.ledger.drop_request(request_id)
        self.ledger.drop_inputs(request_id)
        self.observer.stopped(record, event)
        self._tell(record, event)
        self._after_end(record, event, comes_again=comes_again)

    def _after_end(self, record: RequestRecord, event: Failed | Cancelled | None, *, comes_again: bool = False) -> None:
        self.states.drop(record, comes_again=comes_again)
        self.previews.forget(record.request_id)
        if record.client is None:
            self._on_warm_up_ended(self.replicas.holder(record), record.request_id, event)

    def _shut_down(self) -> None:
        self._set_state("stopping")
        self.states.save_before_end(self.requests)
        for request_id in list(self.requests):
            reason = EngineStopped("the engine stopped").message
            cancelled = Cancelled(request_id=request_id, reason=reason, engine_stopped=True)
            self._end(request_id, cancelled, comes_again=True)
        self.replicas.stop()
        self.context.destroy(linger=500)
        self.run_dir.remove()  # a killed supervisor could not; one that lives does it again


def main() -> None:
    """Entry point of the process."""
    parent = inherited_connection()
    config = EngineConfig.from_bytes(parent.recv_bytes())
    configure_logging(config.args.logging)
    scheduler = Scheduler(config, parent)
    scheduler.run()


if __name__ == "__main__":
    main()
