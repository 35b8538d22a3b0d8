"""Where the weights of a model are on a GPU of a given size, and what that costs: arithmetic on its configs.

A block that is not on the GPU has to get there in every forward. While one computes the next are on their way, so a
step takes as long as its arithmetic or as its transfers, whichever is longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from sglang.multimodal_gen.configs.cost_model import (
    CODING_BYTES,
    CONTEXT_BYTES,
    HALF_PRECISION_BYTES,
    Hardware,
    StepWork,
    activation_bytes,
    step_cost,
)
from sglang.multimodal_gen.configs.memory_args import MemoryArgs, Residency, share_of
from sglang.multimodal_gen.configs.model_outline import ModelOutline
from sglang.multimodal_gen.configs.quantization_args import QUANTIZED_BYTES
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue

GIB = 2**30
DEFAULT_PREFETCH = 2
# Below that, moving an encoder to the host gains less than a denoising step needs anyway.
_WORTH_MOVING = GIB
TRANSFORMERS = ("transformer", "transformer_2")
_AUTOENCODER = "vae"


@dataclass(frozen=True, kw_only=True)
class ComponentNeed:
    """Bytes of a component's weights on one GPU: all, and those of each of its blocks."""

    name: str
    num_bytes: float
    blocks: tuple[float, ...] = ()

    @property
    def outside(self) -> float:
        """What stays on the GPU when the blocks come one after the other."""
        return max(0.0, self.num_bytes - sum(self.blocks))

    @property
    def is_transformer(self) -> bool:
        """Whether it runs in every step."""
        return self.name in TRANSFORMERS


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where each component is, and what follows. `kept_bytes` are those of streamed transformers' blocks that stay."""

    gpu_bytes: float
    components: tuple[ComponentNeed, ...]
    modes: Mapping[str, Residency]
    num_slots: int
    activations: float
    kept_bytes: float
    step_seconds: float
    streamed_bytes: float
    compute_seconds: float
    host_bytes: float
    least_bytes: float
    peak_bytes: float

    @property
    def offloads(self) -> bool:
        """Whether anything is on the host."""
        return any(mode != "resident" for mode in self.modes.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU is large enough."""
        return self.peak_bytes <= self.gpu_bytes

    @property
    def slowdown(self) -> float:
        """A step's time in that of one with all weights on the GPU."""
        return self.step_seconds / self.compute_seconds if self.compute_seconds else 1.0

    @property
    def kept_share(self) -> float:
        """Of the bytes of streamed transformers' blocks, those that stay."""
        streamed = [need for need in self.components if self.modes[need.name] == "layerwise-offload"]
        in_blocks = sum(sum(need.blocks) for need in streamed if need.is_transformer)
        return self.kept_bytes / in_blocks if in_blocks else 0.0

    @property
    def reason(self) -> str:
        """What was chosen, in a sentence for the start-up log."""
        moved = [f"{name} {mode}" for name, mode in self.modes.items() if mode != "resident"]
        if not moved:
            return f"all weights stay on the device: {self.peak_bytes / GIB:.1f} of {self.gpu_bytes / GIB:.1f} GiB"
        return (
            f"{', '.join(moved)}: {self.peak_bytes / GIB:.1f} of {self.gpu_bytes / GIB:.1f} GiB of the device and "
            f"{self.host_bytes / GIB:.1f} GiB of the host; a step is expected to take {self.slowdown:.2f} times as "
            "long as with all weights on the device"
        )


@dataclass(frozen=True, kw_only=True)
class MemoryWish:
    """What a plan is made for."""

    gpu_bytes: float
    hardware: Hardware
    args: MemoryArgs = field(default_factory=MemoryArgs)
    shape: ReplicaShape = field(default_factory=ReplicaShape)
    element_bytes: int = HALF_PRECISION_BYTES
    encoder_parallel: str = "auto"
    quantized: bool = False
    size: str = "its default size"
    """What requests it is made for, in words."""


def size_of(params: SamplingParams | None, outline: ModelOutline) -> str:
    """What requests of this size are, in words."""
    if params is None or (params.width, params.height, params.num_frames) == (None, None, None):
        return MemoryWish.size
    complete = params.filled_from(outline.defaults)
    frames = f", {complete.num_frames} frames" if (complete.num_frames or 1) > 1 else ""
    return f"{complete.width}x{complete.height}{frames}"


def component_needs(outline: ModelOutline, wish: MemoryWish) -> tuple[ComponentNeed, ...]:
    """Of each component of the model on one GPU of the layout."""
    shape, found = outline.shape, []
    for name in outline.parameters:
        width = outline.element_bytes(name, wish.element_bytes)
        if name in TRANSFORMERS:
            matrix_width = QUANTIZED_BYTES if wish.quantized or outline.is_quantized else width
            blocks = [
                run.shared_weights / wish.shape.tp * matrix_width + (run.sample_weights + run.other_parameters) * width
                for run in shape.runs
                for _ in range(run.count)
            ]
            # The file's own count is the truth where it differs from the shape's.
            scale = outline.parameters[name] / shape.num_parameters
            whole = sum(blocks) + shape.outside_parameters * width
            found.append(
                ComponentNeed(name=name, num_bytes=scale * whole, blocks=tuple(scale * block for block in blocks))
            )
        elif name == _AUTOENCODER:
            found.append(ComponentNeed(name=name, num_bytes=outline.parameters[name] * width))
    for encoder in outline.encoders:
        width = outline.element_bytes(encoder.name, wish.element_bytes)
        held = width * encoder.parameters_on_each(wish.shape, element_bytes=width, wish=wish.encoder_parallel)
        in_blocks = min(held, width * (encoder.heads + encoder.features) * held / (width * encoder.parameters))
        layers = (in_blocks / encoder.num_layers,) * encoder.num_layers if encoder.num_layers else ()
        found.append(ComponentNeed(name=encoder.name, num_bytes=held, blocks=layers))
    return tuple(sorted(found, key=lambda need: (not need.is_transformer, need.name)))


def plan_memory(outline: ModelOutline, work: StepWork, wish: MemoryWish) -> MemoryPlan:
    """The first that fits of: everything on the GPU, text encoders on the host, the autoencoder too, the transformers'
    blocks too; where none does, the last.

    Raises: InvalidValue for a limit below the least that would do, or a component that there is not.
    """
    needs = component_needs(outline, wish)
    asked = wish.args.asked([need.name for need in needs])
    tries = [
        _evaluated(outline, work, wish, needs, modes, prefetch=prefetch)
        for modes in _candidates(needs, asked, wish.args)
        for prefetch in (DEFAULT_PREFETCH, 1)
    ]
    chosen = next((plan for plan in tries if plan.fits), tries[-1])
    if wish.args.gpu_memory_limit is not None and chosen.least_bytes > wish.gpu_bytes:
        least = math.ceil(chosen.least_bytes / GIB * 10) / 10
        raise InvalidValue(
            "gpu_memory_limit",
            wish.args.gpu_memory_limit,
            f"at least {least:g} GiB, the least that {outline.name} needs at {wish.size} with these options",
        )
    return chosen


def _candidates(
    needs: Sequence[ComponentNeed], asked: Mapping[str, Residency], args: MemoryArgs
) -> list[dict[str, Residency]]:
    """Modes by component, from the fastest to the smallest."""
    modes: dict[str, Residency] = {need.name: asked.get(need.name, "resident") for need in needs}
    found = [dict(modes)]
    if args.performance_mode in ("speed", "manual"):
        return found
    encoders = [need for need in needs if not need.is_transformer and need.name != _AUTOENCODER]
    least = 0.0 if args.performance_mode == "memory" else _WORTH_MOVING
    steps: tuple[tuple[list[ComponentNeed], Residency], ...] = (
        ([need for need in encoders if need.num_bytes > least], "layerwise-offload"),
        ([need for need in needs if need.name == _AUTOENCODER], "component-offload"),
        ([need for need in needs if need.is_transformer], "layerwise-offload"),
    )
    for moved, residency in steps:
        for need in moved:
            if need.name not in asked:
                modes[need.name] = residency if need.blocks else "component-offload"
        found.append(dict(modes))
    return found[-1:] if args.performance_mode == "memory" else found


def _evaluated(
    outline: ModelOutline,
    work: StepWork,
    wish: MemoryWish,
    needs: Sequence[ComponentNeed],
    modes: Mapping[str, Residency],
    *,
    prefetch: int,
) -> MemoryPlan:
    streamed = [need for need in needs if modes[need.name] == "layerwise-offload"]
    blocks = [block for need in streamed for block in need.blocks]
    num_slots = 0
    if blocks:
        num_slots = _num_slots(wish.args, max(len(need.blocks) for need in streamed), prefetch=prefetch)
    moved = [need for need in needs if modes[need.name] == "component-offload"]
    always = sum(need.num_bytes for need in needs if modes[need.name] == "resident")
    always += sum(need.outside for need in streamed if need.is_transformer) + num_slots * max(blocks, default=0.0)
    always += max((need.num_bytes for need in moved if need.is_transformer), default=0.0)
    # Beside an encoder that comes for its turn no step is computed.
    turns = [need.num_bytes for need in moved if not need.is_transformer]
    turns += [need.outside for need in streamed if not need.is_transformer]
    coding = CODING_BYTES + max(turns, default=0.0)
    together, apart = (
        activation_bytes(outline.shape, rows, wish.shape, element_bytes=wish.element_bytes)
        for rows in (work, replace(work, rows=1))
    )
    # A forward of one row at a time takes less memory, and every block comes once for each.
    fits = always + together + CONTEXT_BYTES <= wish.gpu_bytes
    activations, num_forwards = (together, 1) if fits else (apart, work.rows)
    spare = wish.gpu_bytes - CONTEXT_BYTES - max(activations, coding) - always
    in_transformers = sum(sum(need.blocks) for need in streamed if need.is_transformer)
    kept = _kept_bytes(wish.args, in_transformers, spare=spare, streamed=streamed)
    compute = step_cost(outline.shape, work, wish.shape, wish.hardware).seconds
    # Of several transformers a step runs one.
    num_transformers = max(1, sum(need.is_transformer for need in streamed))
    sent = num_forwards * (in_transformers - kept) / num_transformers
    return MemoryPlan(
        gpu_bytes=wish.gpu_bytes,
        components=tuple(needs),
        modes=MappingProxyType(dict(modes)),
        num_slots=num_slots,
        activations=activations,
        kept_bytes=kept,
        step_seconds=max(compute, sent / wish.hardware.host_bandwidth),
        streamed_bytes=sent,
        compute_seconds=compute,
        host_bytes=sum(need.num_bytes for need in moved) + sum(blocks) - kept,
        least_bytes=always + max(apart, coding) + CONTEXT_BYTES,
        peak_bytes=always + kept + max(activations, coding) + CONTEXT_BYTES,
    )


def _num_slots(args: MemoryArgs, num_blocks: int, *, prefetch: int) -> int:
    """Blocks on the device at a time: the one that computes and those on their way."""
    asked = args.dit_offload_prefetch_size
    return 1 + (max(1, share_of(asked, num_blocks)) if asked else prefetch)


def _kept_bytes(args: MemoryArgs, in_transformers: float, *, spare: float, streamed: Sequence[ComponentNeed]) -> float:
    """Of the transformers' blocks, what stays on the GPU."""
    asked = args.dit_layerwise_resident_layers
    if asked is None:
        return 0.0 if args.performance_mode == "memory" else min(in_transformers, max(0.0, spare))
    kept = 0.0
    for need in streamed:
        if need.is_transformer and need.blocks:
            kept += sum(need.blocks) * share_of(asked, len(need.blocks)) / len(need.blocks)
    return kept


def spread(sizes: Sequence[float], budget: float, *, policy: str = "strided") -> list[int]:
    """Which blocks of these sizes stay on the GPU, within a budget: the first ones, or evenly spread over all."""
    if policy == "leading":
        kept, used = [], 0.0
        for index, size in enumerate(sizes):
            if used + size > budget:
                break
            kept.append(index)
            used += size
        return kept
    total = sum(sizes)
    share = min(1.0, budget / total) if total else 0.0
    kept, owed, used = [], 0.0, 0.0
    for index, size in enumerate(sizes):
        owed += share * size
        if owed - used >= size * (1 - 1e-9) and used + size <= budget:
            kept.append(index)
            used += size
    return kept
