"""`EngineClient`: an entry point's view of the engine, in one asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import msgspec
import zmq
import zmq.asyncio

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EngineStopped, ErrorInfo, RemoteError, RequestCancelled, StorageError
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import DecodedInputs
from sglang.multimodal_gen.runtime.managers.messages import (
    PROTOCOL_VERSION,
    TERMINAL_EVENTS,
    Cancelled,
    CancelRequest,
    Codec,
    ControlReply,
    ControlRequest,
    EngineState,
    Failed,
    Finished,
    GenerateRequest,
    Hello,
    LoraReply,
    LoraRequest,
    MappedArray,
    MediaInputs,
    Message,
    MetricsReply,
    MetricsRequest,
    Operation,
    Preview,
    PreviewTaken,
    Refused,
    RequestEvent,
    Status,
    StatusRequest,
    ToClient,
    WatchRequest,
    encode,
)
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir

if TYPE_CHECKING:
    import numpy as np


class RequestHandle:
    """The events of one request, in order; the last one is Finished, Failed or Cancelled."""

    def __init__(self, request_id: str, *, on_preview: Callable[[str], Awaitable[None]] | None = None) -> None:
        """`on_preview` is awaited when somebody takes a preview; only then the next one is sent."""
        self.request_id = request_id
        self._on_preview = on_preview
        self._events: asyncio.Queue[RequestEvent] = asyncio.Queue()

    def put(self, event: RequestEvent) -> None:
        """Called by the client for each event that arrives."""
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[RequestEvent]:
        """Until and with the terminal event."""
        while True:
            event = await self._events.get()
            if isinstance(event, Preview) and self._on_preview is not None:
                await self._on_preview(self.request_id)
            yield event
            if isinstance(event, TERMINAL_EVENTS):
                return

    async def result(self, on_event: Callable[[RequestEvent], None] = lambda event: None) -> Finished:
        """Wait for the end; `on_event` sees what comes before it.

        Raises:
            RemoteError: the request failed; code, status and sentence are those of its error.
            RequestCancelled: it was cancelled.
        """
        async for event in self:
            if isinstance(event, Finished):
                return event
            raise_if_terminal(event)
            on_event(event)
        raise AssertionError("a request ended without a terminal event")


def raise_if_terminal(event: RequestEvent) -> None:
    """Raise the error that a Failed or Cancelled event stands for; other events pass."""
    if isinstance(event, Failed):
        raise RemoteError(event.error)
    if isinstance(event, Cancelled):
        raise RequestCancelled(f"the request was {event.reason}" if event.reason == "cancelled" else event.reason)


class EngineClient:
    """Connects to the scheduler of a run directory. All methods belong to the loop that `start` ran in."""

    def __init__(self, run_dir: str, *, name: str) -> None:
        self.run_dir = RunDir.at(run_dir)
        self.name = name
        self.state = EngineState(state="starting")
        self.on_state: Callable[[EngineState], None] = lambda state: None
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._codec = Codec(ToClient)
        self._handles: dict[str, RequestHandle] = {}
        self._inputs: dict[str, MediaInputs] = {}
        self._queries: dict[str, asyncio.Future[Any]] = {}
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect and say hello; does not wait for the model."""
        self._connect()
        await self._send(Hello(protocol_version=PROTOCOL_VERSION, client_name=self.name))
        self._reader = asyncio.create_task(self._read())

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.reconnect_ivl = 10
        self._socket.connect(self.run_dir.scheduler_address)

    async def close(self) -> None:
        """Disconnect; whoever still waits gets EngineStopped."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._fail_all(EngineStopped("the engine was closed").info())
        self._context.destroy(linger=0)

    async def wait_ready(self) -> EngineState:
        """Until the state is `ready`.

        Raises:
            RemoteError: the model cannot be loaded, or the engine is stopping.
        """
        while self.state.state != "ready":
            if self.state.error is not None and self.state.state == "failed":
                raise RemoteError(self.state.error)
            if self.state.state == "stopping":
                raise EngineStopped("the engine is shutting down")
            self._changed.clear()
            await self._changed.wait()
        return self.state

    @contextlib.asynccontextmanager
    async def stored(self, inputs: DecodedInputs) -> AsyncIterator[MediaInputs | None]:
        """Inputs in the run directory, for any number of requests that are submitted meanwhile.

        Raises: StorageError when there is no room.
        """
        if not inputs:
            yield None
            return
        files: list[MappedArray] = []
        storing = asyncio.create_task(asyncio.to_thread(self._store, inputs, files))
        try:
            yield await asyncio.shield(storing)
        finally:
            await asyncio.wait({storing})  # a thread cannot be stopped, and what it still writes must go as well
            self._discard(files)

    def _store(self, inputs: DecodedInputs, files: list[MappedArray]) -> MediaInputs:
        def put(array: np.ndarray | None) -> MappedArray | None:
            if array is None:
                return None
            files.append(self.run_dir.put(array))
            return files[-1]

        video = inputs.video
        return MediaInputs(
            images=tuple(cast(MappedArray, put(image)) for image in inputs.images),
            mask=put(inputs.mask),
            last_image=put(inputs.last_image),
            video=None if video is None else put(video.frames),
            video_fps=None if video is None else video.fps,
        )

    def _linked(self, inputs: MediaInputs) -> MediaInputs:
        """The same content as files of one request's own."""
        files: dict[str, MappedArray] = {}
        try:
            for array in inputs.arrays:
                files[array.file] = self.run_dir.link(array)
        except StorageError:
            self._discard(files.values())
            raise
        return MediaInputs(
            images=tuple(files[image.file] for image in inputs.images),
            mask=inputs.mask and files[inputs.mask.file],
            last_image=inputs.last_image and files[inputs.last_image.file],
            video=inputs.video and files[inputs.video.file],
            video_fps=inputs.video_fps,
        )

    def _discard(self, files: Iterable[MappedArray]) -> None:
        for array in files:
            self.run_dir.discard(array)

    async def submit(
        self,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        inputs: MediaInputs | None = None,
        durable: bool = False,
    ) -> RequestHandle:
        """Queue one complete, checked request; `inputs` come from `stored`, `durable` see GenerateRequest."""
        handle = RequestHandle(request_id or new_request_id(), on_preview=self._preview_taken)
        own = None if inputs is None else self._linked(inputs)
        self._handles[handle.request_id] = handle
        if own is not None:
            self._inputs[handle.request_id] = own
        await self._send(GenerateRequest(request_id=handle.request_id, params=params, inputs=own, durable=durable))
        return handle

    async def cancel(self, request_id: str) -> None:
        """Ask for the end of a request; its handle gets the terminal event."""
        await self._send(CancelRequest(request_id=request_id))

    async def watch(self, request_id: str, *, watched: bool) -> None:
        """Have previews of a running request sent as they come, or no more; unknown and ended ids are ignored."""
        await self._send(WatchRequest(request_id=request_id, watched=watched))

    async def _preview_taken(self, request_id: str) -> None:
        if request_id in self._handles:
            await self._send(PreviewTaken(request_id=request_id))

    async def status(self) -> Status:
        """A snapshot of the scheduler."""
        return cast(Status, await self._ask(lambda query_id: StatusRequest(query_id=query_id)))

    async def metrics(self, *, open_metrics: bool = False) -> str:
        """The scheduler's metrics in Prometheus' text format, or as OpenMetrics."""
        reply = await self._ask(lambda query_id: MetricsRequest(query_id=query_id, open_metrics=open_metrics))
        return cast(MetricsReply, reply).text

    async def control(self, operation: Operation, *, model_path: str | None = None) -> str:
        """Do an operation on the whole engine and wait until it is done; what was done, in a sentence.

        Raises: RemoteError when it was refused or failed.
        """

        def request(query_id: str) -> Message:
            return ControlRequest(query_id=query_id, operation=operation, model_path=model_path)

        reply = cast(ControlReply, await self._ask(request))
        if reply.error is not None:
            raise RemoteError(reply.error)
        return reply.message

    async def loras(self, request: LoraRequest) -> LoraReply:
        """Do an operation on adapters and wait until it is done; its `query_id` is given here.

        Raises: RemoteError when it was refused or failed.
        """
        reply = cast(LoraReply, await self._ask(lambda query_id: msgspec.structs.replace(request, query_id=query_id)))
        if reply.error is not None:
            raise RemoteError(reply.error)
        return reply

    async def _ask(self, question: Callable[[str], Message]) -> Any:
        query_id = secrets.token_hex(8)
        answer = self._queries[query_id] = asyncio.get_running_loop().create_future()
        try:
            await self._send(question(query_id))
            return await answer
        finally:
            self._queries.pop(query_id, None)

    def take(self, ref: MappedArray) -> np.ndarray:
        """Map an array that an event names; possible once."""
        return self.run_dir.take(ref)

    async def scheduler_lost(self, error: ErrorInfo, *, restarting: bool) -> None:
        """The supervisor saw the scheduler die: end what it held, and greet the next one."""
        self._fail_all(error)
        self._set_state(
            EngineState(
                state="recovering" if restarting else "failed",
                detail=error.message,
                error=error,
                model=self.state.model,
            )
        )
        if restarting:
            await self._send(Hello(protocol_version=PROTOCOL_VERSION, client_name=self.name))

    async def _send(self, message: Message) -> None:
        assert self._socket is not None
        await self._socket.send(encode(message))

    async def _read(self) -> None:
        assert self._socket is not None
        while True:
            payload = await self._socket.recv()
            with contextlib.suppress(
                msgspec.DecodeError
            ):  # a newer scheduler's event; the handshake refused it already
                self._on_message(cast(ToClient, self._codec.decode(payload)))

    def _on_message(self, message: ToClient) -> None:
        if isinstance(message, EngineState):
            self._set_state(message)
        elif isinstance(message, Status | MetricsReply | ControlReply | LoraReply):
            waiting = self._queries.get(message.query_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, Refused):
            if message.request_id is None:
                self._set_state(EngineState(state="failed", error=message.error))
        elif isinstance(message, RequestEvent):
            handle = self._handles.get(message.request_id)
            if isinstance(message, TERMINAL_EVENTS):
                self._handles.pop(message.request_id, None)
                self._inputs.pop(message.request_id, None)  # the scheduler has unlinked them
            if handle is not None:
                handle.put(message)

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()
        self.on_state(state)

    def _fail_all(self, error: ErrorInfo) -> None:
        for request_id, handle in list(self._handles.items()):
            handle.put(Failed(request_id=request_id, error=error))
        self._handles.clear()
        for inputs in self._inputs.values():  # of a scheduler that is gone, or that no longer knows this client
            self._discard(inputs.arrays)
        self._inputs.clear()
        for waiting in self._queries.values():
            if not waiting.done():
                waiting.set_exception(RemoteError(error))


def new_request_id() -> str:
    """128 random bits, so that nobody guesses another's."""
    return f"req_{secrets.token_hex(16)}"
