"""Samplers: which exist, and how a checkpoint or a user chooses one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue
from sglang.multimodal_gen.runtime.models.schedulers.base import Sampler, SamplerState, Schedule
from sglang.multimodal_gen.runtime.models.schedulers.dpmpp import DPMSolverSampler
from sglang.multimodal_gen.runtime.models.schedulers.flow_match_euler import FlowMatchEulerSampler
from sglang.multimodal_gen.runtime.models.schedulers.unipc import UniPCSampler

__all__ = [
    "CLASSES",
    "NAMES",
    "DPMSolverSampler",
    "FlowMatchEulerSampler",
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
}
"""By the `_class_name` of a checkpoint's `scheduler_config.json`."""

NAMES: Mapping[str, str] = {sampler.short_name: class_name for class_name, sampler in CLASSES.items()}
"""Short name, as users write it, to `_class_name`."""

_SHIFT_FIELD = {
    "FlowMatchEulerDiscreteScheduler": "shift",
    "UniPCMultistepScheduler": "flow_shift",
    "DPMSolverMultistepScheduler": "flow_shift",
}
_CARRIED_OPTIONS = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")


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

    Its own sampler keeps all options; another one takes over what describes the model (training steps and shift) and
    otherwise has its defaults.

    Raises: InvalidRequest for an unknown name, a checkpoint that is no flow-matching model, or a kind of shift that
    the chosen sampler cannot do.
    """
    if name not in NAMES:
        raise InvalidValue("scheduler", name, f"one of {', '.join(NAMES)}")
    own = build_sampler(checkpoint_config)
    own_class, class_name = _class_name(checkpoint_config), NAMES[name]
    if own_class == class_name:
        return own
    derived = {key: checkpoint_config[key] for key in _CARRIED_OPTIONS if checkpoint_config.get(key) is not None}
    if "shift_terminal" in derived and class_name == "DPMSolverMultistepScheduler":
        raise InvalidRequest(
            f"scheduler: {name} cannot stretch its schedule to the model's shift_terminal; use euler or unipc",
            param="scheduler",
        )
    derived[_SHIFT_FIELD[class_name]] = checkpoint_config.get(_SHIFT_FIELD[own_class], 1.0)
    if class_name != "FlowMatchEulerDiscreteScheduler":
        derived.update(prediction_type="flow_prediction", use_flow_sigmas=True)
    return CLASSES[class_name].from_config(derived)
