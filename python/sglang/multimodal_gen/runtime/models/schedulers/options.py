"""Reading `scheduler_config.json`: each option is honoured, known to have no effect here, or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from sglang.multimodal_gen.errors import InvalidRequest, InvalidType, InvalidValue, UnknownParameter

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True, kw_only=True)
class OptionRules:
    """What one sampler class makes of the options that are not fields of its options dataclass."""

    required: Mapping[str, object]
    """Options that must be present with exactly this value, because their published default means another process."""
    fixed: Mapping[str, object]
    """Options that may only have this value, the one implemented; it is also the published default."""
    inert: Collection[str]
    """Options that do not change a flow-matching trajectory: they belong to other processes or to the pipeline."""


def read_options(config: Mapping[str, Any], *, options: type[OptionsT], rules: OptionRules, sampler: str) -> OptionsT:
    """`config` as an instance of the dataclass `options`; keys that start with an underscore are metadata.

    Raises: InvalidRequest naming the sampler, the option, its value and what is accepted.
    """
    known = {option.name: option for option in fields(options)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, value in config.items():
        if name.startswith("_") or name in rules.inert:
            continue
        if name in known:
            given[name] = _with_type_of(known[name].default, name, value, sampler=sampler)
        elif name in rules.fixed or name in rules.required:
            expected = rules.fixed[name] if name in rules.fixed else rules.required[name]
            if value != expected:
                raise InvalidValue(f"{sampler}.{name}", value, f"{expected!r}; other values are not implemented")
        else:
            accepted = ", ".join(sorted([*known, *rules.fixed, *rules.required]))
            raise UnknownParameter(f"{name}={value!r}", what=f"{sampler} option", hint=f"; implemented are {accepted}")
    for name, expected in rules.required.items():
        if name not in config:
            raise InvalidRequest(
                f"{sampler}.{name}: missing, accepted is {expected!r}; only flow-matching checkpoints can be sampled",
                param=f"{sampler}.{name}",
            )
    return options(**given)


def _with_type_of(default: object, name: str, value: Any, *, sampler: str) -> Any:
    """`value` if JSON could have stored the option so; the default stands for the type, None for 'number or null'."""
    assert default is not MISSING, f"{sampler}.{name} needs a default"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            return tuple(value)
        raise InvalidType(f"{sampler}.{name}", value, "a list of integers")
    if default is None:
        if value is None or is_number:
            return value
        raise InvalidType(f"{sampler}.{name}", value, "a number or null")
    if isinstance(default, float):
        if is_number:
            return float(value)
        raise InvalidType(f"{sampler}.{name}", value, "a number")
    if type(value) is not type(default):
        raise InvalidType(f"{sampler}.{name}", value, f"a value of type {type(default).__name__}")
    return value


def check_choice(sampler: str, name: str, value: object, choices: Collection[object]) -> None:
    """Raises InvalidValue when `value` is none of `choices`."""
    if value not in choices:
        raise InvalidValue(f"{sampler}.{name}", value, f"one of {', '.join(map(repr, choices))}")
