"""An HTTP server on a socket, in a thread. Its engine is a small object with EngineClient's methods that ends requests
when the test says so."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from sglang.multimodal_gen.configs.model_info import ModelInfo, TaskLimits
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EngineStopped, OutOfMemory, ServingError
from sglang.multimodal_gen.runtime.entrypoints.engine_client import RequestHandle
from sglang.multimodal_gen.runtime.entrypoints.http_server import create_app, serve
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings
from sglang.multimodal_gen.runtime.managers.messages import (
    Cancelled,
    EngineState,
    Failed,
    Finished,
    LoraReply,
    LoraRequest,
    LoraStatus,
    MappedArray,
    MediaInputs,
    Operation,
    Preview,
    Progress,
    Queued,
    Started,
    Status,
)
from sglang.multimodal_gen.runtime.managers.state_dir import StateDir
from sglang.multimodal_gen.runtime.postprocess.object_store import StoredFile

MODEL = ModelInfo(
    name="tiny",
    pipeline_class="WanPipeline",
    tasks=("text-to-video",),
    precision="fp32",
    device="cpu",
    num_parameters=1,
    weight_bytes=4,
    load_seconds=0.1,
    limits=TaskLimits(size_multiple=16, max_pixels=512 * 512, frame_stride=4, max_frames=81, max_sequence_length=64),
    defaults=SamplingParams(width=128, height=96, num_frames=33, fps=16, num_inference_steps=4, guidance_scale=3.0),
)
READY = EngineState(state="ready", model=MODEL)
SECRET_PATH = "/home/somebody/checkpoints"


class ScriptedEngine:
    """Ends a request at once, or while `held` is set when it is cleared; the prompt `fail` fails.

    A request has as many previews as it wants, and one for each `show`; `watched` is who is looked at. While `waiting`
    is set, also for engines to come, requests stay in the queue. Results say that `stored_files` were uploaded.
    """

    waiting = False
    stored_files: Mapping[str, StoredFile] = {}

    def __init__(self) -> None:
        self.state = READY
        self.held = False
        self.refusal: ServingError | None = None
        self.submitted: dict[str, SamplingParams] = {}
        self.inputs: dict[str, DecodedInputs] = {}
        self.cancelled: list[str] = []
        self.durable: set[str] = set()
        self.num_submits: collections.Counter[str] = collections.Counter()
        self.operations: list[tuple[str, Any]] = []
        self.watched: dict[str, bool] = {}
        self._handles: dict[str, RequestHandle] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._arrays: dict[str, bytes] = {}
        self._stored: dict[int, DecodedInputs] = {}

    @contextlib.asynccontextmanager
    async def stored(self, inputs: DecodedInputs) -> AsyncIterator[MediaInputs | None]:
        """Remember them until the block ends."""
        if not inputs:
            yield None
            return
        media = MediaInputs()
        self._stored[id(media)] = inputs
        yield media
        del self._stored[id(media)]

    async def submit(
        self,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        inputs: MediaInputs | None = None,
        durable: bool = False,
    ) -> RequestHandle:
        """Record it and play its events."""
        assert request_id is not None
        self._loop = asyncio.get_running_loop()
        self.num_submits[request_id] += 1
        if durable:
            self.durable.add(request_id)
        if inputs is not None:
            self.inputs[request_id] = self._stored[id(inputs)]
        handle = self._handles[request_id] = RequestHandle(request_id)
        if self.refusal is not None:
            handle.put(Failed(request_id=request_id, error=self.refusal.info()))
            return handle
        self.submitted[request_id] = params
        self._tasks[request_id] = asyncio.create_task(self._play(handle, params))
        return handle

    async def cancel(self, request_id: str) -> None:
        """End it as the scheduler does."""
        self.cancelled.append(request_id)
        task = self._tasks.get(request_id)
        if task is not None and not task.done():
            task.cancel()
            self._handles[request_id].put(Cancelled(request_id=request_id))

    def interrupt(self) -> None:
        """End all that runs as when the scheduler process dies; from any thread."""

        def end() -> None:
            for request_id, task in self._tasks.items():
                if not task.done():
                    task.cancel()
                    error = EngineStopped("the scheduler process died").info()
                    self._handles[request_id].put(Failed(request_id=request_id, error=error))

        self._loop.call_soon_threadsafe(end)

    async def watch(self, request_id: str, *, watched: bool) -> None:
        """Remember it."""
        self.watched[request_id] = watched

    def show(self, request_id: str, step: int) -> None:
        """Send a preview; belongs to the server's loop."""
        self._handles[request_id].put(preview_of(request_id, step))

    def wait_again(self, request_id: str, position: int) -> None:
        """Say that so many are before it; belongs to the server's loop."""
        self._handles[request_id].put(Queued(request_id=request_id, position=position, eta_s=9.0))

    async def metrics(self, *, open_metrics: bool = False) -> str:
        """As when there is no scheduler."""
        raise EngineStopped("the scheduler process died")

    async def status(self) -> Status:
        """As when one request waits."""
        return Status(
            query_id="",
            state=self.state,
            num_queued=1,
            num_running=2,
            num_workers=1,
            worker_pids=(4711,),
            num_worker_restarts=0,
            budget_bytes=1000,
            reserved_bytes=10,
            allocated_bytes=None,
            ledger_files=0,
            ledger_bytes=0,
            ticks=7,
            mean_batch_size=1.5,
        )

    async def control(self, operation: Operation, *, model_path: str | None = None) -> str:
        """Record it, and refuse it if the test says so."""
        self.operations.append((operation, model_path))
        if self.refusal is not None:
            raise self.refusal
        return "done"

    async def loras(self, request: LoraRequest) -> LoraReply:
        """Record it, and refuse it if the test says so; one adapter is set."""
        self.operations.append((request.operation, request))
        if self.refusal is not None:
            raise self.refusal
        adapter = LoraStatus(name="mine", path="/a/mine.safetensors", target="all", scale=0.5)
        return LoraReply(query_id="", message="done", adapters=(adapter,))

    def take(self, ref: MappedArray) -> np.ndarray:
        """Once, as the engine's files."""
        return np.frombuffer(self._arrays.pop(ref.file), dtype=np.uint8)

    async def _play(self, handle: RequestHandle, params: SamplingParams) -> None:
        request_id = handle.request_id
        handle.put(Queued(request_id=request_id, position=0))
        await asyncio.sleep(0)
        while self.waiting:
            await asyncio.sleep(0.005)
        handle.put(Started(request_id=request_id, queue_seconds=0.0, phases=(), notes=("a note",)))
        handle.put(Progress(request_id=request_id, phase="denoise", step=2, total_steps=4, fraction=0.5, eta_s=1.25))
        for step in range(1, params.num_previews + 1):
            await asyncio.sleep(0.01)
            handle.put(preview_of(request_id, step))
        while self.held:
            await asyncio.sleep(0.005)
        if params.prompt == "fail":
            error = OutOfMemory(f"no memory left while loading {SECRET_PATH}/model.safetensors")
            handle.put(Failed(request_id=request_id, error=error.info()))
        else:
            handle.put(self._finished(request_id, params))

    def _finished(self, request_id: str, params: SamplingParams) -> Finished:
        encoded = None
        if params.return_encoded:
            data = encoded_image(params)
            self._arrays[request_id] = data
            encoded = MappedArray(file=request_id, shape=(len(data),), dtype="|u1")
        if params.save_output:
            assert params.output_path is not None and params.output_file_name is not None
            Path(params.output_path).mkdir(parents=True, exist_ok=True)
            path = Path(params.output_path) / params.output_file_name
            path.write_bytes(bytes(range(200)))
            if params.thumbnail:
                path.with_suffix(".thumb.webp").write_bytes(b"thumbnail")
            if params.contact_sheet:
                path.with_suffix(".sheet.jpg").write_bytes(b"contact sheet")
        assert isinstance(params.seed, int) and params.width and params.height and params.num_frames
        return Finished(
            request_id=request_id,
            seed=params.seed,
            width=params.width,
            height=params.height,
            num_frames=params.num_frames,
            output_file_path=None,
            frames=None,
            latents=None,
            encoded=encoded,
            generation_time=0.5,
            computed_steps=3,
            queue_seconds=0.25,
            stage_seconds={},
            step_ms=(),
            step_batch_sizes=(),
            peak_memory_bytes=0,
            attempts=1,
            stored=dict(self.stored_files),
        )


def preview_of(request_id: str, step: int) -> Preview:
    """One whose bytes say its step."""
    return Preview(request_id=request_id, step=step, total_steps=4, media_type="image/webp", image=b"step %d" % step)


def encoded_image(params: SamplingParams) -> bytes:
    """A grey picture of the wanted size and format."""
    assert params.width and params.height and params.output_format
    buffer = io.BytesIO()
    Image.new("RGB", (params.width, params.height), "grey").save(buffer, format=params.output_format)
    return buffer.getvalue()


@dataclasses.dataclass
class RunningServer:
    """A served application and what it runs on."""

    engine: ScriptedEngine
    client: httpx.Client
    port: int
    files_dir: Path
    stop: Callable[[], None]
    end: Callable[[], None]
    call: Callable[[Callable[[], object]], None]

    def post_image(self, **fields: Any) -> httpx.Response:
        """POST an image request with a default prompt."""
        return self.client.post("/v1/images/generations", json={"prompt": "a red circle", **fields})

    def post_video(self, **fields: Any) -> httpx.Response:
        """POST a video job with a default prompt."""
        return self.client.post("/v1/videos", json={"prompt": "a red circle", **fields})

    def exchange(self, request: bytes, *, timeout_s: float = 5.0) -> bytes:
        """What the server answers to raw bytes until it closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply that keeps the whole contract of errors."""
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert reply.json().keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert error["type"] == ("rate_limit_error" if status == 429 else kind)
    assert reply.headers["x-request-id"] and reply.headers["content-type"] == "application/json"
    assert "Traceback" not in reply.text and SECRET_PATH not in reply.text
    return error


def assert_error(reply: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """The whole error contract of one reply."""
    error = error_of(reply, status)
    assert (error["code"], error["param"]) == (code, param), error["message"]


def wait_for(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


Start = Callable[..., RunningServer]


@contextlib.contextmanager
def servers(new_directory: Callable[[], Path]) -> Iterator[Start]:
    """A function that starts a server; all of them stop at the end."""
    stops: list[Callable[[], None]] = []

    def start(*, state: StateDir | None = None, **options: Any) -> RunningServer:
        state = StateDir(new_directory()) if state is None else state
        settings = HttpSettings(model_names=("tiny", "org/tiny"), state=state, **options)
        engine = ScriptedEngine()
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()
        work = serve(create_app(engine, settings), sock, stop=stop, settings=settings)
        thread = threading.Thread(target=loop.run_until_complete, args=(work,))
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

        def stop_soon() -> None:
            loop.call_soon_threadsafe(stop.set)

        def call_in_loop(function: Callable[[], object]) -> None:
            loop.call_soon_threadsafe(function)

        def end() -> None:
            if loop.is_closed():
                return
            stop_soon()
            thread.join()
            client.close()
            loop.close()

        stops.append(end)
        return RunningServer(
            engine=engine,
            client=client,
            port=port,
            files_dir=state.files,
            stop=stop_soon,
            end=end,
            call=call_in_loop,
        )

    try:
        yield start
    finally:
        for end in stops:
            end()
