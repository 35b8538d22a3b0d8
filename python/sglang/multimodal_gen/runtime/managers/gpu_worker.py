"""The worker process of one rank: loads the pipeline, executes ticks, decides nothing.

Run as `python -m sglang.multimodal_gen.runtime.managers.gpu_worker FD` by the scheduler. A reader thread owns the
pipe: at its end of file the process leaves at once, also out of a kernel that never returns.
"""

from __future__ import annotations

import logging
import os
import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.lora_args import LAUNCH_ID
from sglang.multimodal_gen.configs.request_plan import LAUNCH_ORDER, Lane
from sglang.multimodal_gen.errors import ErrorInfo, InternalError, InvalidState, InvalidValue, OutOfMemory, ServingError
from sglang.multimodal_gen.runtime.managers.child_process import inherited_connection
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.frame_sender import FrameSender
from sglang.multimodal_gen.runtime.managers.messages import CachedSteps, MediaInputs, Message
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.started_tick import StartedLane, StartedTick
from sglang.multimodal_gen.runtime.managers.warm_up import ID_PREFIX as WARM_UP_PREFIX
from sglang.multimodal_gen.runtime.managers.worker_channel import Channel
from sglang.multimodal_gen.runtime.managers.worker_messages import (
    Admit,
    AdmitFailed,
    Admitted,
    CacheFlushed,
    FlushCache,
    ForgetLora,
    LatentsReady,
    LoadFailed,
    Loading,
    LoadLora,
    MergeLora,
    ModelReady,
    RankLost,
    Release,
    SaveState,
    StopWorker,
    Tick,
    ToWorker,
    Unit,
    UnitFailure,
)
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging, fields, log_refusal
from sglang.multimodal_gen.runtime.observability.private_texts import PRIVATE_TEXTS

# Started with -m, this module's own name is __main__, which is outside the package's logger.
logger = logging.getLogger("sglang.multimodal_gen.runtime.managers.gpu_worker")

_POLL_S = 0.0005
"""How long after its end a tick may be answered: the next one is under way by then."""


class GPUWorker:
    """Executes what the scheduler says, in the order of the pipe."""

    def __init__(
        self,
        config: EngineConfig,
        channel: Channel,
        pipeline: Any,
        *,
        states: Any,
        profiler: Any,
        previews: Any,
        adapters: Any,
    ) -> None:
        self.checkpoint_dir = config.checkpoint_dir()
        self.channel = channel
        self.pipeline = pipeline
        self.states = states
        self.profiler = profiler
        self.previews = previews
        self.adapters = adapters
        self.run_dir = RunDir.at(config.run_dir)
        self.frames = FrameSender(self.run_dir, channel.send)
        self.requests: dict[str, Any] = {}
        self.min_epoch = 0
        self.leads = pipeline.parallel.leads
        self._open: StartedTick | None = None

    def run(self) -> None:
        """Until StopWorker."""
        while True:
            message = self._next()
            if isinstance(message, Tick):
                started = self._tick(message)
                self._answer()
                self._open = started
                if started.is_done():
                    self._answer()
                continue
            if isinstance(message, FlushCache | ForgetLora | MergeLora | StopWorker):
                self._answer()
            if isinstance(message, Admit):
                self.channel.send(self._admit(message))
            elif isinstance(message, SaveState):
                self._save(message)
            elif isinstance(message, Release):
                self._release(message.request_id)
            elif isinstance(message, FlushCache):
                freed_bytes = self.pipeline.flush()
                if self.leads:
                    self.channel.send(CacheFlushed(query_id=message.query_id, freed_bytes=freed_bytes))
            elif isinstance(message, LoadLora | ForgetLora | MergeLora):
                self.adapters.take(message)
            elif isinstance(message, StopWorker):
                return

    def _next(self) -> ToWorker:
        """The next message. The tick that is under way on the device is answered when it is done before one comes."""
        while (started := self._open) is not None:
            try:
                return self.channel.inbox.get(timeout=_POLL_S)
            except queue.Empty:
                if started.is_done():
                    self._answer()
        return self.channel.inbox.get()

    def _answer(self) -> None:
        """Wait for the tick that is under way, if one is, and tell the scheduler."""
        started, self._open = self._open, None
        if started is None:
            return
        try:
            done = started.done()
        except Exception as error:
            self._leave_if_lost(error, [unit.request_id for unit in started.tick.units])
            raise
        self.channel.send(done)

    def _admit(self, message: Admit) -> Message:
        PRIVATE_TEXTS.keep(message.request_id, message.params.private_texts())
        try:
            inputs = _mapped(self.run_dir, message.inputs)
            self.adapters.wait_for(message.lora_ids.values())
            req = self.pipeline.admit(message.request_id, message.params, inputs, message.lora_ids)
            if message.state_file is not None:
                self._restore(req, message.state_file)
                self._send_latents(req)  # its last step may have been before the state was saved
            self.profiler.admit(message.request_id, message.params, req.phases)
        except Exception as error:
            if not isinstance(error, ServingError):  # what is wrong with the request, every rank finds
                self._leave_if_lost(error, [message.request_id])
            failed = AdmitFailed(request_id=message.request_id, error=_error_info(error, [message.request_id]))
            PRIVATE_TEXTS.forget(message.request_id)
            return failed
        self.requests[message.request_id] = req
        return Admitted(
            request_id=message.request_id,
            phases=tuple(req.phases),
            notes=tuple(req.notes),
            units_done=dict(req.units_done),
        )

    def _restore(self, req: Any, state_file: str) -> None:
        try:
            self.pipeline.restore(req, self.checkpoint_dir / state_file)
        except InvalidState as error:
            logger.warning("starts again from its beginning: %s", error, extra=fields(request_id=req.request_id))

    def _save(self, message: SaveState) -> None:
        req = self.requests.get(message.request_id)
        if req is not None and self.leads:
            self.pipeline.lanes.join()
            path, identity = self.checkpoint_dir / message.state_file, self.pipeline.state_identity(req)
            self.states.put(message.request_id, path, self.pipeline.saved_state(req), identity=identity)

    def _release(self, request_id: str) -> None:
        req = self.requests.pop(request_id, None)
        self.frames.forget(request_id)
        self.pipeline.lanes.forget(request_id)
        if req is not None:
            self.pipeline.release(req)
            self.pipeline.attention_tuner.request_ended(
                was_warm_up=request_id.startswith(WARM_UP_PREFIX), others_run=bool(self.requests)
            )
        self.states.forget(request_id)
        self.previews.release(request_id)
        self.profiler.release(request_id)
        PRIVATE_TEXTS.forget(request_id)

    def _tick(self, tick: Tick) -> StartedTick:
        """Give all of it to the device, which may be busy with the tick before."""
        started = StartedTick(tick, dropped=tick.epoch < self.min_epoch)
        if started.dropped:
            return started
        requests = [self.requests[unit.request_id] for unit in tick.units]
        beside = self.pipeline.may_run_beside(
            [(unit.phase, req) for unit, req in zip(tick.units, requests, strict=True)]
        )
        with self.pipeline.lanes.tick(requests, beside=beside) as started.kept:
            for lane in LAUNCH_ORDER:
                units: tuple[Unit, ...] = getattr(tick, lane)
                if units:
                    self._start_lane(lane, units, started)
        if started.failures:
            self.min_epoch = tick.epoch + 1
        return started

    def _start_lane(self, lane: Lane, units: tuple[Unit, ...], started: StartedTick) -> None:
        shown = started.tick.previews if lane == "denoise" and self.leads else ()
        shown_requests = self.previews.want([self.requests[request_id] for request_id in shown])
        with self.pipeline.lanes.lane(lane, [self.requests[unit.request_id] for unit in units]):
            started_lane, failed = self._run_lane(lane, units)
        started.lanes.append(started_lane)
        started.failures += failed
        started.peak_bytes = max(started.peak_bytes, self.pipeline.meter.total_peak_bytes())
        # All that the worker holds, so that every rank finds the same.
        others_wait = len(self.requests) > 1
        started.preview_s += self.previews.take(
            shown_requests, failed=bool(failed), tick=started.tick.seq, others_wait=others_wait
        )

    def _run_lane(self, lane: Lane, units: tuple[Unit, ...]) -> tuple[StartedLane, list[UnitFailure]]:
        meter, clock = self.pipeline.meter, self.pipeline.clock
        recording = self.profiler.begin(units)
        meter.begin(self._kind_of(units))
        begin = clock.mark()
        with self.profiler.named(units):
            failed = self._run_units(lane, units)
        end = clock.mark()
        # What is recorded takes memory as well, which says nothing of the next time.
        peak_bytes = None if failed or recording else meter.peak_bytes()
        if not failed and self.profiler.ends_with(units):
            end.wait()  # its kernels are in the trace
            self.channel.send(self.profiler.end())
        cached = self._cached_steps(units) if lane == "denoise" and not failed else {}
        return StartedLane(lane, begin, end, peak_bytes=peak_bytes, cached=cached), failed

    def _cached_steps(self, units: tuple[Unit, ...]) -> dict[str, CachedSteps]:
        """Of the requests that have a step cache."""
        caches = {unit.request_id: self.requests[unit.request_id].step_cache for unit in units}
        return {
            request_id: CachedSteps(
                computed_steps=cache.computed_steps,
                computed_forwards=cache.computed_rows,
                num_forwards=cache.num_rows,
                skipped=cache.skipped,
            )
            for request_id, cache in caches.items()
            if cache is not None
        }

    def _kind_of(self, units: tuple[Unit, ...]) -> tuple[str, int]:
        """Equal for work that takes equal memory: the batch key and the number of requests."""
        phases = self.requests[units[0].request_id].phases
        return next(phase.batch_key for phase in phases if phase.name == units[0].phase), len(units)

    def _run_units(self, lane: Lane, units: tuple[Unit, ...]) -> list[UnitFailure]:
        """One unit of each request; on any error none of them has advanced."""
        requests = [self.requests[unit.request_id] for unit in units]
        try:
            for batch in self.pipeline.run_unit(units[0].phase, requests):
                self.frames.put(batch)
            for req in requests if lane == "denoise" else ():
                # Written while the step ran: nobody hears of a step that is further than one interval from a state.
                self.states.wait(req.request_id)
                self._send_latents(req)
        except Exception as error:
            ids = [unit.request_id for unit in units]
            self._leave_if_lost(error, ids)
            info = _error_info(error, ids)
        else:
            return []
        # Not in the handler, where the exception still holds what the unit had allocated.
        return self._failures(units, info)

    def _leave_if_lost(self, error: Exception, request_ids: list[str]) -> None:
        """After an error in a rank of several, the others wait in a collective: the replica is replaced."""
        from sglang.multimodal_gen.runtime.pipelines_core.memory import is_device_lost  # late: it imports torch

        if is_device_lost(error):
            reason = f"its device failed: {str(error).splitlines()[0]}"
        elif self.pipeline.parallel.world.size > 1:
            reason = f"rank {self.pipeline.parallel.world.rank} failed: {_error_info(error, request_ids).message}"
        else:
            return
        logger.error("this worker ends: %s", reason, exc_info=error, extra=fields(request_ids=request_ids))
        self.channel.send(RankLost(reason=reason))
        os._exit(1)  # at an orderly exit libraries would wait for the device

    def _failures(self, units: tuple[Unit, ...], info: ErrorInfo) -> list[UnitFailure]:
        self._answer()  # nothing is given back that the tick before still uses
        out_of_memory = info.code == OutOfMemory.code
        if len(units) > 1:
            if out_of_memory:
                self.pipeline.reclaim()
            retry: Any = "smaller_batch" if out_of_memory else "alone"
            return [UnitFailure(request_id=unit.request_id, error=info, retry=retry) for unit in units]
        [unit] = units
        req = self.requests[unit.request_id]
        if not (out_of_memory and self.pipeline.shrink(unit.phase, req)):
            return [UnitFailure(request_id=unit.request_id, error=info, retry="never")]
        return [
            UnitFailure(
                request_id=unit.request_id,
                error=info,
                retry="smaller_units",
                phases=tuple(req.phases),
                notes=tuple(req.notes),
            )
        ]

    def _send_latents(self, req: Any) -> None:
        """When denoising is complete and the request wants its latents."""
        asked = req.params.return_latents or req.params.output_type == "latent"
        denoising = [phase for phase in req.phases if phase.lane == "denoise"]
        complete = denoising and all(req.done(phase.name) == phase.units for phase in denoising)
        if self.leads and asked and complete and req.latents is not None:
            latents = self.run_dir.send(req.latents.float().cpu().numpy())
            self.channel.send(LatentsReady(request_id=req.request_id, latents=latents))


def _mapped(run_dir: RunDir, inputs: MediaInputs | None) -> Any:
    """The request's inputs. Raises StorageError when a file is gone."""
    from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs

    if inputs is None:
        return EMPTY
    return RequestInputs(
        images=tuple(run_dir.map(image) for image in inputs.images),
        mask=None if inputs.mask is None else run_dir.map(inputs.mask),
        last_image=None if inputs.last_image is None else run_dir.map(inputs.last_image),
        video=None if inputs.video is None else run_dir.map(inputs.video),
        video_fps=inputs.video_fps,
    )


def _error_info(error: Exception, request_ids: Sequence[str] = ()) -> ErrorInfo:
    """What travels of an error; the log gets the rest, with the ids of the requests that it hit."""
    ids = fields(request_ids=list(request_ids))
    if isinstance(error, ServingError):
        log_refusal(logger, error, ids)
        return error.info()
    from sglang.multimodal_gen.runtime.pipelines_core.memory import is_out_of_memory  # late: it imports torch

    if is_out_of_memory(error):
        logger.warning("out of memory: %s", error, extra=ids)
        return OutOfMemory("the device ran out of memory; use a smaller size or fewer frames").info()
    logger.exception("an internal error", exc_info=error, extra=ids)
    return InternalError("an internal error; the server's log has the details").info()


def _load(config: EngineConfig, report: Callable[[str], None]) -> Any:
    """The pipeline; torch is imported here, with the scheduler told so."""
    report("importing torch")
    import torch

    from sglang.multimodal_gen.runtime.distributed.parallel_state import join_replica
    from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline

    parallel = config.args.parallel
    shape, gpu_ids = parallel.replica, parallel.gpu_ids

    def join(device: torch.device) -> Any:
        if device.type == "cpu" and gpu_ids is not None:
            raise InvalidValue("gpu_ids", gpu_ids, "none; no CUDA device is visible")
        if device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // parallel.num_gpus))
        else:
            report("starting the device")
            torch.zeros(1, device=device).item()  # the first kernel comes with the context
            report("preparing the model")
        if shape.num_ranks > 1:
            envs.meet_on_loopback()
        return join_replica(shape, config.rank, store=Path(config.rendezvous), device=device)

    report("loading the model")
    return build_pipeline(
        config.args.model,
        config.args.execution,
        memory=config.args.memory,
        local_rank=config.worker_index if gpu_ids is None else gpu_ids[config.worker_index],
        num_gpus=parallel.num_gpus,
        join=join,
        sized=config.args.warmup.largest,
        report=report,
    )


def _load_adapter(pipeline: Any, config: EngineConfig) -> None:
    """The one that the options name. Raises InvalidLora."""
    args = config.args.lora
    if args.lora_path is None:
        return
    from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource

    source = LoraSource(path=args.lora_path, weight_name=args.lora_weight_name, alpha=args.lora_alpha)
    pipeline.adapters.load(LAUNCH_ID, source)
    if args.lora_merge_mode == "merge":
        pipeline.adapters.merge_ids([(LAUNCH_ID, args.lora_scale)])


def main() -> None:
    """Entry point of the process."""
    connection = inherited_connection()
    config = EngineConfig.from_bytes(connection.recv_bytes())
    configure_logging(config.args.logging)
    if config.args.logging.log_format == "json":
        envs.silence_profiler_library()  # a JSON log holds nothing else
    channel = Channel(connection)
    channel.start()
    config.apply()

    def report(detail: str) -> None:
        if config.rank == 0:
            channel.send(Loading(detail=detail))

    try:
        pipeline = _load(config, report)
        _load_adapter(pipeline, config)
    except Exception as error:
        channel.send(LoadFailed(error=_error_info(error)))
        return
    import torch

    from sglang.multimodal_gen.runtime.managers.preview_source import PreviewSource
    from sglang.multimodal_gen.runtime.managers.state_writer import StateWriter
    from sglang.multimodal_gen.runtime.managers.worker_adapters import WorkerAdapters
    from sglang.multimodal_gen.runtime.managers.worker_profiling import WorkerProfiler

    channel.allocated_bytes = pipeline.meter.allocated_bytes
    profiler = WorkerProfiler(config.profile_dir(), cuda=str(pipeline.device).startswith("cuda"))
    previews = PreviewSource(pipeline, RunDir.at(config.run_dir), channel.send)
    states = StateWriter(channel.send)
    adapters = WorkerAdapters(pipeline.adapters, channel.send, error_info=_error_info)
    worker = GPUWorker(
        config, channel, pipeline, states=states, profiler=profiler, previews=previews, adapters=adapters
    )
    channel.send(ModelReady(model=pipeline.model_info(), budget_bytes=pipeline.budget_bytes()))
    with torch.inference_mode():
        worker.run()


if __name__ == "__main__":
    main()
