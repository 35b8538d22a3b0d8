"""Parallel degrees that were left unset: chosen by the cost model where the model is known, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sglang.multimodal_gen.configs.cost_model import H100, HALF_PRECISION_BYTES, HARDWARE, Hardware
from sglang.multimodal_gen.configs.model_outline import ModelOutline, outline_of
from sglang.multimodal_gen.configs.parallel_plan import GIB, PlanOptions, plan_layouts
from sglang.multimodal_gen.configs.replica_shape import DEGREES, ReplicaShape
from sglang.multimodal_gen.configs.visible_gpus import gpus_of_this_machine
from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue, ModelError
from sglang.multimodal_gen.registry import get_model_info

DEFAULT_GPU_BYTES = 80 * GIB
_ELEMENT_BYTES = {"fp32": 4}
_TAKES_THE_REST = "ulysses_degree"


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model is to be spread, as the options of the server say it."""

    path: str
    id: str | None
    backend: str
    precision: str
    encoder_parallel: str = "auto"
    quantized: bool = False


@dataclass(frozen=True, kw_only=True)
class DegreeChoice:
    """Degrees by option, those that were given left out, and why, in a sentence or nothing; `doubt` where it may not
    work out."""

    degrees: Mapping[str, int]
    reason: str
    doubt: bool = False


def choose_degrees(model: ModelChoice, num_gpus: int, given: Mapping[str, int]) -> DegreeChoice:
    """What is left unset of the degrees in `DEGREES`; `given`, which divides num_gpus, may hold `dp_size` too.

    Raises: InvalidValue where no layout has the given degrees, or diffusers runs the model.
    """
    dp = given.get("dp_size", 1)
    try:
        resolved = get_model_info(model.path, model_id=model.id, backend=model.backend)
        outline = None if resolved.is_fallback else outline_of(resolved)
    except (ModelError, InvalidRequest) as error:
        return _as_ulysses(num_gpus, given, error.message)
    if outline is None:
        if num_gpus > dp:
            raise InvalidValue("num_gpus", num_gpus, f"{dp} for a pipeline that diffusers runs")
        return DegreeChoice(degrees={}, reason="")
    fixed = {axis: given[option] for option, axis in DEGREES.items() if option in given}
    machine = this_machine()
    plan = plan_layouts(
        outline,
        outline.work(),
        PlanOptions(
            num_gpus=num_gpus,
            hardware=machine.hardware,
            gpu_bytes=machine.gpu_bytes,
            dp=dp,
            fixed=fixed,
            element_bytes=element_bytes(model.precision),
            encoder_parallel=model.encoder_parallel,
            quantized=model.quantized,
        ),
    )
    if plan.chosen is None:
        raise _impossible(outline, num_gpus // dp, given)
    chosen = {option: getattr(plan.chosen.shape, axis) for option, axis in DEGREES.items() if option not in given}
    doubt = plan.chosen.problem is not None
    assumed = "" if machine.has_gpus else ", which are assumed: no GPU was found"
    return DegreeChoice(degrees=chosen, reason=plan.reason + assumed if chosen or doubt else "", doubt=doubt)


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """What the GPUs of a machine do, as the nearest that was measured, and the memory of the smallest."""

    hardware: Hardware
    gpu_bytes: float
    has_gpus: bool


def this_machine() -> MachineFacts:
    """This one; without GPUs the first that was measured is assumed."""
    found = gpus_of_this_machine()
    if not found:
        return MachineFacts(hardware=H100, gpu_bytes=DEFAULT_GPU_BYTES, has_gpus=False)
    named = (hardware for name, hardware in HARDWARE.items() if name in found[0].name.lower())
    return MachineFacts(hardware=next(named, H100), gpu_bytes=min(gpu.memory_bytes for gpu in found), has_gpus=True)


def element_bytes(precision: str) -> int:
    """Of a weight; `auto` is taken for that of GPUs."""
    return _ELEMENT_BYTES.get(precision, HALF_PRECISION_BYTES)


def _as_ulysses(num_gpus: int, given: Mapping[str, int], why: str) -> DegreeChoice:
    """Ulysses takes the GPUs that are left: any model with enough heads can do that."""
    left = num_gpus // math.prod(given.values())
    if left == 1 or _TAKES_THE_REST in given:
        return DegreeChoice(degrees={}, reason="")
    reason = (
        f"Ulysses takes the {left} GPUs that are left, since nothing better can be said before the model loads: {why}"
    )
    return DegreeChoice(degrees={_TAKES_THE_REST: left}, reason=reason)


def _impossible(outline: ModelOutline, num_ranks: int, given: Mapping[str, int]) -> InvalidValue:
    """Which degree is to blame, and what it might be."""
    heads = outline.shape.num_heads
    shape = ReplicaShape(**{axis: given[option] for option, axis in DEGREES.items() if option in given})
    try:
        shape.check_heads(heads)
    except InvalidValue as error:
        return error
    left = num_ranks // shape.num_ranks
    names = " and ".join(option for option in DEGREES if option not in given)
    return InvalidValue(
        "num_gpus",
        num_ranks,
        f"a number whose part for {names}, here {num_ranks} / {shape.num_ranks} = {left}, divides the transformer's "
        f"{heads} attention heads; left unset, cfg_parallel_size and ring_degree take any number",
    )
