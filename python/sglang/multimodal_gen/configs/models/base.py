"""What every model configuration shares: a frozen dataclass read from a checkpoint's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from sglang.multimodal_gen.configs.models.foreign_names import ForeignName
from sglang.multimodal_gen.configs.quantization_args import CONFIG_KEY
from sglang.multimodal_gen.configs.transformer_shape import TransformerShape
from sglang.multimodal_gen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of the architecture configs. Field names and defaults are those of the published `config.json`."""

    unused_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that published files carry although no module reads them."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a parsed `config.json`; keys that start with `_`, and that about quantisation, are about the files.

        Raises:
            InvalidRequest: a key that the architecture does not have, or a value of the wrong type.
        """
        types = get_type_hints(cls)
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key.startswith("_") or key == CONFIG_KEY or key in cls.unused_keys:
                continue
            if key not in names:
                raise InvalidRequest(f"{cls.__name__} has no field {key!r}; it has {', '.join(names)}", param=key)
            values[key] = _as_tuples(value)
            if not _matches(values[key], types[key]):
                raise InvalidRequest(
                    f"{cls.__name__}.{key} is {value!r}, but must be {_describe(types[key])}", param=key
                )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """Base of the configs of diffusion transformers."""

    @property
    def foreign_names(self) -> tuple[ForeignName, ...]:
        """What other programs' files call its layers; of rules for the same layer the first holds."""
        return ()

    @property
    def shape(self) -> TransformerShape:
        """What layouts over several GPUs are chosen by."""
        raise NotImplementedError


def _as_tuples(value: Any) -> Any:
    """JSON arrays become tuples, at every depth, so that configs stay hashable."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _matches(value: Any, wanted: Any) -> bool:
    """Whether a JSON value fits a field type. Whole numbers fit `float`; booleans fit only `bool`."""
    if isinstance(wanted, UnionType):
        return any(_matches(value, choice) for choice in get_args(wanted))
    if get_origin(wanted) is tuple:
        items = get_args(wanted)
        if not isinstance(value, tuple):
            return False
        if items[-1] is Ellipsis:
            return all(_matches(item, items[0]) for item in value)
        return len(value) == len(items) and all(_matches(*pair) for pair in zip(value, items, strict=True))
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, int | float) if wanted is float else isinstance(value, wanted)


def _describe(wanted: Any) -> str:
    """`tuple[int, ...] | None` -> `a list of int or null`."""
    if isinstance(wanted, UnionType):
        return " or ".join(_describe(choice) for choice in get_args(wanted))
    if get_origin(wanted) is tuple:
        items = get_args(wanted)
        length = "" if items[-1] is Ellipsis else f"{len(items)} "
        return f"a list of {length}{_describe(items[0])}"
    return "null" if wanted is NoneType else str(wanted.__name__)
