"""Samplers: which exist, and how a checkpoint or a user chooses one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue
from sglang.multimodal_gen.runtime.models.schedulers.base import Sampler, SamplerState, Schedule
from sglang.multimodal_gen.runtime.models.schedulers.dpmpp import ODE, SDE, DPMSolverSampler
from sglang.multimodal_gen.runtime.models.schedulers.flow_match_euler import FlowMatchEulerSampler, FlowMatchLCMSampler
from sglang.multimodal_gen.runtime.models.schedulers.flow_unipc import FlowUniPCSampler
from sglang.multimodal_gen.runtime.models.schedulers.spacing import options_of
from sglang.multimodal_gen.runtime.models.schedulers.unipc import UniPCSampler

__all__ = [
    "CLASSES",
    "NAMES",
    "DPMSolverSampler",
    "FlowMatchEulerSampler",
    "FlowMatchLCMSampler",
    "FlowUniPCSampler",
    "NamedSampler",
    "Sampler",
    "SamplerState",
    "Schedule",
    "UniPCSampler",
    "build_sampler",
    "sampler_with_name",
]

CLASSES: Mapping[str, type[Sampler]] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerSampler,
    "UniPCMultistepScheduler": UniPCSampler,
    "DPMSolverMultistepScheduler": DPMSolverSampler,
    "FlowMatchLCMScheduler": FlowMatchLCMSampler,
    "FlowUniPCMultistepScheduler": FlowUniPCSampler,
}
"""By the `_class_name` of a checkpoint's `scheduler_config.json`."""


@dataclass(frozen=True)
class NamedSampler:
    """What a short name stands for: a class, and the options that the name says."""

    class_name: str
    options: Mapping[str, object] = field(default_factory=dict)


NAMES: Mapping[str, NamedSampler] = {
    "euler": NamedSampler("FlowMatchEulerDiscreteScheduler"),
    "euler_karras": NamedSampler("FlowMatchEulerDiscreteScheduler", options_of("karras")),
    "euler_exponential": NamedSampler("FlowMatchEulerDiscreteScheduler", options_of("exponential")),
    "euler_beta": NamedSampler("FlowMatchEulerDiscreteScheduler", options_of("beta")),
    "unipc": NamedSampler("UniPCMultistepScheduler"),
    "flow_unipc": NamedSampler("FlowUniPCMultistepScheduler"),
    "dpmpp_2m": NamedSampler("DPMSolverMultistepScheduler", {"algorithm_type": ODE, "solver_order": 2}),
    "dpmpp_2m_sde": NamedSampler("DPMSolverMultistepScheduler", {"algorithm_type": SDE, "solver_order": 2}),
    "lcm": NamedSampler("FlowMatchLCMScheduler"),
}
"""By the name that users write; `configs.schedulers` has the same names for processes without torch."""

_CARRIED_OPTIONS = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "invert_sigmas")


def build_sampler(config: Mapping[str, Any]) -> Sampler:
    """The sampler that a checkpoint's `scheduler_config.json` asks for.

    Raises: InvalidRequest naming an unknown class, an unknown option or a value that is not implemented.
    """
    return CLASSES[_class_name(config)].from_config(config)


def _class_name(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    if name not in CLASSES:
        raise InvalidValue("scheduler._class_name", name, f"one of {', '.join(CLASSES)}")
    return str(name)


def sampler_with_name(name: str, checkpoint_config: Mapping[str, Any]) -> Sampler:
    """The sampler `name` for a checkpoint whose config may name another one.

    The checkpoint's own class keeps the options that the name does not say; another one takes over what describes the
    model (training steps, shift, direction) and otherwise has its defaults.

    Raises: InvalidRequest for an unknown name, a checkpoint that is no flow-matching model, or a kind of shift that
    the chosen sampler cannot do.
    """
    if name not in NAMES:
        raise InvalidValue("scheduler", name, f"one of {', '.join(NAMES)}")
    build_sampler(checkpoint_config)
    named, own_class = NAMES[name], _class_name(checkpoint_config)
    if named.class_name == own_class:
        config: dict[str, Any] = dict(checkpoint_config)
    else:
        config = _described_model(checkpoint_config, CLASSES[own_class], CLASSES[named.class_name])
    try:
        return CLASSES[named.class_name].from_config({**config, **named.options})
    except InvalidRequest as error:
        raise InvalidRequest(
            f"scheduler: {name} cannot sample this model: {error.message}", param="scheduler"
        ) from None


def _described_model(config: Mapping[str, Any], own: type[Sampler], other: type[Sampler]) -> dict[str, Any]:
    """What the config of one class says of the model, as a config of another class."""
    carried = {option: config[option] for option in _CARRIED_OPTIONS if config.get(option)}
    return {**carried, other.shift_option: config.get(own.shift_option, 1.0), **other.rules.required}
