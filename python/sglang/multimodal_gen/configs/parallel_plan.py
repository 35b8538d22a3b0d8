"""Every layout of a model over so many GPUs, what each costs and needs, and which one is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang.multimodal_gen.configs.cost_model import (
    CODING_BYTES,
    CONTEXT_BYTES,
    HALF_PRECISION_BYTES,
    Hardware,
    StepCost,
    StepWork,
    activation_bytes,
    step_cost,
)
from sglang.multimodal_gen.configs.model_outline import ModelOutline
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import InvalidValue

GIB = 2**30
_CLOSE = 1.05  # the model is no better than that: among such layouts the simplest is taken
_NO_FASTER = 1.1


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes on each GPU."""

    transformer: float
    text_encoders: float
    autoencoder: float
    activations: float

    @property
    def total(self) -> float:
        """With what is kept for everything else."""
        weights = self.transformer + self.text_encoders + self.autoencoder
        return weights + max(self.activations, CODING_BYTES) + CONTEXT_BYTES


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """One layout. `problem` says why it cannot be or should not be taken; a layout that cannot be has no cost, and one
    that `fits` has the memory."""

    dp: int
    shape: ReplicaShape
    speedup: float | None = None
    cost: StepCost | None = None
    memory: MemoryNeed | None = None
    fits: bool = False
    problem: str | None = None

    def has_degrees(self, degrees: Mapping[str, int]) -> bool:
        """Whether these, by axis, are its own."""
        return all(getattr(self.shape, axis) == degree for axis, degree in degrees.items())


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """All layouts, the fastest for one request first, and the one that is taken among those with the `fixed`
    degrees, by axis."""

    num_gpus: int
    outline: ModelOutline
    work: StepWork
    hardware: Hardware
    gpu_bytes: float
    fixed: Mapping[str, int]
    alone: StepCost
    layouts: tuple[LayoutPlan, ...]
    chosen: LayoutPlan | None

    @property
    def reason(self) -> str:
        """Why that layout, in one sentence."""
        chosen, shape = self.chosen, self.outline.shape
        assert chosen is not None and chosen.memory is not None, "there is a layout to give reasons for"
        replicas = f" in each of {chosen.dp} replicas" if chosen.dp > 1 else ""
        held = f"{chosen.memory.total / GIB:.0f}"
        return (
            f"layout {chosen.shape}{replicas} for {counted(self.num_gpus, 'GPU')}: {self._why(chosen)}; a step has "
            f"{counted(self.work.rows, 'row')} and {counted(shape.num_heads, 'attention head')}, and a GPU holds about "
            f"{held} of {self.gpu_bytes / GIB:.0f} GiB"
        )

    def _why(self, chosen: LayoutPlan) -> str:
        assert chosen.cost is not None and chosen.speedup is not None, "it was reckoned"
        if chosen.problem is not None:
            return f"the best of those that were left, although {chosen.problem}"
        best = self._rank_in_words(chosen) + (" with the degrees asked for" if self.fixed else "")
        if chosen.speedup >= _NO_FASTER:
            return f"{best}, about {chosen.speedup:.1f} times as fast as one GPU"
        waits = "launching its kernels takes as long" if chosen.cost.is_host_bound else "exchanges take as long"
        return f"{best}, but about as fast as one GPU, since {waits}"

    def _rank_in_words(self, chosen: LayoutPlan) -> str:
        """How it compares with those that it was chosen from."""
        others = [
            plan
            for plan in self.layouts
            if plan.dp == chosen.dp and plan.problem is None and plan.has_degrees(self.fixed)
        ]
        with_as_much_tp = [plan for plan in others if plan.shape.tp <= chosen.shape.tp]
        speedup = chosen.speedup or 0.0
        if all(speedup >= (plan.speedup or 0.0) for plan in others):
            return "the fastest that fits" if chosen.shape.tp > 1 else "the fastest"
        if all(speedup >= (plan.speedup or 0.0) for plan in with_as_much_tp):
            whole = "keeps the weights whole" if chosen.shape.tp == 1 else "divides the weights no further than needed"
            return f"the fastest that {whole}"
        return "as fast as any, as far as can be reckoned"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """`fixed` are the degrees that were asked for, by axis; `element_bytes` those of the precision; `encoder_parallel`
    is that of the server's options."""

    num_gpus: int
    hardware: Hardware
    gpu_bytes: float
    dp: int = 1
    fixed: Mapping[str, int] = field(default_factory=dict)
    element_bytes: int = HALF_PRECISION_BYTES
    quantized: bool = False
    encoder_parallel: str = "auto"


def plan_layouts(outline: ModelOutline, work: StepWork, options: PlanOptions) -> ParallelPlan:
    """All layouts of `num_gpus`, and the choice among those with the fixed degrees."""
    alone = step_cost(outline.shape, work, ReplicaShape(), options.hardware)
    layouts = [
        _planned(outline, work, options, alone, dp, shape)
        for dp in range(1, options.num_gpus + 1)
        if options.num_gpus % dp == 0
        for shape in ReplicaShape.every(options.num_gpus // dp)
    ]
    layouts.sort(key=_order)
    candidates = [
        plan for plan in layouts if plan.dp == options.dp and plan.cost is not None and plan.has_degrees(options.fixed)
    ]
    return ParallelPlan(
        num_gpus=options.num_gpus,
        outline=outline,
        work=work,
        hardware=options.hardware,
        gpu_bytes=options.gpu_bytes,
        fixed=options.fixed,
        alone=alone,
        layouts=tuple(layouts),
        chosen=_best(candidates),
    )


def _planned(
    outline: ModelOutline, work: StepWork, options: PlanOptions, alone: StepCost, dp: int, shape: ReplicaShape
) -> LayoutPlan:
    try:
        shape.check_heads(outline.shape.num_heads)
    except InvalidValue:
        divided = ReplicaShape(ulysses=shape.ulysses, tp=shape.tp)
        heads = counted(outline.shape.num_heads, "attention head")
        return LayoutPlan(dp=dp, shape=shape, problem=f"{heads} do not divide by {divided}")
    weights = outline.weights(element_bytes=options.element_bytes, quantized=options.quantized)
    memory = MemoryNeed(
        transformer=weights.transformer_on_each(shape),
        text_encoders=outline.encoder_bytes(shape, element_bytes=options.element_bytes, wish=options.encoder_parallel),
        autoencoder=weights.autoencoder,
        activations=activation_bytes(outline.shape, work, shape, element_bytes=options.element_bytes),
    )
    cost = step_cost(outline.shape, work, shape, options.hardware)
    problem: str | None = None
    if memory.total > options.gpu_bytes:
        problem = f"{memory.total / GIB:.1f} GiB do not fit into {options.gpu_bytes / GIB:g}"
    elif shape.cfg > work.rows:
        problem = f"a step has {counted(work.rows, 'row')}, so cfg {shape.cfg} computes the same more than once"
    return LayoutPlan(
        dp=dp,
        shape=shape,
        speedup=alone.seconds / cost.seconds,
        cost=cost,
        memory=memory,
        fits=memory.total <= options.gpu_bytes,
        problem=problem,
    )


def _order(plan: LayoutPlan) -> tuple[object, ...]:
    return plan.dp, plan.cost is None, plan.problem is not None, -(plan.speedup or 0.0), plan.shape.sizes


def _best(candidates: list[LayoutPlan]) -> LayoutPlan | None:
    """The fastest with the least tensor parallelism: it is for models that do not fit otherwise. Where nothing fits,
    the one that needs least memory."""
    fitting = [plan for plan in candidates if plan.fits]
    good = [plan for plan in fitting if plan.problem is None] or fitting
    if not good:
        return min(candidates, key=lambda plan: (_memory(plan), -(plan.speedup or 0.0)), default=None)
    least = min(plan.shape.tp for plan in good)
    good = [plan for plan in good if plan.shape.tp == least]
    fastest = max(plan.speedup or 0.0 for plan in good)
    close = [plan for plan in good if (plan.speedup or 0.0) * _CLOSE >= fastest]
    # Guidance before Ulysses before the ring: the first are cheaper to deal, whatever the links are.
    return max(close, key=lambda plan: (plan.shape.cfg, plan.shape.ulysses))


def _memory(plan: LayoutPlan) -> float:
    assert plan.memory is not None, "a candidate was reckoned"
    return plan.memory.total


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
