"""The model that a benchmark is about, as its configs describe it before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang.multimodal_gen.configs.memory_plan import MemoryPlan
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.registry import ResolvedModel, load_config, read_model_index
from sglang.multimodal_gen.runtime.bench.messages import ComponentTask, CostTask
from sglang.multimodal_gen.runtime.bench.worker.flops import count_flops
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent
from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext, NativeModule
from sglang.multimodal_gen.runtime.pipelines_core import ComposedPipelineBase, find_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.memory import longest_chunk
from sglang.multimodal_gen.runtime.pipelines_core.placement import place
from sglang.multimodal_gen.runtime.pipelines_core.residency import plan_for
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, Workload, WorkSize
from sglang.multimodal_gen.runtime.server_args import ModelArgs, ServerArgs


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model's directory and what its configs say."""

    resolved: ResolvedModel
    directory: Path
    pipeline_class: type[ComposedPipelineBase]
    config: PipelineConfig
    configs: Mapping[str, ModelConfig]
    defaults: SamplingParams

    def native(self, component: str) -> NativeModule:
        """What loads a component."""
        loader = self.pipeline_class.components[component]
        assert isinstance(loader, NativeModule), "a workload is of a native module"
        return loader

    def listed(self, component: str) -> tuple[str, str]:
        """Library and class that model_index.json names."""
        library, class_name = read_model_index(self.directory)[component]
        return library, class_name

    def load_context(self, args: ServerArgs, report: Callable[[str], None]) -> LoadContext:
        """What components are loaded with under these options."""
        return self.pipeline_class.load_context(
            self.config,
            place(args.execution),
            args.execution,
            random_weights=args.model.random_weights,
            report=report,
        )

    def memory_plan(self, args: ServerArgs, sized: SamplingParams) -> MemoryPlan | None:
        """Where weights would be in an engine with these options for requests of this size. Raises InvalidValue for
        what cannot be."""
        return plan_for(self.resolved, args.memory, args.execution, place(args.execution), SINGLE, sized)

    def flops(self, workload: Workload, size: WorkSize) -> int:
        """Of one forward of ours."""
        native = self.native(workload.component)
        inputs = workload.inputs(self.configs, size, Drawing(torch.device("meta"), torch.float32))
        return count_flops(
            native.module_class,
            self.configs[workload.component],
            lambda module: workload.forward(module, inputs, size),
        )


def find_model(model: ModelArgs, workload: str, parent: Parent) -> BenchModel:
    """Raises ModelError or InvalidRequest saying what is wrong with the model's path or configs."""
    resolved, pipeline_class = find_pipeline(model, report=parent.tell)
    if workload not in pipeline_class.workloads:
        raise UnsupportedModel(
            f"model_path: {resolved.name} has no {workload} to measure; it has "
            f"{', '.join(pipeline_class.workloads) or 'no component'}",
            param="model_path",
        )
    assert resolved.local_path is not None and resolved.entry is not None, "found with its directory"
    index = read_model_index(resolved.local_path)
    natives = {
        name: load
        for name, load in pipeline_class.components.items()
        if isinstance(load, NativeModule) and not pipeline_class.leaves_out(name, index)
    }
    return BenchModel(
        resolved=resolved,
        directory=resolved.local_path,
        pipeline_class=pipeline_class,
        config=load_config(resolved.entry),
        configs={name: load.config(resolved.local_path / name) for name, load in natives.items()},
        defaults=resolved.defaults,
    )


def work_size(
    task: ComponentTask | CostTask,
    model: BenchModel,
    *,
    dtype: torch.dtype,
    free_bytes: int,
    strips: StripSharding | None = None,
) -> WorkSize:
    """The sizes asked for, completed by the model's defaults; chunks as long as a pipeline would decode them, of the
    largest of these strips.

    Raises: InvalidRequest for sizes that the model cannot do.
    """
    params = SamplingParams(width=task.width, height=task.height, num_frames=task.num_frames)
    params = params.filled_from(model.defaults)
    geometry = model.pipeline_class.geometry_of(model.configs, model.config)
    geometry.check(params)
    assert params.width and params.height and params.num_frames, "checked with the geometry"
    latent_shape = geometry.latent_shape(params)
    num_text_tokens = task.max_sequence_length or params.max_sequence_length or model.config.max_sequence_length
    memory = model.pipeline_class.decoder_memory_of(model.configs, dtype.itemsize)
    batch_size, chunk_frames = 1, None
    if isinstance(task, ComponentTask):
        batch_size, chunk_frames = task.batch_size, task.chunk_frames
    longest = latent_shape[1]
    if memory is not None:
        held = (strips or StripSharding()).largest(params.height, params.width, ratio=geometry.spatial_ratio)

        def peak_bytes(length: int) -> int:
            return batch_size * memory.chunk_bytes(length * geometry.temporal_ratio, *held)

        longest = longest_chunk(range(1, longest + 1), peak_bytes, free_bytes) or 1
    return WorkSize(
        width=params.width,
        height=params.height,
        num_frames=params.num_frames,
        latent_shape=latent_shape,
        batch_size=batch_size,
        num_text_tokens=num_text_tokens,
        chunk_frames=min(chunk_frames or longest, latent_shape[1]),
    )
