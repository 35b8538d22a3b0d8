"""What the HTTP server needs of the engine and of its own settings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EngineStopped, ErrorInfo, MemoryReleased, NotReady, RemoteError
from sglang.multimodal_gen.errors_http import ModelNotFound
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import BodyLimits
from sglang.multimodal_gen.runtime.entrypoints.openai.webhooks import WebhookTarget
from sglang.multimodal_gen.runtime.managers.messages import (
    EngineState,
    Finished,
    LoraReply,
    LoraRequest,
    MappedArray,
    MediaInputs,
    Operation,
    RequestEvent,
    Status,
)
from sglang.multimodal_gen.runtime.managers.state_dir import StateDir
from sglang.multimodal_gen.runtime.postprocess.object_store import ObjectStore

if TYPE_CHECKING:
    import numpy as np


class Handle(Protocol):
    """One running request."""

    request_id: str

    def __aiter__(self) -> AsyncIterator[RequestEvent]:
        """The request's events; the last one is terminal."""

    async def result(self, on_event: Callable[[RequestEvent], None] = ...) -> Finished:
        """The outcome; `on_event` sees what comes before it.

        Raises: ServingError when the request failed or was cancelled.
        """


class Engine(Protocol):
    """The engine as entry points see it."""

    @property
    def state(self) -> EngineState:
        """The last state that the scheduler told."""

    def stored(self, inputs: DecodedInputs) -> AbstractAsyncContextManager[MediaInputs | None]:
        """Inputs as `submit` takes them, any number of times within the block. Raises StorageError."""

    async def submit(
        self,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        inputs: MediaInputs | None = None,
        durable: bool = False,
    ) -> Handle:
        """Start one output; `params` are complete. A `durable` one goes on where it was if its id has come before."""

    async def cancel(self, request_id: str) -> None:
        """Stop a request; ids that are unknown or ended are ignored."""

    async def watch(self, request_id: str, *, watched: bool) -> None:
        """Have previews of a running request sent as they come, or no more; unknown and ended ids are ignored."""

    async def metrics(self, *, open_metrics: bool = False) -> str:
        """The scheduler's metrics in Prometheus' text format or as OpenMetrics. Raises ServingError."""

    async def status(self) -> Status:
        """A snapshot of the scheduler. Raises ServingError."""

    async def control(self, operation: Operation, *, model_path: str | None = None) -> str:
        """An operation on the whole engine; what was done, in a sentence. Raises ServingError."""

    async def loras(self, request: LoraRequest) -> LoraReply:
        """An operation on adapters; its `query_id` is given here. Raises ServingError."""

    def take(self, ref: MappedArray) -> np.ndarray:
        """The array of a result; its file is unlinked."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How many video jobs are kept, how long, in how many bytes, and who is told of their ends. Jobs that `outlive` the
    server go on with the next one."""

    capacity: int = 10_000
    lifetime_s: float = 7 * 24 * 3600.0
    max_output_bytes: int = 50 * 2**30
    delete_timeout_s: float = 10.0
    webhook: WebhookTarget | None = None
    outlive: bool = True


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """How this server answers. `model_names`: the served name, then the others that requests may use.

    `state` is the directory of this server; images and videos wait there to be fetched, unless results are uploaded to
    an `object_store`. `allowed_hosts` None is any. `options` are those of the server with their sources, as
    administrators may see them.
    """

    model_names: tuple[str, ...]
    state: StateDir
    jobs: JobSettings = field(default_factory=JobSettings)
    body: BodyLimits = field(default_factory=BodyLimits)
    header_timeout_s: float = 10.0
    shutdown_grace_s: float = 5.0
    max_images: int = 1000
    image_lifetime_s: float = 3600.0
    idempotency_lifetime_s: float = 3600.0
    heartbeat_s: float = 15.0
    admin_api_key: str | None = field(default=None, repr=False)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: frozenset[str] | None = None
    cors_origins: frozenset[str] = frozenset()
    max_header_bytes: int = 64 * 2**10
    max_connections_per_ip: int = 0
    max_queued_requests: int = 0
    health_timeout_s: float = 30.0
    backend: str = "auto"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    studio: bool = True
    object_store: ObjectStore | None = None


def require_model(engine: Engine, settings: HttpSettings, name: str | None) -> ModelInfo:
    """What the engine serves, when it can take requests and `name` (None: whatever is served) is it.

    Raises:
        ModelNotFound: another model was asked for.
        ServingError: 503 with the reason while the engine starts, stops or has failed.
    """
    if name is not None and name not in settings.model_names:
        raise ModelNotFound(name, served=settings.model_names[0])
    state = engine.state
    if state.state == "failed":
        raise RemoteError(load_failure(state))
    if state.state == "stopping":
        raise EngineStopped("the server is shutting down")
    if state.state == "asleep":
        raise MemoryReleased("the engine's memory is released; the administrator must resume it")
    # An engine that recovers or loads new weights queues what arrives until it has a worker again.
    if state.model is None or state.state not in ("ready", "recovering", "reloading"):
        raise NotReady(f"the model is not ready yet (state: {state.state}); try again")
    return state.model


def load_failure(state: EngineState) -> ErrorInfo:
    """What clients learn of a failed engine: the cause's code; the sentence, which may name files, is in the log."""
    code = state.error.code if state.error is not None else EngineStopped.code
    return ErrorInfo(code=code, message="the engine has failed; the server's log says why", http_status=503)
