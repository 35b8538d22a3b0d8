"""Times one component in a process of its own: `python -m sglang.multimodal_gen.runtime.bench.worker.component FD`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.cost_model import STEPS_AHEAD
from sglang.multimodal_gen.configs.memory_plan import TRANSFORMERS
from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import IncompatibleParameters
from sglang.multimodal_gen.runtime.bench.messages import (
    ComponentResult,
    ComponentTask,
    GpuState,
    OutputError,
    QuantizationError,
    Side,
)
from sglang.multimodal_gen.runtime.bench.options import DIFFUSERS, DIFFUSERS_COMPILED
from sglang.multimodal_gen.runtime.bench.statistics import Ratio, compare, summarise
from sglang.multimodal_gen.runtime.bench.worker.compiled_reference import compile_reference, compiler_failures_told
from sglang.multimodal_gen.runtime.bench.worker.exactness import (
    SameWeights,
    exact_output,
    output_error,
    output_in_fp32,
)
from sglang.multimodal_gen.runtime.bench.worker.flops import matmul_rate
from sglang.multimodal_gen.runtime.bench.worker.gpu_state import GpuWatch, gpu_uuid
from sglang.multimodal_gen.runtime.bench.worker.kernels import busiest_kernels
from sglang.multimodal_gen.runtime.bench.worker.memory import peak_bytes
from sglang.multimodal_gen.runtime.bench.worker.model import find_model, work_size
from sglang.multimodal_gen.runtime.bench.worker.reference_module import reference_module, require_reference
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent, failures_told, take_task, watch_parent
from sglang.multimodal_gen.runtime.layers.attention.switch import explain_kernels
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.device_timing import time_in_turns, timer_for
from sglang.multimodal_gen.runtime.layers.host_weights import has_its_weights
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext, weight_totals
from sglang.multimodal_gen.runtime.loader.quantization_wishes import describe_quantization, explain_quantization
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.pipelines_core.memory import free_bytes, limit_memory
from sglang.multimodal_gen.runtime.pipelines_core.memory_meter import meter_for
from sglang.multimodal_gen.runtime.pipelines_core.residency import components_on_host, settle_weights
from sglang.multimodal_gen.runtime.pipelines_core.workload import (
    Drawing,
    Inputs,
    VideoDecoding,
    VideoEncoding,
    Workload,
)


class ComponentBench:
    """One module, ready to be timed."""

    def __init__(self, task: ComponentTask, parent: Parent) -> None:
        self.task = task
        self.parent = parent
        self.notes: list[str] = []
        self.model = find_model(task.engine.args.model, task.workload, parent)
        self.workload: Workload = self.model.pipeline_class.workloads[task.workload]
        self.context = self.model.load_context(task.engine.args, self.notes.append)
        self.device, self.dtype = self.context.device, self.context.dtype_of(self.workload.component)
        self.size = work_size(task, self.model, dtype=self.dtype, free_bytes=free_bytes(self.device))
        if isinstance(self.workload, VideoDecoding | VideoEncoding):
            self.notes.append(f"{self.size.chunk_frames} of {self.size.latent_shape[1]} latent frames at a time")
        with torch.inference_mode(False):  # tensors made under it could not become others
            self.module, self.load_seconds = self._load()
        self.inputs = self.workload.inputs(self.model.configs, self.size, Drawing(self.device, self.dtype))
        self.prepared = self._prepared()

    def _load(self) -> tuple[nn.Module, float]:
        component = self.workload.component
        self.parent.tell(f"loading {component}")
        begin = time.perf_counter()
        engine = self.task.engine.args
        limit_memory(self.device, engine.memory.gpu_memory_limit)
        asked = SamplingParams(width=self.task.width, height=self.task.height, num_frames=self.task.num_frames)
        plan = self.model.memory_plan(engine, asked)
        module = self._loaded(replace(self.context, on_host=components_on_host(plan)))
        settle_weights({component: module}, plan, engine.memory, self.device)
        if plan is not None and plan.offloads:
            held = meter_for(self.device).allocated_bytes() / 2**30
            self.notes.append(f"{plan.reason}; {held:.2f} GiB of weights and slots are on the device")
        self.notes.extend((*explain_kernels([module]), *explain_quantization({component: module}, self.device)))
        return module, time.perf_counter() - begin

    def _loaded(self, context: LoadContext) -> nn.Module:
        component = self.workload.component
        load = self.model.native(component)
        return load(self.model.directory / component, self.model.listed(component)[1], context)

    def _prepared(self) -> Inputs:
        """The inputs with what the engine, too, computes for many forwards at once."""
        if not has_its_weights(self.module):
            return self.inputs
        for embed, occasion in (
            (self.workload.embed_steps, f"up to {STEPS_AHEAD} steps of a request"),
            (self.workload.embed_text, "each text of a request"),
        ):
            if embed(self.module, self.inputs) is not None:
                [samples] = time_in_turns(
                    [partial(embed, self.module, self.inputs)],
                    timer_for(self.device),
                    warmup_runs=self.task.warmup_runs,
                    repeats=self.task.repeats,
                )
                self.notes.append(f"{1000 * summarise(samples).median:.2f} ms more, once for {occasion}")
        return self.workload.prepared(self.module, self.inputs)

    def references(self) -> list[nn.Module]:
        """The modules to compare with, the compiled one behind the one that it is of.

        Raises: IncompatibleParameters for quantised weights, or when the compiler fails.
        """
        if self.task.compare is None:
            return []
        if describe_quantization({"": self.module}) is not None:
            raise IncompatibleParameters(
                f"compare: {self.task.compare} cannot have these quantised weights; leave it out, and the difference "
                "from unquantised ones is measured",
                param="compare",
            )
        self.parent.tell(f"importing {DIFFUSERS}")
        require_reference()
        modules = [self._reference()]
        if self.task.compare == DIFFUSERS_COMPILED:
            modules.append(self._compiled(self._reference()))
        return modules

    def _reference(self) -> nn.Module:
        component = self.workload.component
        return reference_module(self.model.directory / component, self.model.listed(component), self.module)

    def _compiled(self, module: nn.Module) -> nn.Module:
        """The module once its first forward, which takes as long as the compiler does, is over."""
        names = compile_reference(module)
        self.parent.tell(f"compiling {names} of {DIFFUSERS}, which may take minutes")
        begin = time.perf_counter()
        with compiler_failures_told(names):
            self.workload.reference_forward(module, self.inputs)
        self.notes.append(f"the first forward of compiled {names} took {time.perf_counter() - begin:.1f} s")
        return module

    def result(self) -> ComponentResult:
        """Measure everything."""
        references = self.references()
        self.parent.tell("counting FLOPs")
        flops, rate = self.model.flops(self.workload, self.size), self._matmul_rate()
        others = [partial(self.workload.reference_forward, module, self.inputs) for module in references]
        sides: list[Callable[[], Tensor]] = [self._forward, *others]
        output = self._forward()
        differences = [relative_difference(output, other()) for other in others]
        output_shape = tuple(output.shape)
        del output  # so that the peak of a run is a run's alone
        self.parent.tell(f"timing {type(self.module).__name__}")
        with GpuWatch(gpu_uuid(self.device)) as watch:
            samples = time_in_turns(
                sides,
                timer_for(self.device),
                warmup_runs=self.task.warmup_runs,
                repeats=self.task.repeats,
                min_seconds=self.task.min_seconds,
                pause_seconds=self.task.pause_seconds,
            )
        peaks = [peak_bytes(side, self.device) for side in sides]
        errors = self._errors(sides, run_bytes=peaks[0] or 0)
        rate = max(rate, self._matmul_rate())
        measured = [
            Side(
                seconds=(seconds := summarise(own)),
                peak_bytes=peak,
                flops_per_second=(achieved := flops / seconds.median),
                matmul_ratio=achieved / rate,
                error=error,
            )
            for own, peak, error in zip(samples, peaks, errors, strict=True)
        ]
        ours, *theirs = measured
        compared = [
            _Compared(type(module).__name__, side, compare(ours.seconds, side.seconds), difference)
            for module, side, difference in zip(references, theirs, differences, strict=True)
        ]
        return self._result(flops, rate, output_shape, ours, compared, watch.state())

    def _result(
        self,
        flops: int,
        rate: float,
        output_shape: tuple[int, ...],
        ours: Side,
        compared: Sequence[_Compared],
        gpu_state: GpuState | None,
    ) -> ComponentResult:
        num_parameters, weight_bytes = weight_totals([self.module])
        plain, compiled = (compared[place] if place < len(compared) else None for place in range(2))
        library, _ = self.model.listed(self.workload.component)
        return ComponentResult(
            component=self.workload.component,
            module=type(self.module).__name__,
            device=str(self.device),
            device_name=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "",
            precision=str(self.dtype).removeprefix("torch."),
            num_threads=torch.get_num_threads(),
            num_parameters=num_parameters,
            weight_bytes=weight_bytes,
            load_seconds=self.load_seconds,
            input_shapes=tuple(tuple(tensor.shape) for tensor in self.inputs),
            output_shape=output_shape,
            flops=flops,
            matmul_flops_per_second=rate,
            ours=ours,
            reference=None if plain is None else plain.side,
            reference_module=None if plain is None else f"{library}.{plain.module}",
            ratio=None if plain is None else plain.ratio,
            max_relative_difference=None if plain is None else plain.difference,
            notes=tuple(self.notes),
            kernels=busiest_kernels(self._forward, self.device) if self.task.profile else (),
            quantization=self._quantization(),
            compiled_reference=None if compiled is None else compiled.side,
            compiled_ratio=None if compiled is None else compiled.ratio,
            compiled_max_relative_difference=None if compiled is None else compiled.difference,
            gpu_state=gpu_state,
        )

    def _quantization(self) -> QuantizationError | None:
        """Of a module that was quantised while it loaded, beside the same one as it was."""
        if self.context.quantization.quantization is None or not describe_quantization({"": self.module}):
            return None
        self.parent.tell("loading the same without quantisation")
        plain = self._loaded(replace(self.context, quantization=QuantizationArgs()))
        [seconds] = time_in_turns(
            [lambda: self.workload.forward(plain, self.inputs, self.size)],
            timer_for(self.device),
            warmup_runs=self.task.warmup_runs,
            repeats=self.task.repeats,
            min_seconds=self.task.min_seconds,
        )
        exact = self.workload.forward(plain, self.inputs, self.size).float()
        return QuantizationError(
            relative=output_error(self._forward(), exact, of_pixels=False).relative,
            unquantized_seconds=summarise(seconds),
            unquantized_weight_bytes=weight_totals([plain])[1],
        )

    def _errors(self, sides: Sequence[Callable[[], Tensor]], *, run_bytes: int) -> list[OutputError | None]:
        """Of each side against fp32: for an autoencoder that does not compute in it throughout, and for a transformer
        that is compared, where the memory suffices for it. `run_bytes` are what a run of ours takes."""
        of_pixels, exact = isinstance(self.workload, VideoDecoding), None
        if of_pixels or isinstance(self.workload, VideoEncoding):
            if self.dtype != torch.float32 or self.device.type != "cpu":
                self.parent.tell("computing in fp32")
                exact = exact_output(self.workload, self.module, self.inputs, self.size)
        elif self.workload.component in TRANSFORMERS and len(sides) > 1 and self.dtype != torch.float32:
            exact = self._exact_if_it_fits(run_bytes)
        return [None if exact is None else output_error(side(), exact, of_pixels=of_pixels) for side in sides]

    def _exact_if_it_fits(self, run_bytes: int) -> Tensor | None:
        """The transformer's output in fp32; None, and a note, without room for its weights and a run in fp32."""
        num_parameters, _ = weight_totals([self.module])
        wide = torch.float32.itemsize
        needed = wide * num_parameters + run_bytes * wide // self.dtype.itemsize
        if needed <= free_bytes(self.device):
            self.parent.tell("computing in fp32")
            try:
                return output_in_fp32(self.workload, self._in_fp32(), self.inputs, self.size)
            except torch.OutOfMemoryError:  # by an estimate that was too low; what was timed is not lost for it
                pass
        self.notes.append(f"not compared with fp32, which takes {needed / 2**30:.2f} GiB or more besides")
        return None

    def _in_fp32(self) -> nn.Module:
        """The module with the same weights, loaded again: its kernels are chosen for its precision. On the device,
        wherever the weights of the other are."""
        return self._loaded(
            replace(
                self.context,
                dtype=torch.float32,
                layers=LayerContext(),
                source=SameWeights(self.module),
                cuda_graphs=False,
                compile_blocks=False,
            )
        )

    def _forward(self) -> Tensor:
        return self.workload.forward(self.module, self.prepared, self.size)

    def _matmul_rate(self) -> float:
        self.parent.tell("measuring how fast matrices multiply")
        return matmul_rate(self.device, self.dtype)


@dataclass(frozen=True)
class _Compared:
    """A class of modules of which one was timed beside ours, and the largest difference of their outputs."""

    module: str
    side: Side
    ratio: Ratio
    difference: float


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """The largest difference of two outputs over the reference's largest value."""
    scale = reference.float().abs().max().item()
    return (ours.float() - reference.float()).abs().max().item() / scale


def main() -> None:
    """Entry point of the process."""
    connection, task = take_task(ComponentTask)
    parent = watch_parent(connection)
    configure_logging(task.engine.args.logging)
    task.engine.apply()
    with failures_told(parent), torch.inference_mode():
        parent.send(ComponentBench(task, parent).result())


if __name__ == "__main__":
    main()
