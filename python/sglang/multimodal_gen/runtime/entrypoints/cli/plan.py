"""`sglang plan`: every layout of a model over so many GPUs, what each costs, and which one would be taken."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.cost_model import CODING_BYTES, CONTEXT_BYTES, HARDWARE
from sglang.multimodal_gen.configs.declare import CLI_ONLY, Parameter, arg, build, parameters
from sglang.multimodal_gen.configs.memory_plan import MemoryWish, size_of
from sglang.multimodal_gen.configs.model_outline import ModelOutline, outline_of
from sglang.multimodal_gen.configs.parallel_choice import element_bytes, this_machine
from sglang.multimodal_gen.configs.parallel_plan import (
    GIB,
    LayoutPlan,
    ParallelPlan,
    PlanOptions,
    counted,
    plan_layouts,
)
from sglang.multimodal_gen.configs.replica_shape import AXES, DEGREES, ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.bench.tables import Section, as_time, show_sections
from sglang.multimodal_gen.runtime.entrypoints.cli.options import CommandArgs, OptionParser, read_config, warn
from sglang.multimodal_gen.runtime.entrypoints.cli.plan_comparison import ComparisonJob
from sglang.multimodal_gen.runtime.entrypoints.cli.plan_memory import MemoryOutlook, outlook
from sglang.multimodal_gen.runtime.entrypoints.cli.plan_memory import as_dict as memory_as_dict
from sglang.multimodal_gen.runtime.entrypoints.cli.plan_memory import sections as memory_sections
from sglang.multimodal_gen.runtime.server_args import ResolvedServerArgs, resolve_server_args, server_options

_OF_REQUESTS = (
    "width", "height", "num_frames", "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length",
)  # fmt: skip
_OF_MODELS = ("model_path", "model_id", "backend", "precision", "quantization")
_HEADER = (
    "",
    "layout",
    "step",
    "speed-up",
    "throughput",
    "memory",
    "transformer",
    "encoders",
    "activations",
    "sent",
    "",
)
_NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class PlanCommandArgs(CommandArgs):
    """For which GPUs, and how the plan is shown."""

    gpu: str | None = arg(
        None,
        help="Whose rates and links are reckoned with.",
        group="plan",
        unset="this machine's, or an H100's where there is none that was measured",
        choices=tuple(HARDWARE),
        exposed=CLI_ONLY,
    )
    gpu_memory: float | None = arg(
        None,
        help="Memory of each GPU, in GiB.",
        group="plan",
        unset="that of this machine's smallest, or 80",
        metavar="GIB",
        minimum=0.1,
        maximum=10_000.0,
        exposed=CLI_ONLY,
    )
    compare: str | None = arg(
        None,
        help="Compare the model of costs with what `sglang bench parallel --json FILE` measured.",
        group="plan",
        unset="nothing",
        metavar="FILE",
        exposed=CLI_ONLY,
    )
    json: bool = arg(False, help="Print JSON instead of a table.", group="plan", exposed=CLI_ONLY)


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """A plan to print."""

    plan: ParallelPlan
    memory: MemoryOutlook
    as_json: bool

    def run(self) -> int:
        """Print it."""
        if self.as_json:
            found = as_dict(self.plan) | {"memory": memory_as_dict(self.memory)}
            sys.stdout.write(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
            return 0
        work, shape = self.plan.work, self.plan.outline.shape
        facts = [
            ("transformer", f"{shape.num_parameters / 1e9:.2f} B parameters, {shape.num_heads} attention heads"),
            ("a step", f"{counted(work.rows, 'row')} of {work.image_tokens} image and {work.text_tokens} text tokens"),
            ("one GPU", f"{as_time(self.plan.alone.seconds)} a step, by the rates of {self.plan.hardware.name}"),
            ("autoencoder", f"{_autoencoder_bytes(self.plan) / GIB:.1f} GiB on every GPU"),
        ]
        rows = [_row(self.plan, layout) for layout in self.plan.layouts]
        show_sections(
            [
                Section(self.plan.outline.name, facts),
                Section(counted(self.plan.num_gpus, "GPU"), rows, header=_HEADER),
                *memory_sections(self.memory),
            ]
        )
        if self.plan.num_gpus > 1 and self.plan.chosen is not None:
            sys.stdout.write(f"\n{self.plan.reason}\n")
        sys.stdout.write(
            "\nspeed-up: of one request; throughput: of one request in each replica (dp). memory: of each GPU, with "
            f"{CODING_BYTES / GIB:g} GiB to decode with, where that is more than the activations, and "
            f"{CONTEXT_BYTES / GIB:g} for all else. sent: by each GPU in a step.\n"
        )
        return 0


def parser() -> OptionParser:
    """The options of `sglang plan`."""
    return OptionParser(
        "plan", "Show what each layout of a model over several GPUs costs, from its configs alone.", options()
    )


def options() -> Mapping[str, Parameter]:
    """Its own, and those of requests and of the engine that the plan depends on."""
    engine = {
        name: option
        for name, option in server_options().items()
        if name in _OF_MODELS or option.declaration.group in ("parallel", "memory")
    }
    return {**parameters(PlanCommandArgs), **_request_options(), **engine}


def configure(arguments: Sequence[str]) -> PlanJob | ComparisonJob:
    """Read the command line, the environment and the configuration file. Raises InvalidRequest or ModelError."""
    flags = parser().typed(arguments)
    config_file = read_config(flags.pop("config", None))
    known = {**parameters(PlanCommandArgs), **_request_options()}
    engine_flags = {name: flags.pop(name) for name in server_options() if name in flags}
    engine_file = None
    if config_file is not None:
        flags = config_file.without(server_options()).read(known) | flags
        engine_file = config_file.only(server_options())
    if "compare" in flags:
        return ComparisonJob(path=flags["compare"], hardware=flags.get("gpu"), as_json=flags.get("json", False))
    resolved = resolve_server_args(engine_flags, environ=envs.current(), config_file=engine_file)
    warn(resolved.warnings)
    plan, memory = _plans(resolved, flags)
    return PlanJob(plan=plan, memory=memory, as_json=flags.get("json", False))


def _plans(resolved: ResolvedServerArgs, flags: Mapping[str, Any]) -> tuple[ParallelPlan, MemoryOutlook]:
    model, parallel = resolved.args.model, resolved.args.parallel
    outline = outline_of(get_model_info(model.model_path, model_id=model.model_id, backend=model.backend))
    asked = {name: flags[name] for name in _OF_REQUESTS if name in flags}
    machine, gpu, memory = this_machine(), flags.get("gpu"), flags.get("gpu_memory")
    wanted = PlanOptions(
        num_gpus=parallel.num_gpus,
        hardware=machine.hardware if gpu is None else HARDWARE[gpu],
        gpu_bytes=machine.gpu_bytes if memory is None else memory * GIB,
        dp=parallel.dp_size,
        fixed={
            axis: getattr(parallel.replica, axis)
            for option, axis in DEGREES.items()
            if resolved.sources[option] not in ("default", "chosen")
        },
        element_bytes=element_bytes(resolved.args.execution.precision),
        encoder_parallel=resolved.args.execution.encoder_parallel,
        quantized=resolved.args.execution.quantization is not None,
    )
    params = build(SamplingParams, asked, what="parameter")
    work = outline.work(params)
    plan, args = plan_layouts(outline, work, wanted), resolved.args.memory
    limit = math.inf if args.gpu_memory_limit is None else args.gpu_memory_limit * GIB
    wish = MemoryWish(
        gpu_bytes=min(wanted.gpu_bytes, limit),
        hardware=wanted.hardware,
        args=args,
        shape=ReplicaShape() if plan.chosen is None else plan.chosen.shape,
        element_bytes=wanted.element_bytes,
        encoder_parallel=wanted.encoder_parallel,
        quantized=wanted.quantized,
        size=size_of(params, outline),
    )
    return plan, outlook(outline, work, wish, sized=_sized(params, outline))


def _sized(params: SamplingParams, outline: ModelOutline) -> tuple[str, ...]:
    complete, flags = params.filled_from(outline.defaults), []
    if (params.width, params.height) != (None, None):
        flags += ["--warmup-resolutions", f"{complete.width}x{complete.height}"]
    if params.num_frames is not None:
        flags += ["--warmup-num-frames", f"{params.num_frames}"]
    return tuple(flags)


def _request_options() -> Mapping[str, Parameter]:
    return {name: option for name, option in parameters(SamplingParams).items() if name in _OF_REQUESTS}


def _autoencoder_bytes(plan: ParallelPlan) -> float:
    return next(layout.memory.autoencoder for layout in plan.layouts if layout.memory is not None)


def _row(plan: ParallelPlan, layout: LayoutPlan) -> tuple[str, ...]:
    mark = "->" if layout is plan.chosen else ""
    name = f"{layout.shape}" if layout.dp == 1 else f"dp {layout.dp} x {layout.shape}"
    problem = layout.problem or ""
    if layout.cost is None or layout.memory is None or layout.speedup is None:
        return mark, name, *([_NOTHING] * (len(_HEADER) - 3)), problem
    bound = "the host is the limit" if layout.cost.is_host_bound else ""
    return (
        mark,
        name,
        as_time(layout.cost.seconds),
        f"{layout.speedup:.2f}",
        f"{layout.speedup * layout.dp:.2f}",
        f"{layout.memory.total / GIB:.1f} GiB",
        f"{layout.memory.transformer / GIB:.1f} GiB",
        f"{layout.memory.text_encoders / GIB:.1f} GiB",
        f"{layout.memory.activations / GIB:.1f} GiB",
        f"{layout.cost.sent_bytes / 1e9:.2f} GB",
        problem or bound,
    )


def as_dict(plan: ParallelPlan) -> dict[str, Any]:
    """The plan as plain data: seconds and bytes."""
    return {
        "model": plan.outline.name,
        "gpu": plan.hardware.name,
        "gpu_bytes": plan.gpu_bytes,
        "num_gpus": plan.num_gpus,
        "rows": plan.work.rows,
        "image_tokens": plan.work.image_tokens,
        "text_tokens": plan.work.text_tokens,
        "num_parameters": plan.outline.shape.num_parameters,
        "num_attention_heads": plan.outline.shape.num_heads,
        "one_gpu_step_seconds": plan.alone.seconds,
        "reason": None if plan.chosen is None else plan.reason,
        "layouts": [_layout_as_dict(layout) | {"chosen": layout is plan.chosen} for layout in plan.layouts],
    }


def _layout_as_dict(layout: LayoutPlan) -> dict[str, Any]:
    found: dict[str, Any] = {"dp": layout.dp} | {axis: getattr(layout.shape, axis) for axis in AXES}
    found |= {"problem": layout.problem, "fits": layout.fits}
    if layout.cost is not None and layout.memory is not None:
        found |= {
            "step_seconds": layout.cost.seconds,
            "speedup": layout.speedup,
            "host_seconds": layout.cost.host_s,
            "waiting_seconds": layout.cost.waiting_s,
            "sent_bytes": layout.cost.sent_bytes,
            "memory_bytes": layout.memory.total,
            "transformer_bytes": layout.memory.transformer,
            "text_encoder_bytes": layout.memory.text_encoders,
            "autoencoder_bytes": layout.memory.autoencoder,
            "activation_bytes": layout.memory.activations,
        }
    return found
