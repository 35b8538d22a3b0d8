"""`DiffGenerator`: the Python way in. Starts an engine of its own, works in scripts, notebooks and REPLs alike."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EngineStopped, RemoteError, RequestCancelled, ServingError, StorageError
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.entrypoints.engine_client import EngineClient, RequestHandle
from sglang.multimodal_gen.runtime.entrypoints.generation_result import GenerationResult
from sglang.multimodal_gen.runtime.entrypoints.lora_wishes import (
    LIST_REQUEST,
    listed,
    merge_request,
    remove_request,
    set_request,
    unmerge_request,
)
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import NO_INPUTS, DecodedInputs, MediaSources, split_media
from sglang.multimodal_gen.runtime.entrypoints.perf_dump import prepare_perf_dump, write_perf_dump
from sglang.multimodal_gen.runtime.entrypoints.request_builder import expand_prompts
from sglang.multimodal_gen.runtime.managers.child_process import ChildProcess
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import (
    CachedSteps,
    Cancelled,
    Codec,
    EngineStarted,
    EngineState,
    Failed,
    Finished,
    LoraReply,
    LoraRequest,
    Preview,
    Progress,
    Queued,
    SchedulerLost,
    Started,
    Status,
    SupervisorNote,
)
from sglang.multimodal_gen.runtime.postprocess.storage import check_storage
from sglang.multimodal_gen.runtime.server_args import ServerArgs

if TYPE_CHECKING:
    pass

T = TypeVar("T")
_SUPERVISOR = "sglang.multimodal_gen.runtime.launch_server"
_STOP_GRACE_S = 15.0


@dataclass(frozen=True, kw_only=True)
class GenerationEvent:
    """Something happened to one output; its last event is a GenerationResult or a ServingError."""

    prompt_index: int
    output_index: int
    request_id: str
    event: Queued | Started | Progress | Preview | GenerationResult | ServingError


class DiffGenerator:
    """An engine and a client of it. `close()` it or use it in `with`; collection and process death end it too."""

    def __init__(self, args: ServerArgs) -> None:
        self.args = args
        self._engine = _Engine(args)
        self._finalizer = weakref.finalize(self, self._engine.close)

    @classmethod
    def from_pretrained(cls, model_path: str = "demo", **server_args: Any) -> DiffGenerator:
        """Start an engine for a model and wait until it is ready.

        Args:
            model_path: diffusers directory, hub id, or `demo`.
            server_args: any field of ServerArgs.

        Raises:
            ServingError: an argument is wrong or the model cannot be loaded.
        """
        generator = cls(ServerArgs.from_kwargs(model_path=model_path, **server_args))
        try:
            generator.wait_ready()
        except BaseException:
            generator.close()
            raise
        return generator

    @classmethod
    def from_server_args(cls, args: ServerArgs) -> DiffGenerator:
        """Start an engine without waiting for its model; see `wait_ready`."""
        return cls(args)

    def wait_ready(self, on_state: Callable[[EngineState], None] | None = None) -> ModelInfo:
        """Wait for the model; `on_state` sees each change on the way. Raises the loading error."""
        return self._engine.wait_ready(on_state)

    def generate(self, sampling_params_kwargs: Mapping[str, Any]) -> GenerationResult | list[GenerationResult]:
        """Generate and wait. One output gives one result, several a list in order.

        `image_path`, `mask_path` and `last_image_path` may be paths, PIL images or uint8 arrays [H, W, 3], `image_path`
        also a list of them; `video_path` a path, a list of frames or a uint8 array [T, H, W, 3].

        Raises:
            ServingError: the first failure; the other outputs are cancelled.
        """
        results: dict[tuple[int, int], GenerationResult] = {}
        with contextlib.closing(self.stream(sampling_params_kwargs)) as events:
            for item in events:
                if isinstance(item.event, ServingError):
                    raise item.event
                if isinstance(item.event, GenerationResult):
                    results[item.prompt_index, item.output_index] = item.event
        ordered = [results[key] for key in sorted(results)]
        return ordered[0] if len(ordered) == 1 else ordered

    def stream(self, sampling_params_kwargs: Mapping[str, Any]) -> Generator[GenerationEvent, None, None]:
        """The events of all outputs as they come. Closing the iterator early cancels what still runs."""
        inbox: queue.SimpleQueue[GenerationEvent | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for item in self._engine.events(sampling_params_kwargs):
                    inbox.put(item)
                inbox.put(None)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                inbox.put(error)

        task = self._engine.spawn(pump())
        try:
            while (item := inbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._engine.cancel_task(task)

    async def generate_async(
        self, sampling_params_kwargs: Mapping[str, Any]
    ) -> GenerationResult | list[GenerationResult]:
        """`generate` for any asyncio loop; cancelling the awaiting task cancels the generation."""
        results: dict[tuple[int, int], GenerationResult] = {}
        async with contextlib.aclosing(self.stream_async(sampling_params_kwargs)) as events:
            async for item in events:
                if isinstance(item.event, ServingError):
                    raise item.event
                if isinstance(item.event, GenerationResult):
                    results[item.prompt_index, item.output_index] = item.event
        ordered = [results[key] for key in sorted(results)]
        return ordered[0] if len(ordered) == 1 else ordered

    async def stream_async(self, sampling_params_kwargs: Mapping[str, Any]) -> AsyncGenerator[GenerationEvent, None]:
        """`stream` for any asyncio loop."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[GenerationEvent | BaseException | None] = asyncio.Queue()

        async def pump() -> None:
            try:
                async for item in self._engine.events(sampling_params_kwargs):
                    loop.call_soon_threadsafe(inbox.put_nowait, item)
                loop.call_soon_threadsafe(inbox.put_nowait, None)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                loop.call_soon_threadsafe(inbox.put_nowait, error)

        task = self._engine.spawn(pump())
        try:
            while (item := await inbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._engine.cancel_task(task)

    def cancel(self, request_id: str) -> None:
        """Cancel one output by the id that its events carry."""
        self._engine.call(self._engine.client.cancel(request_id))

    def watch(self, request_id: str, *, watched: bool = True) -> None:
        """Have previews of an output that runs, `preview_max_per_second` at most, or no more; other ids are ignored."""
        self._engine.call(self._engine.client.watch(request_id, watched=watched))

    def status(self) -> Status:
        """A snapshot of the scheduler."""
        return self._engine.call(self._engine.client.status())

    def metrics(self) -> str:
        """The scheduler's metrics in Prometheus' text format; docs/reference/metrics.md lists them."""
        return self._engine.call(self._engine.client.metrics())

    def set_lora(
        self,
        lora_nickname: str | Sequence[str],
        lora_path: str | Sequence[str] | None = None,
        *,
        target: str | Sequence[str] = "all",
        strength: float | Sequence[float] = 1.0,
        merge_mode: str | None = None,
        lora_alpha: float | None = None,
        lora_weight_name: str | None = None,
    ) -> str:
        """Load adapters where they have a path, and set them for later requests that name none; what was done, in a
        sentence. With `merge_mode` "merge" they become part of the weights, once the requests before have ended.

        Raises:
            ServingError: an adapter that cannot be used, a name that is taken or unknown; nothing has changed then.
        """
        fields = {
            "lora_nickname": lora_nickname,
            "lora_path": lora_path,
            "target": target,
            "strength": strength,
            "merge_mode": merge_mode,
            "lora_alpha": lora_alpha,
            "lora_weight_name": lora_weight_name,
        }
        return self._loras(set_request(fields, what="argument")).message

    def merge_lora_weights(self, target: str = "all", strength: float = 1.0) -> str:
        """Make the adapters that are set part of the weights, once the requests before have ended. Raises
        ServingError."""
        return self._loras(merge_request({"target": target, "strength": strength})).message

    def unmerge_lora_weights(self, target: str = "all") -> str:
        """Bring the checkpoint's weights back, bit for bit. Raises ServingError."""
        return self._loras(unmerge_request({"target": target})).message

    def remove_lora(self, lora_nickname: str | Sequence[str]) -> str:
        """Forget adapters; requests that have them keep them until they end. Raises ServingError."""
        return self._loras(remove_request({"lora_nickname": lora_nickname})).message

    def list_loras(self) -> dict[str, Any]:
        """`loaded_adapters`, and those of them that are `active`: set for requests that name none, or merged."""
        return listed(self._loras(LIST_REQUEST))

    def _loras(self, request: LoraRequest) -> LoraReply:
        return self._engine.call(self._engine.client.loras(request))

    def close(self) -> None:
        """End the engine and all its processes; idempotent."""
        self._finalizer()

    def __enter__(self) -> DiffGenerator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Engine:
    """The supervisor child and the client loop, apart from DiffGenerator so that collecting that one ends this one."""

    def __init__(self, args: ServerArgs) -> None:
        # A wrong path or bucket need not wait for processes.
        get_model_info(args.model.model_path, model_id=args.model.model_id, backend=args.model.backend)
        check_storage(envs.current())
        config = EngineConfig.of_this_process(args, run_dir="")
        self._child = ChildProcess(_SUPERVISOR, config=config.to_bytes(), nice_name="supervisor")
        self._codec = Codec(SupervisorNote)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-client", daemon=True)
        self._thread.start()
        self._closed = False
        started = cast(EngineStarted, self._codec.decode(self._first_note()))
        self.client = self.call(self._connect(started.run_dir))
        threading.Thread(target=self._watch, name="sglang-supervisor", daemon=True).start()

    def _first_note(self) -> bytes:
        try:
            return self._child.connection.recv_bytes()
        except (EOFError, OSError):
            raise EngineStopped("the engine did not start; its log says why") from None

    async def _connect(self, run_dir: str) -> EngineClient:
        client = EngineClient(run_dir, name="python")
        await client.start()
        return client

    def _watch(self) -> None:
        """Notes of the supervisor until it is gone."""
        while True:
            try:
                note = self._codec.decode(self._child.connection.recv_bytes())
            except (EOFError, OSError, TypeError):  # TypeError: the connection was closed under us
                note = SchedulerLost(error=EngineStopped("the engine's processes ended").info(), restarting=False)
            if isinstance(note, SchedulerLost) and not self._closed:
                lost = self.client.scheduler_lost(note.error, restarting=note.restarting)
                self._submit(lost)
            if isinstance(note, SchedulerLost) and not note.restarting:
                return

    def _submit(self, work: Coroutine[Any, Any, T]) -> Any:
        if self._closed:
            work.close()
            raise EngineStopped("the engine was closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the client's loop and wait."""
        return cast(T, self._submit(work).result())

    def spawn(self, work: Coroutine[Any, Any, None]) -> Any:
        """Run on the client's loop without waiting."""
        return self._submit(work)

    def cancel_task(self, task: Any) -> None:
        """Cancel spawned work; its own cleanup goes on in the loop."""
        task.cancel()

    def wait_ready(self, on_state: Callable[[EngineState], None] | None) -> ModelInfo:
        """See DiffGenerator.wait_ready."""
        client = self.client
        if on_state is not None:
            client.on_state = on_state
            on_state(client.state)
        state = self.call(client.wait_ready())
        assert state.model is not None
        return state.model

    async def events(self, values: Mapping[str, Any]) -> AsyncIterator[GenerationEvent]:
        """Submit every output and yield their events as they come; leaving early cancels the rest in the engine."""
        state = await self.client.wait_ready()
        assert state.model is not None
        values, sources = split_media(values)
        sources.check(state.model.limits.inputs, strength=values.get("strength") is not None)
        inputs = await _decoded(sources)
        by_prompt = expand_prompts(values, model=state.model, surface="python", inputs=inputs)
        wishes = [params for outputs in by_prompt for params in outputs]
        for params in wishes:
            if params.perf_dump_path is not None:
                prepare_perf_dump(params.perf_dump_path)
        places = [(p, o) for p, outputs in enumerate(by_prompt) for o in range(len(outputs))]
        merged: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        async with self.client.stored(inputs) as media:
            handles = [await self.client.submit(params, inputs=media) for params in wishes]
        forwarders = [asyncio.create_task(_forward(i, handle, merged)) for i, handle in enumerate(handles)]
        open_outputs = set(range(len(handles)))
        try:
            while open_outputs:
                index, event = await merged.get()
                item = self._translate(event, wishes[index], places[index])
                path = wishes[index].perf_dump_path
                if path is not None and isinstance(item, GenerationResult):
                    item = _with_dump(item, path, handles[index].request_id, state.model)
                if isinstance(item, GenerationResult | ServingError):
                    open_outputs.discard(index)
                prompt_index, output_index = places[index]
                yield GenerationEvent(
                    prompt_index=prompt_index,
                    output_index=output_index,
                    request_id=handles[index].request_id,
                    event=item,
                )
        finally:
            for task in forwarders:
                task.cancel()
            for index in open_outputs:
                await self.client.cancel(handles[index].request_id)

    def _translate(self, event: Any, params: SamplingParams, place: tuple[int, int]) -> Any:
        if isinstance(event, Finished):
            return self._result(event, params, place)
        if isinstance(event, Failed):
            return RemoteError(event.error)
        if isinstance(event, Cancelled):
            return RequestCancelled(f"the request was cancelled: {event.reason}")
        return event

    def _result(self, event: Finished, params: SamplingParams, place: tuple[int, int]) -> GenerationResult:
        return GenerationResult(
            prompt=params.prompt,
            prompt_index=place[0],
            output_index=place[1],
            seed=event.seed,
            size=(event.height, event.width, event.num_frames),
            output_file_path=event.output_file_path,
            thumbnail_path=event.thumbnail_path,
            contact_sheet_path=event.contact_sheet_path,
            stored=event.stored,
            generation_time=event.generation_time,
            peak_memory_mb=event.peak_memory_bytes / 2**20,
            frames=None if event.frames is None else self.client.take(event.frames),
            latents=None if event.latents is None else self.client.take(event.latents),
            metrics={
                "stage_seconds": dict(event.stage_seconds),
                "step_ms": list(event.step_ms),
                "step_batch_sizes": list(event.step_batch_sizes),
                "queue_seconds": event.queue_seconds,
                "waiting_seconds": event.waiting_seconds,
                "stage_peak_mb": {stage: peak / 2**20 for stage, peak in event.stage_peak_bytes.items()},
                "attempts": event.attempts,
                "warmup_excluded": event.warmup_excluded,
                "computed_steps": event.computed_steps,
                **({} if event.cached is None else _forwards(event.cached)),
                **({} if event.profile_path is None else {"profile_path": event.profile_path}),
            },
            notes=event.notes,
        )

    def close(self) -> None:
        """Close client, loop and processes."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self.client.close(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()
        self._child.close(grace_s=_STOP_GRACE_S)


def _forwards(cached: CachedSteps) -> dict[str, int]:
    return {"computed_forwards": cached.computed_forwards, "num_forwards": cached.num_forwards}


async def _decoded(sources: MediaSources) -> DecodedInputs:
    if not sources:
        return NO_INPUTS
    # Late: the decoders take long to load, and most generations have no inputs.
    from sglang.multimodal_gen.runtime.entrypoints.media_reading import read_sources

    return await asyncio.to_thread(read_sources, sources)


def _with_dump(result: GenerationResult, path: str, request_id: str, model: ModelInfo) -> GenerationResult:
    """Write the performance dump. A full disk costs the dump, not the result, which then says so."""
    try:
        write_perf_dump(path, result, request_id=request_id, model=model)
    except StorageError as error:
        return dataclasses.replace(result, notes=(*result.notes, str(error)))
    return result


async def _forward(index: int, handle: RequestHandle, merged: asyncio.Queue[tuple[int, Any]]) -> None:
    async for event in handle:
        await merged.put((index, event))
