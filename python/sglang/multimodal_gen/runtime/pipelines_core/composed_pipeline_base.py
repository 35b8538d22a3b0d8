"""`ComposedPipelineBase`: loads a checkpoint's components, makes stages of them, and runs requests unit by unit."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
from torch import nn

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.memory_args import ALL_RESIDENT, MemoryArgs
from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.model_info import ComponentRead, ModelInfo, TaskLimits
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.cache_params import with_environment
from sglang.multimodal_gen.configs.sample.sampling_params import (
    GENERAL_DEFAULTS,
    MAX_SEED,
    PARAMETERS_OF_SOME,
    SamplingParams,
)
from sglang.multimodal_gen.errors import InsufficientMemory, UnsupportedModel, UnsupportedParameter, shown
from sglang.multimodal_gen.registry import ResolvedModel, load_config, read_model_index
from sglang.multimodal_gen.runtime.cache.choice import wants_cache
from sglang.multimodal_gen.runtime.distributed.collectives import least
from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE, ParallelContext
from sglang.multimodal_gen.runtime.layers.attention.registry import device_facts
from sglang.multimodal_gen.runtime.layers.attention.switch import explain_kernels
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan, LayerContext
from sglang.multimodal_gen.runtime.layers.forward_graphs import forget_graphs, graph_input_bytes
from sglang.multimodal_gen.runtime.layers.gemm_choice import gemm_choices, use_gemm_choices
from sglang.multimodal_gen.runtime.layers.strip_sharding import explain_strips
from sglang.multimodal_gen.runtime.loader.component_loader import (
    Checkpoint,
    ComponentLoader,
    LoadContext,
    explain_reads,
    weight_totals,
)
from sglang.multimodal_gen.runtime.loader.quantization_wishes import (
    check_is_read,
    check_wishes,
    describe_quantization,
    explain_quantization,
    replaced_weights,
)
from sglang.multimodal_gen.runtime.loader.random_weights import RandomSource
from sglang.multimodal_gen.runtime.pipelines_core.adapters import Adapters
from sglang.multimodal_gen.runtime.pipelines_core.attention_choice import AttentionTuner, read_choices
from sglang.multimodal_gen.runtime.pipelines_core.conditioning_cache import ConditioningCache
from sglang.multimodal_gen.runtime.pipelines_core.device_clock import DeviceClock
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.lane_streams import CudaStreams, LaneStreams
from sglang.multimodal_gen.runtime.pipelines_core.memory import (
    USABLE_SHARE,
    DecoderMemory,
    free_bytes,
    is_out_of_memory,
    limit_memory,
    model_too_large,
)
from sglang.multimodal_gen.runtime.pipelines_core.memory_meter import meter_for
from sglang.multimodal_gen.runtime.pipelines_core.placement import Placement, place
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.residency import (
    WeightRoom,
    components_on_host,
    plan_for,
    settle_weights,
)
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.state_file import read_state, to_host
from sglang.multimodal_gen.runtime.pipelines_core.workload import Workload
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

Report = Callable[[str], None]


def _ignore(_: str) -> None:
    """Tells nobody."""


# How old the reading of the free memory may be that a new request is checked against: it takes a millisecond on a CPU.
_BUDGET_SECONDS = 0.05


Join = Callable[[torch.device], ParallelContext]
"""Meets the other ranks of the replica; the device is this rank's."""


def alone(device: torch.device) -> ParallelContext:
    """A replica of one rank."""
    return SINGLE


class ComposedPipelineBase:
    """Base of all native pipelines. A family says which components it has and which stages they make.

    Components become attributes of the same name, so a family annotates them. One instance serves all requests; what
    belongs to a request lives in its Req.
    """

    components: ClassVar[Mapping[str, ComponentLoader]] = {}
    """Directory of the checkpoint -> what loads it; empty for a family without a checkpoint."""
    optional_components: ClassVar[frozenset[str]] = frozenset()
    """Those of them that are None where `model_index.json` has null."""
    index_values: ClassVar[tuple[str, ...]] = ()
    """Keys of `model_index.json` that hold a plain value: attributes too, None where the key is missing."""
    own_parameters: ClassVar[frozenset[str]] = frozenset()
    """Those of `PARAMETERS_OF_SOME` that the family reads; a request with another is refused."""
    workloads: ClassVar[Mapping[str, Workload]] = {}
    """What benchmarks run: `dit`, `vae_decode`, `vae_encode`, `encoder`, as far as the family has them."""
    reference_fits_latents: ClassVar[bool] = True
    """Whether diffusers' pipeline of the same name brings latents to the dtype of its autoencoder."""
    gives_previews: ClassVar[bool] = True
    """Whether its denoising stages keep the clean latents that they predict, in the layout of Req."""
    takes_diffusers_kwargs: ClassVar[bool] = False
    """Whether there is a call of diffusers' that `diffusers_kwargs` could go to."""

    def __init__(
        self,
        *,
        name: str,
        config: PipelineConfig,
        defaults: SamplingParams,
        placement: Placement,
        parallel: ParallelContext = SINGLE,
        components: Mapping[str, Any],
        conditioning_cache: ConditioningCache | None = None,
        entry: ModelEntry | None = None,
        weight_room: WeightRoom | None = None,
        load_seconds: float = 0.0,
        reads: Sequence[ComponentRead] = (),
    ) -> None:
        """Raises UnsupportedModel or CorruptCheckpoint when the components do not fit together."""
        self.name = name
        self.config = config
        self.defaults = defaults
        self.placement = placement
        self.parallel = parallel
        self.device = placement.device
        self.dtype = placement.dtype
        self.load_seconds = load_seconds
        self.reads = tuple(reads)
        self.entry = entry
        self.conditioning_cache = ConditioningCache(0) if conditioning_cache is None else conditioning_cache
        self.modules: dict[str, nn.Module] = {n: c for n, c in components.items() if isinstance(c, nn.Module)}
        for component, value in components.items():
            setattr(self, component, value)
        self.weight_room = WeightRoom() if weight_room is None else weight_room
        self.adapters = Adapters.of(self.modules, park=self.weight_room.clear)
        self.attention_tuner = AttentionTuner.of(list(self.modules.values()), self.device, parallel)
        self.check_components()
        self.stages = self.create_pipeline_stages()
        for stage in self.stages:
            stage.parallel, stage.teacache, stage.adapters = parallel, config.teacache, self.adapters
        names = [stage.name for stage in self.stages]
        assert len(set(names)) == len(names), f"stages of one pipeline need different names: {names}"
        self._stage_order = {name: index for index, name in enumerate(names)}
        self.meter = meter_for(self.device)
        self.clock = DeviceClock(self.device)
        self.lanes = LaneStreams()
        self._loaded_bytes = self.meter.allocated_bytes()
        self._budget, self._budget_time = 0, -math.inf

    # What a family says

    @classmethod
    def leaves_out(cls, component: str, index: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this `model_index.json` has no such component, and may have none."""
        return component in cls.optional_components and index.get(component) in (None, [None, None])

    @classmethod
    def check_model_index(cls, index: Mapping[str, Any]) -> None:
        """Refuse checkpoints whose `model_index.json` asks for what the family cannot do yet."""

    @classmethod
    def geometry_of(cls, configs: Mapping[str, ModelConfig], config: PipelineConfig) -> VideoGeometry:
        """How pixels map to latents and tokens, from the configs of the native components."""
        raise NotImplementedError

    @classmethod
    def decoder_memory_of(cls, configs: Mapping[str, ModelConfig], element_size: int) -> DecoderMemory | None:
        """What decoding takes, likewise; None where no native component decodes."""
        return None

    def check_components(self) -> None:
        """Refuse checkpoints whose components do not fit together."""

    def read_parameters(self) -> frozenset[str]:
        """`own_parameters`, for a family whose checkpoints differ in them."""
        return self.own_parameters

    def create_pipeline_stages(self) -> list[Stage]:
        """The stages in order."""
        raise NotImplementedError

    def limits(self) -> TaskLimits:
        """The sizes that this checkpoint can do."""
        return TaskLimits(
            size_multiple=1,
            max_pixels=self.config.max_pixels,
            frame_stride=1,
            max_frames=self.config.max_frames,
            max_sequence_length=self.config.max_sequence_length,
        )

    # Loading

    @classmethod
    def load(
        cls,
        resolved: ResolvedModel,
        execution: ExecutionArgs,
        *,
        memory: MemoryArgs = ALL_RESIDENT,
        local_rank: int = 0,
        num_gpus: int = 1,
        join: Join = alone,
        sized: SamplingParams | None = None,
        random_weights: bool = False,
        report: Report = _ignore,
    ) -> Self:
        """The pipeline of a resolved and downloaded model; each choice made for the user is reported.

        With `random_weights` the directory's configs are all that is read, and its tokenizers if it has them.

        Raises: ModelError or InvalidRequest saying what in the checkpoint or the options does not fit.
        """
        assert resolved.entry is not None, "resolved before loading"
        start = time.perf_counter()
        placement = place(execution, local_rank=local_rank, num_gpus=num_gpus)
        config = load_config(resolved.entry)
        parallel = join(placement.device)
        limit_memory(placement.device, memory.gpu_memory_limit)
        plan = plan_for(resolved, memory, execution, placement, parallel, sized)
        context = cls.load_context(
            config, placement, execution, parallel=parallel, random_weights=random_weights, report=report
        )
        components: dict[str, Any] = {}
        if plan is not None:
            report(plan.reason)
            context = dataclasses.replace(context, on_host=components_on_host(plan))
        if cls.components:
            assert resolved.local_path is not None, "downloaded before loading"
            components = cls._load_components(resolved.local_path, context, report)
        modules = {name: module for name, module in components.items() if isinstance(module, nn.Module)}
        room = settle_weights(modules, plan, memory, placement.device)
        reads = cls._explain(components, modules, context)
        pipeline = cls(
            name=resolved.name,
            config=config,
            defaults=cls._defaults(resolved.defaults, execution),
            placement=placement,
            parallel=parallel,
            components=components,
            conditioning_cache=ConditioningCache(execution.conditioning_cache_mib << 20),
            entry=resolved.entry,
            weight_room=room,
            load_seconds=time.perf_counter() - start,
            reads=reads,
        )
        for stage in pipeline.stages:
            stage.deterministic = execution.deterministic
        if execution.enable_lane_overlap:
            report(pipeline.overlap_lanes())
        return pipeline

    @staticmethod
    def _defaults(own: SamplingParams, execution: ExecutionArgs) -> SamplingParams:
        """The model's, with what options and environment say otherwise."""
        if execution.scheduler is not None:
            own = dataclasses.replace(own, scheduler=execution.scheduler)
        return with_environment(own, envs.current())

    def overlap_lanes(self) -> str:
        """Let texts and frames be computed beside the denoising of other requests; that they are, or why not."""
        obstacles = {
            "it takes a GPU": self.device.type != "cuda",
            "ranks that talk to each other do so in one order": self.parallel.world.size > 1,
            "weights come and go": self.weight_room.room is not None,
        }
        for obstacle, is_there in obstacles.items():
            if is_there:
                return f"enable_lane_overlap: no effect, since {obstacle}"
        self.lanes = LaneStreams(CudaStreams(self.device))
        return "enable_lane_overlap: texts and frames are computed beside the denoising of other requests"

    def may_run_beside(self, units: Sequence[tuple[str, Req]]) -> bool:
        """Whether what is encoded and decoded of these units of phases may run beside the denoising: there is room for
        all at once, and no adapter whose tables they would share."""
        if not self.lanes.are_two or self.adapters.loaded:
            return False
        peaks = [phase.peak_bytes for name, req in units for phase in req.phases if phase.name == name]
        return sum(peaks) <= USABLE_SHARE * free_bytes(self.device)

    @staticmethod
    def _explain(
        components: Mapping[str, Any], modules: Mapping[str, nn.Module], context: LoadContext
    ) -> Sequence[ComponentRead]:
        """Report what was chosen for the components; what reading them took."""
        # On a CPU weights are mapped, which takes no time until they are used.
        on_cpu = context.device.type == "cpu"
        reads = context.source.reads if isinstance(context.source, Checkpoint) and not on_cpu else []
        for reason in (
            *explain_kernels(modules.values()),
            *explain_strips(components),
            *explain_quantization(components, context.device),
            *explain_reads(reads),
        ):
            context.report(reason)
        if context.compile_blocks and not any(hasattr(module, "block_runner") for module in modules.values()):
            context.report("enable_torch_compile: no effect, since no component is a transformer of ours")
        return reads

    @classmethod
    def load_context(
        cls,
        config: PipelineConfig,
        placement: Placement,
        execution: ExecutionArgs,
        *,
        parallel: ParallelContext = SINGLE,
        random_weights: bool = False,
        report: Report = _ignore,
    ) -> LoadContext:
        """What each component is loaded with. Raises InvalidRequest for options that cannot be had here."""
        check_wishes(execution, cls.components, random_weights=random_weights)
        for reason in placement.reasons:
            report(reason)
        facts, precision = device_facts(placement.device), placement.precision
        autotune = execution.enable_attention_backend_autotune
        memory = read_choices(placement.device, parallel, autotune=autotune, report=report)
        of_products = None
        if execution.enable_gemm_autotune and not execution.deterministic:
            of_products = gemm_choices(placement.device, parallel, envs.cache_root(), report=report)
        use_gemm_choices(of_products)
        plan = partial(AttentionPlan.chosen, options=execution, facts=facts, precision=precision, memory=memory)
        return LoadContext(
            device=placement.device,
            dtype=placement.dtype,
            layers=LayerContext.spread(
                parallel,
                self_attention=plan("self"),
                cross_attention=plan("cross"),
            ),
            fp32_components=config.fp32_components,
            vae_dtype=placement.vae_dtype,
            source=RandomSource() if random_weights else Checkpoint(replaced_weights(execution)),
            encoder_parallel=execution.encoder_parallel,
            compile_blocks=execution.enable_torch_compile,
            cuda_graphs=execution.cuda_graphs == "auto" and placement.device.type == "cuda",
            quantization=execution,
            report=report,
        )

    @classmethod
    def _load_components(cls, directory: Path, context: LoadContext, report: Report) -> dict[str, Any]:
        index = read_model_index(directory)
        cls.check_model_index(index)
        components: dict[str, Any] = {name: index.get(name) for name in cls.index_values}
        for name, load in cls.components.items():
            listed = index.get(name)
            if cls.leaves_out(name, index):
                check_is_read(context.quantization, name)
                components[name] = None
                continue
            if not isinstance(listed, list) or len(listed) != 2 or not isinstance(listed[1], str):
                raise UnsupportedModel(
                    f"model_index.json says {name}: {shown(listed)}; {cls.__name__} wants a [library, class] pair there"
                )
            report(f"loading {name}")
            try:
                components[name] = load(directory / name, listed[1], context)
            except Exception as error:
                if is_out_of_memory(error):
                    raise model_too_large(context.device) from error
                raise
        return components

    def model_info(self) -> ModelInfo:
        """What the other processes need to know of the loaded model."""
        num_parameters, weight_bytes = weight_totals(list(self.modules.values()))
        return ModelInfo(
            name=self.name,
            family="" if self.entry is None else self.entry.name,
            licence="" if self.entry is None else self.entry.licence,
            pipeline_class=type(self).__name__,
            tasks=self.config.tasks,
            precision=self.placement.precision,
            device=str(self.device),
            num_parameters=num_parameters,
            weight_bytes=weight_bytes,
            load_seconds=self.load_seconds,
            limits=self.limits(),
            defaults=self.defaults,
            gives_previews=self.gives_previews,
            reads=self.reads,
            quantization=describe_quantization(self.modules),
        )

    # Running

    def free_bytes(self) -> int:
        """Memory on the device that is free now or held by requests: what there is for requests in all."""
        movable = self.weight_room.present_bytes
        kept = self._loaded_bytes + self.conditioning_cache.held_bytes + self.adapters.held_bytes + movable
        kept += graph_input_bytes(self.modules.values())
        held = self.meter.allocated_bytes() - kept
        return least(free_bytes(self.device) + movable + max(0, held), self.parallel.world)

    def budget_bytes(self) -> int:
        """What all requests together may take above the weights."""
        return int(USABLE_SHARE * self.free_bytes())

    def admit(
        self,
        request_id: str,
        params: SamplingParams,
        inputs: RequestInputs = EMPTY,
        adapter_ids: Mapping[str, str] | None = None,
    ) -> Req:
        """The running state of a new request, with its phases and notes; nothing has run yet. `adapter_ids`: see
        `Adapters.find`.

        Raises: InvalidRequest when this checkpoint or machine cannot do it.
        """
        params = params.filled_from(self.defaults, GENERAL_DEFAULTS)
        if params.diffusers_kwargs is not None and not self.takes_diffusers_kwargs:
            raise UnsupportedParameter("diffusers_kwargs", f"{self.name} is not run by diffusers")
        self._check_cache(params)
        limits = self.limits()
        self._check_parameters(params, limits)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbelow(MAX_SEED + 1))
        elif isinstance(params.seed, tuple):
            params = dataclasses.replace(params, seed=params.seed[0])
        limits.inputs.check(inputs.given)
        params = limits.sized(params)
        adapters = self.adapters.find(params.lora_uses, adapter_ids)
        req = Req(request_id=request_id, params=params, inputs=inputs, adapters=adapters)
        for stage in self.stages:
            stage.admit(req)
        req.phases = self._phases(req)
        self._check_memory(req)
        return req

    def _check_cache(self, params: SamplingParams) -> None:
        parameter = wants_cache(params)
        if parameter is not None and not any(stage.takes_step_cache for stage in self.stages):
            raise UnsupportedParameter(parameter, f"{self.name} has no transformer whose blocks could be skipped")

    def _check_parameters(self, params: SamplingParams, limits: TaskLimits) -> None:
        read = set(self.read_parameters())
        if limits.size_from_image is not None or limits.area_rule is not None:
            read.add("max_area")
        for name in sorted(PARAMETERS_OF_SOME - read):
            if getattr(params, name) is not None:
                raise UnsupportedParameter(name, f"{self.name} has no use for it")

    def _phases(self, req: Req) -> tuple[Phase, ...]:
        phases = [phase for stage in self.stages if (phase := stage.phase(req)) is not None]
        # Weights that come for a unit are on the device beside what it computes.
        return tuple(
            msgspec.structs.replace(phase, peak_bytes=phase.peak_bytes + self.weight_room.bytes_for(phase.lane))
            for phase in phases
        )

    def saved_state(self, req: Req) -> dict[str, Any]:
        """A copy on the CPU of all that `restore` needs; the request may go on meanwhile."""
        state = to_host(req.state_dict())
        assert isinstance(state, dict), "a tree keeps its form"
        return state

    def restore(self, req: Req, path: Path) -> None:
        """Put an admitted request where it was when its state was saved; it goes on with the same bits on the CPU.

        Decoding begins anew: what it remembers is not saved, and frames that had left are dropped with their output.

        Raises: InvalidState, with the request as admission left it.
        """
        req.load_state_dict(read_state(path, identity=self.state_identity(req), device=self.device))
        for phase in req.phases:
            if phase.lane == "decode":
                req.units_done.pop(phase.name, None)

    def state_identity(self, req: Req) -> str:
        """What a saved state must agree on to be this request's: the model, the parameters and the inputs."""
        model, params = (self.name, type(self).__name__, str(self.dtype)), req.params.without_scheduling()
        adapters = [(use.adapter.digest, use.scale) for use in (*self.adapters.merged, *req.adapters)]
        return hashlib.sha256(msgspec.json.encode([model, params, req.inputs.digest(), adapters])).hexdigest()

    def _check_memory(self, req: Req) -> None:
        # All ranks ask together or none: they would wait for each other.
        if self.parallel.world.size > 1 or time.monotonic() - self._budget_time > _BUDGET_SECONDS:
            self._budget, self._budget_time = self.budget_bytes(), time.monotonic()
        free = self._budget
        if req.needed_bytes > free and req.embeds_ahead:
            req.embeds_ahead = False  # what is made of texts and steps need not be kept
            req.phases = self._phases(req)
        if req.needed_bytes > free:
            size = f"{req.params.width}x{req.params.height} with {req.params.num_frames} frames"
            kept = self.weight_room.kept_bytes
            raise InsufficientMemory(needed_bytes=req.needed_bytes, free_bytes=free, size=size, movable_bytes=kept)

    def run_unit(self, phase_name: str, requests: Sequence[Req]) -> list[OutputBatch]:
        """One unit of this phase for each request; the caller holds `torch.inference_mode()`.

        All requests share the phase's batch key. On an exception none of them has moved on. A GPU may still be at work
        when this returns, see `clock`; the frames that it returns are there.
        """
        for req in requests:
            if req.done(phase_name) == 0:
                self._begin(phase_name, req)
        stage = self.stages[self._stage_order[phase_name]]
        self.weight_room.begin(next(phase.lane for phase in requests[0].phases if phase.name == phase_name))
        # Frames leave by one rank, whether others help to make them or not.
        outputs = stage.step(requests) or [] if self.parallel.leads or not stage.only_leader else []
        for req in requests:
            req.units_done[phase_name] = req.done(phase_name) + 1
        return outputs

    def _begin(self, phase_name: str, req: Req) -> None:
        """Let the stages without a phase since the previous phase do their work, and this one prepare."""
        here = self._stage_order[phase_name]
        before = [order for phase in req.phases if (order := self._stage_order[phase.name]) < here]
        for stage in self.stages[max(before, default=-1) + 1 : here + 1]:
            stage.begin(req)

    def shrink(self, phase_name: str, req: Req) -> bool:
        """After this phase ran out of memory for the request alone: plan what is left of it with less.

        False when there is no less.
        """
        self.flush()
        if not self.stages[self._stage_order[phase_name]].shrink(req):
            return False
        req.phases = self._phases(req)
        return True

    def flush(self) -> int:
        """Forget what is kept across requests, and give unused memory back; the bytes that were forgotten."""
        held_bytes = self.conditioning_cache.held_bytes
        self.conditioning_cache.clear()
        self.reclaim()
        return held_bytes

    def reclaim(self) -> None:
        """Give back what a failed unit left behind, and what can be made again."""
        forget_graphs(self.modules.values())
        self.weight_room.clear()
        gc.collect()
        self.meter.give_back()

    def release(self, req: Req) -> None:
        """Free what the request holds."""
        req.drop_tensors()
