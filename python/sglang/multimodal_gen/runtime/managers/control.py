"""Operations of administrators on the whole engine: flush its cache, release its memory, load its weights anew.

Released memory is all of it: the worker's process ends, its device context too, and another one loads when the memory
is resumed. New weights come the same way, so that nothing of the old ones stays. Both wait until no request is in the
workers: those that have begun end first, those that have not wait. Whatever fails, the old weights come back.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.errors import (
    EngineStopped,
    ErrorInfo,
    MemoryReleased,
    NotReady,
    OperationInProgress,
    ServingError,
    WeightsDoNotFit,
)
from sglang.multimodal_gen.runtime.managers.clients import Clients
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import ControlReply, ControlRequest, EngineState
from sglang.multimodal_gen.runtime.managers.replica import Replicas
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.worker_messages import CacheFlushed, FlushCache

logger = logging.getLogger(__name__)

_NOTHING_LOADED = "nothing is loaded, so there is nothing to flush"


class SetState(Protocol):
    """Tells all clients the engine's state."""

    def __call__(self, state: str, *, detail: str = "") -> None: ...


@dataclass
class _Flush:
    """One flush that replicas still have to answer."""

    client: bytes
    num_replicas: int
    freed_bytes: int = 0


@dataclass
class _Operation:
    """The one that is under way. `loading`: the workers were ended, and others load; `before` is what to go back to,
    and `error` why."""

    client: bytes
    request: ControlRequest
    loading: bool = False
    before: tuple[EngineConfig, ModelInfo] | None = None
    error: ErrorInfo | None = None


class Control:
    """Takes ControlRequests and answers each once. The scheduler calls it at every place where workers come or go."""

    def __init__(
        self,
        replicas: Replicas,
        clients: Clients,
        requests: Mapping[str, RequestRecord],
        set_state: SetState,
        *,
        state: Callable[[], EngineState],
    ) -> None:
        self._replicas = replicas
        self._clients = clients
        self._requests = requests
        self._state = state
        self._set_state = set_state
        self._operation: _Operation | None = None
        self._flushes: dict[str, _Flush] = {}

    # -- what the scheduler asks --

    def holds(self, record: RequestRecord) -> bool:
        """Whether a waiting request must go on waiting. One that has begun ends with the weights it began with."""
        return self._operation is not None and not self._operation.loading and not record.started_at

    def advance(self) -> None:
        """End the workers for the operation under way, once nothing is in them."""
        operation = self._operation
        if operation is None or operation.loading or not self._replicas.loaded:
            return
        if any(record.started_at and record.status != "saving" for record in self._requests.values()):
            return
        if operation.request.operation == "release_memory_occupation":
            self._end_workers()
            self._set_state("asleep", detail="the administrator has released its memory")
            self._finish("the memory is released")
        else:
            self._load_new_weights(operation)

    def took(self, model: ModelInfo) -> bool:
        """All replicas have loaded; False when they are ended again, since they have loaded what does not fit."""
        operation = self._operation
        if operation is None or not operation.loading:
            return True
        if operation.error is not None:
            self._finish(error=operation.error)
        elif operation.before is not None and _architecture(model) != _architecture(operation.before[1]):
            served, found = (
                f"{m.pipeline_class} of {m.num_parameters} parameters" for m in (operation.before[1], model)
            )
            self.goes_back(WeightsDoNotFit(served=served, found=found).info())
            return False
        else:
            self._finish(f"the weights were loaded in {model.load_seconds:.1f} s")
        return True

    def goes_back(self, error: ErrorInfo) -> bool:
        """The engine cannot run with what was loaded: whether the weights of before are loaded again."""
        operation = self._operation
        if operation is None or not operation.loading:
            return False
        if operation.before is None or operation.error is not None:
            self._finish(error=operation.error or error)
            return False
        logger.error("the new weights cannot be used, the old ones are loaded again: %s", error.message)
        message = f"{error.message}; the weights of before are in use"
        operation.error = dataclasses.replace(error, message=message, param="model_path")
        self._end_workers()
        self._replicas.config = operation.before[0]
        self._start_workers("the weights of before are loaded again")
        return True

    def workers_lost(self) -> None:
        """What the lost ones were asked to forget is gone."""
        for query_id, flush in self._flushes.items():
            self._reply(flush.client, query_id, _NOTHING_LOADED)
        self._flushes.clear()

    def flushed(self, message: CacheFlushed) -> None:
        """One replica has flushed."""
        flush = self._flushes.get(message.query_id)
        if flush is None:
            return
        flush.num_replicas -= 1
        flush.freed_bytes += message.freed_bytes
        if flush.num_replicas == 0:
            del self._flushes[message.query_id]
            self._reply(flush.client, message.query_id, f"{flush.freed_bytes / 2**20:.1f} MiB of embeddings forgotten")

    # -- what clients ask --

    def asked(self, client: bytes, request: ControlRequest) -> None:
        """Begin an operation, or refuse it."""
        try:
            if request.operation == "flush_cache":
                self._flush(client, request.query_id)
            elif request.operation == "resume_memory_occupation":
                self._resume(client, request)
            else:
                self._begin(client, request)
        except ServingError as error:
            self._reply(client, request.query_id, error=error.info())

    def _flush(self, client: bytes, query_id: str) -> None:
        self._replicas.forget_memory()
        loaded = [replica for replica in self._replicas if replica.workers.ready]
        if not loaded:
            self._reply(client, query_id, _NOTHING_LOADED)
            return
        self._flushes[query_id] = _Flush(client=client, num_replicas=len(loaded))
        for replica in loaded:
            replica.workers.send(FlushCache(query_id=query_id))

    def _resume(self, client: bytes, request: ControlRequest) -> None:
        self._refuse_second()
        if self._state().state != "asleep":
            self._reply(client, request.query_id, "the memory was not released")
            return
        self._operation = _Operation(client=client, request=request, loading=True)
        self._start_workers("the weights are loaded again")

    def _begin(self, client: bytes, request: ControlRequest) -> None:
        self._refuse_second()
        state = self._state()
        releases = request.operation == "release_memory_occupation"
        if state.state == "asleep" and releases:
            self._reply(client, request.query_id, "the memory was released before")
            return
        if state.state == "asleep":
            raise MemoryReleased("the engine's memory is released; resume it, then update the weights")
        if state.state in ("failed", "stopping"):
            raise EngineStopped("the engine has failed or is stopping; start the server anew")
        if state.model is None:
            raise NotReady(f"the model is not ready yet (state: {state.state}); try again")
        self._operation = _Operation(client=client, request=request)
        logger.info("%s: waits for the requests that have begun", request.operation)

    def _refuse_second(self) -> None:
        if self._operation is not None:
            raise OperationInProgress(f"{self._operation.request.operation} is under way; wait until it is done")

    # -- workers --

    def _load_new_weights(self, operation: _Operation) -> None:
        model = self._state().model
        assert model is not None, "a worker is ready"
        before = self._replicas.config
        operation.before, operation.loading = (before, model), True
        path = operation.request.model_path
        if path is not None:
            args = dataclasses.replace(before.args, model=dataclasses.replace(before.args.model, model_path=path))
            self._replicas.config = msgspec.structs.replace(before, args=args)
        self._end_workers()
        self._start_workers("new weights are loaded")

    def _end_workers(self) -> None:
        self._replicas.kill()
        self.workers_lost()

    def _start_workers(self, detail: str) -> None:
        self._replicas.start()
        self._set_state("reloading", detail=detail)

    def _finish(self, message: str = "", *, error: ErrorInfo | None = None) -> None:
        operation, self._operation = self._operation, None
        assert operation is not None, "an operation is under way"
        logger.info("%s: %s", operation.request.operation, message if error is None else error.message)
        self._reply(operation.client, operation.request.query_id, message, error=error)

    def _reply(self, client: bytes, query_id: str, message: str = "", *, error: ErrorInfo | None = None) -> None:
        self._clients.send(client, ControlReply(query_id=query_id, message=message, error=error))


def _architecture(model: ModelInfo) -> tuple[object, ...]:
    """What must be equal for weights to take the place of others."""
    return model.pipeline_class, model.num_parameters, model.limits
