"""The part of `sglang plan` about memory: where weights go on the GPU asked for, and on cards of usual sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sglang.multimodal_gen.configs.cost_model import CODING_BYTES, CONTEXT_BYTES, StepWork
from sglang.multimodal_gen.configs.memory_args import as_flags
from sglang.multimodal_gen.configs.memory_plan import GIB, MemoryPlan, MemoryWish, plan_memory
from sglang.multimodal_gen.configs.model_outline import ModelOutline
from sglang.multimodal_gen.runtime.bench.tables import Section, as_time

CARDS_GIB = (8, 12, 16, 24, 32, 48, 80)
_COMPONENTS_HEADER = ("component", "weights", "where", "always on the GPU")
_CARDS_HEADER = ("GPU", "on the host", "GPU holds", "host holds", "step", "slower", "")


@dataclass(frozen=True, kw_only=True)
class MemoryOutlook:
    """`here` is the plan for the GPU that was asked for, `cards` are those for others, each with its GiB. `sized` are
    the options by which a server plans for requests of the size that was asked for."""

    here: MemoryPlan
    cards: tuple[tuple[int, MemoryPlan], ...]
    sized: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Those by which a server does what is planned here; none where all weights stay on the GPU."""
        residency = as_flags(self.here.modes)
        return [*self.sized, *residency] if residency else []


def outlook(outline: ModelOutline, work: StepWork, wish: MemoryWish, *, sized: tuple[str, ...] = ()) -> MemoryOutlook:
    """What to show. Raises InvalidValue as `plan_memory` does."""
    anywhere = replace(wish, args=replace(wish.args, gpu_memory_limit=None))
    cards = ((gib, plan_memory(outline, work, replace(anywhere, gpu_bytes=gib * GIB))) for gib in CARDS_GIB)
    return MemoryOutlook(here=plan_memory(outline, work, wish), cards=tuple(cards), sized=sized)


def sections(found: MemoryOutlook) -> list[Section]:
    """As tables."""
    plan = found.here
    rows = []
    for need in plan.components:
        mode = plan.modes[need.name]
        always = need.num_bytes if mode == "resident" else 0.0
        if mode == "layerwise-offload" and need.is_transformer:
            always = need.outside + plan.kept_share * sum(need.blocks)
        rows.append((need.name, _gib(need.num_bytes), mode, _gib(always)))
    facts = [
        ("activations", _gib(plan.activations)),
        ("decoding", _gib(CODING_BYTES)),
        ("all else", _gib(CONTEXT_BYTES)),
        ("peak", f"{_gib(plan.peak_bytes)} of {_gib(plan.gpu_bytes)}{'' if plan.fits else ', which is too little'}"),
        ("host", _gib(plan.host_bytes)),
        ("a step", _step(plan)),
        ("options", " ".join(found.options) or "none needed"),
    ]
    cards = [
        (
            f"{gib} GiB",
            ", ".join(name for name, mode in plan.modes.items() if mode != "resident") or "nothing",
            _gib(plan.peak_bytes),
            _gib(plan.host_bytes),
            as_time(plan.step_seconds),
            f"{plan.slowdown:.2f}",
            "" if plan.fits else f"needs {_gib(plan.least_bytes)}",
        )
        for gib, plan in found.cards
    ]
    return [
        Section("memory", rows, header=_COMPONENTS_HEADER),
        Section("in all", facts),
        Section("other GPUs", cards, header=_CARDS_HEADER),
    ]


def as_dict(found: MemoryOutlook) -> dict[str, Any]:
    """As plain data: seconds and bytes."""
    return _plan_as_dict(found.here) | {
        "components": [
            {"name": need.name, "weight_bytes": need.num_bytes, "residency": found.here.modes[need.name]}
            for need in found.here.components
        ],
        "options": found.options,
        "cards": [{"gib": gib} | _plan_as_dict(plan) for gib, plan in found.cards],
    }


def _plan_as_dict(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "gpu_bytes": plan.gpu_bytes,
        "fits": plan.fits,
        "modes": dict(plan.modes),
        "peak_bytes": plan.peak_bytes,
        "least_bytes": plan.least_bytes,
        "host_bytes": plan.host_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "step_seconds": plan.step_seconds,
        "slowdown": plan.slowdown,
    }


def _step(plan: MemoryPlan) -> str:
    if not plan.streamed_bytes:
        return as_time(plan.step_seconds)
    return (
        f"{as_time(plan.step_seconds)}, {plan.slowdown:.2f} times as long as with all weights on the GPU: "
        f"{plan.streamed_bytes / 1e9:.1f} GB come in each"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
