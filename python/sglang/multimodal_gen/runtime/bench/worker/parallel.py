"""One rank of `bench parallel`: `python -m sglang.multimodal_gen.runtime.bench.worker.parallel FD`.

Every rank gets the same task and goes through its layouts in order, joining those that it is a rank of.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import DeviceType, ProfilerActivity, profile

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.runtime.bench.messages import LayoutResult, ParallelResult, ParallelTask
from sglang.multimodal_gen.runtime.bench.statistics import summarise
from sglang.multimodal_gen.runtime.bench.worker.model import find_model, work_size
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent, failures_told, take_task, watch_parent
from sglang.multimodal_gen.runtime.distributed.collectives import all_gather, least
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext, join_replica
from sglang.multimodal_gen.runtime.layers.device_timing import Run, timer_for
from sglang.multimodal_gen.runtime.layers.forward_graphs import forget_graphs
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.pipelines_core.memory import free_bytes
from sglang.multimodal_gen.runtime.pipelines_core.placement import place
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, Workload, WorkSize

_WORKLOAD, _DECODING = "dit", "vae_decode"
_COMMUNICATION = "nccl"


class ParallelBench:
    """This rank's part in all layouts."""

    def __init__(self, task: ParallelTask, parent: Parent) -> None:
        self.task = task
        self.parent = parent
        args = task.component.engine.args
        self.placement = place(args.execution, local_rank=task.rank, num_gpus=task.num_ranks)
        self.device = self.placement.device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.init()
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // task.num_ranks))
        self.model = find_model(args.model, _WORKLOAD, parent)
        if task.decode:
            find_model(args.model, _DECODING, parent)
        self.alone: dict[str, Tensor] = {}
        self.chunk_frames: list[int] = []
        self._loaded: list[nn.Module] = []
        self.dtypes: dict[str, torch.dtype] = {}

    def run(self) -> ParallelResult:
        """The layouts that this rank is in; the first is that of one rank."""
        by_size = {shape.num_ranks: shape for shape in reversed(self.task.layouts)}
        decoding = [by_size[size] for size in sorted(by_size)] if self.task.decode else []
        layouts = self._measured(_WORKLOAD, self.task.layouts)
        decoded = self._measured(_DECODING, decoding)
        return ParallelResult(
            module=self._module_name(_WORKLOAD),
            device=str(self.device),
            device_name=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "",
            precision=self.placement.precision,
            layouts=layouts,
            decoder=self._module_name(_DECODING) if decoded else "",
            decoder_precision=str(self.dtypes.get(_DECODING, "")).removeprefix("torch."),
            decoding=decoded,
            chunk_frames=tuple(self.chunk_frames),
        )

    def _module_name(self, name: str) -> str:
        return self.model.native(self.model.pipeline_class.workloads[name].component).module_class.__name__

    def _measured(self, name: str, layouts: Sequence[ReplicaShape]) -> tuple[LayoutResult, ...]:
        results = []
        for number, shape in enumerate(layouts):
            if self.task.rank < shape.num_ranks:
                if self.task.rank == 0:
                    self.parent.tell(f"measuring {name}, {shape}")
                results.append(self._measure(name, shape, Path(self.task.meeting, f"{name}-{number}")))
        return tuple(results)

    def _measure(self, name: str, shape: ReplicaShape, store: Path) -> LayoutResult:
        parallel = join_replica(shape, self.task.rank, store=store, device=self.device)
        try:
            step = (self._step if name == _WORKLOAD else self._decoding)(parallel)
            output = step()
            difference = self._difference(name, output)
            del output
            samples = self._times(step, parallel)
            host_ms = self._host_ms(step)
            peak = None
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
            exposed = self._exposed_ms(step) if self.device.type == "cuda" and shape.num_ranks > 1 else None
        finally:
            # Graphs hold on to connections, which could not be closed.
            forget_graphs(self._loaded)
            self._loaded.clear()
            if dist.is_initialized():
                dist.destroy_process_group()
        return LayoutResult(
            shape=shape,
            seconds=summarise(samples),
            peak_bytes=peak,
            relative_difference=difference,
            exposed_communication_ms=exposed,
            host_ms=host_ms,
        )

    def _load(self, name: str, parallel: ParallelContext) -> tuple[Workload, nn.Module, torch.dtype]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        workload = self.model.pipeline_class.workloads[name]
        args, component = self.task.component.engine.args, workload.component
        context = self.model.pipeline_class.load_context(
            self.model.config,
            self.placement,
            args.execution,
            parallel=parallel,
            random_weights=args.model.random_weights,
        )
        load = self.model.native(component)
        module = load(self.model.directory / component, self.model.listed(component)[1], context)
        self._loaded.append(module)
        self.dtypes[name] = context.dtype_of(component)
        return workload, module, self.dtypes[name]

    def _decoding(self, parallel: ParallelContext) -> Callable[[], Tensor]:
        """One clip, chunk by chunk; the leader has its video."""
        workload, module, dtype = self._load(_DECODING, parallel)
        strips: StripSharding = module.strips  # type: ignore[assignment]
        task = msgspec.structs.replace(self.task.component, batch_size=1)
        free = least(free_bytes(self.device), parallel.world)
        size = work_size(task, self.model, dtype=dtype, free_bytes=free, strips=strips)
        self.chunk_frames.append(size.chunk_frames)
        inputs = workload.inputs(self.model.configs, size, Drawing(self.device, dtype))

        def step() -> Tensor:
            video = strips.collect(workload.forward(module, inputs, size), *size.latent_shape[-2:])
            return inputs[0] if video is None else video

        return step

    def _step(self, parallel: ParallelContext) -> Callable[[], Tensor]:
        """The forwards of one step; its rows are dealt along the cfg axis, as the denoising stage deals them."""
        workload, module, dtype = self._load(_WORKLOAD, parallel)
        size = work_size(self.task.component, self.model, dtype=dtype, free_bytes=0)
        inputs = workload.prepared(module, workload.inputs(self.model.configs, size, Drawing(self.device, dtype)))
        rows, axis = size.batch_size, parallel.cfg
        share = -(-rows // axis.size)
        first = min(axis.rank * share, rows - 1)
        own = tuple(each[first : first + share] if each.shape[0] == rows else each for each in inputs)
        own_size = WorkSize(**{**vars(size), "batch_size": min(share, rows - first)})

        def step() -> Tensor:
            predicted = workload.forward(module, own, own_size)
            missing = share - predicted.shape[0]
            if missing:
                predicted = torch.cat((predicted, predicted[-1:].expand(missing, *predicted.shape[1:])))
            return all_gather(predicted, axis, dim=0)[:rows]

        return step

    def _difference(self, name: str, output: Tensor) -> float:
        """Norm of the difference from one rank's output over its norm; 0 where there is none, which is not on the
        leader."""
        if self.task.rank:
            return 0.0
        alone = self.alone.setdefault(name, output.float().cpu())
        return float((output.float().cpu() - alone).norm() / alone.norm())

    def _times(self, step: Run, parallel: ParallelContext) -> list[float]:
        timer = timer_for(self.device)

        def sample() -> float:
            if parallel.world.size > 1:
                dist.barrier()
            return timer(step)

        for _ in range(self.task.component.warmup_runs):
            step()
        return [sample() for _ in range(self.task.component.repeats)]

    def _host_ms(self, step: Run) -> float:
        begin = time.perf_counter()
        step()
        launched = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (launched - begin) * 1000

    def _exposed_ms(self, step: Run) -> float:
        """Time in which a collective ran on the GPU and nothing else did."""
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize(self.device)
        spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for event in recorded.events() or ():
            if event.device_type == DeviceType.CUDA:
                span = (event.time_range.start, event.time_range.end)
                spans[_COMMUNICATION in event.name.lower()].append(span)
        together = _covered([*spans[True], *spans[False]])
        return (together - _covered(spans[False])) / 1000


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union, in the spans' unit."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def main() -> None:
    """Entry point of the process."""
    connection, task = take_task(ParallelTask)
    parent = watch_parent(connection)
    configure_logging(task.component.engine.args.logging)
    task.component.engine.apply()
    envs.meet_on_loopback()
    with failures_told(parent), torch.inference_mode():
        parent.send(ParallelBench(task, parent).run())


if __name__ == "__main__":
    main()
