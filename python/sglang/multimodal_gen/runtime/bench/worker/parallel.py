"""One rank of `bench parallel`: `python -m sglang.multimodal_gen.runtime.bench.worker.parallel FD`.

Every rank gets the same task and goes through its layouts in order, joining those that it is a rank of.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

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
from sglang.multimodal_gen.runtime.bench.worker.timing import Run, timer_for
from sglang.multimodal_gen.runtime.distributed.collectives import all_gather
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext, join_replica
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.pipelines_core.placement import place
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, Inputs, WorkSize

_WORKLOAD = "dit"
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
        self.workload = self.model.pipeline_class.workloads[_WORKLOAD]
        self.size = work_size(task.component, self.model, dtype=self.placement.dtype, free_bytes=0)
        self.alone: Tensor | None = None

    def run(self) -> tuple[LayoutResult, ...]:
        """Those of the layouts that this rank leads; the first is that of one rank."""
        results = []
        for number, shape in enumerate(self.task.layouts):
            if self.task.rank < shape.num_ranks:
                if self.task.rank == 0:
                    self.parent.tell(f"measuring {shape}")
                results.append(self._measure(shape, Path(self.task.meeting, f"layout-{number}")))
        return tuple(results)

    def _measure(self, shape: ReplicaShape, store: Path) -> LayoutResult:
        parallel = join_replica(shape, self.task.rank, store=store, device=self.device)
        try:
            module, dtype = self._load(parallel)
            inputs = self.workload.inputs(self.model.configs, self.size, Drawing(self.device, dtype))
            step = self._step(module, inputs, parallel)
            output = step()
            difference = self._difference(output)
            del output
            samples = self._times(step, parallel)
            host_ms = self._host_ms(step)
            peak = None
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
            exposed = self._exposed_ms(step) if self.device.type == "cuda" and shape.num_ranks > 1 else None
        finally:
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

    def _load(self, parallel: ParallelContext) -> tuple[nn.Module, torch.dtype]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        args, component = self.task.component.engine.args, self.workload.component
        context = self.model.pipeline_class.load_context(
            self.model.config,
            self.placement,
            args.execution,
            parallel=parallel,
            random_weights=args.model.random_weights,
        )
        load = self.model.native(component)
        module = load(self.model.directory / component, self.model.listed(component)[1], context)
        return module, context.dtype_of(component)

    def _step(self, module: nn.Module, inputs: Inputs, parallel: ParallelContext) -> Callable[[], Tensor]:
        """The forwards of one step; its rows are dealt along the cfg axis, as the denoising stage deals them."""
        rows, axis = self.size.batch_size, parallel.cfg
        share = -(-rows // axis.size)
        first = min(axis.rank * share, rows - 1)
        own = tuple(each[first : first + share] if each.shape[0] == rows else each for each in inputs)
        own_size = WorkSize(**{**vars(self.size), "batch_size": min(share, rows - first)})

        def step() -> Tensor:
            predicted = self.workload.forward(module, own, own_size)
            missing = share - predicted.shape[0]
            if missing:
                predicted = torch.cat((predicted, predicted[-1:].expand(missing, *predicted.shape[1:])))
            return all_gather(predicted, axis, dim=0)[:rows]

        return step

    def _difference(self, output: Tensor) -> float:
        """Norm of the difference from one rank's output over its norm; on the leader alone it means something."""
        if self.alone is None:
            self.alone = output.float().cpu()
            return 0.0
        return float((output.float().cpu() - self.alone).norm() / self.alone.norm())

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
        bench = ParallelBench(task, parent)
        layouts = bench.run()
        parent.send(
            ParallelResult(
                module=bench.model.native(bench.workload.component).module_class.__name__,
                device=str(bench.device),
                device_name=torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "",
                precision=bench.placement.precision,
                layouts=layouts,
            )
        )


if __name__ == "__main__":
    main()
