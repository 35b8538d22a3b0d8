"""Which adapters one request has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang.multimodal_gen.configs.declare import arg

MAX_SCALE = 100.0
MAX_LORAS = 16
_NAME = re.compile(r"[\w.-]{1,128}")
_FIELDS = ("name", "scale")


class LoraUse(NamedTuple):
    """An adapter by its nickname, and how much it counts."""

    name: str
    scale: float = 1.0

    def as_field(self) -> dict[str, Any]:
        """As a request says it in JSON."""
        return {"name": self.name, "scale": self.scale}


def name_problem(name: Any) -> str | None:
    """What would be accepted instead of `name` as an adapter's nickname."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return None
    return "a name of up to 128 letters, digits, '.', '_' and '-'"


def scale_problem(scale: Any) -> str | None:
    """What would be accepted instead of `scale`."""
    if type(scale) in (int, float) and math.isfinite(scale) and abs(scale) <= MAX_SCALE:
        return None
    return f"a scale that is a number from {-MAX_SCALE:g} to {MAX_SCALE:g}"


def _problem(value: Any) -> str | None:
    """Of one item."""
    if isinstance(value, str):
        name, colon, scale = value.partition(":")
        if problem := name_problem(name):
            return f"NAME or NAME:SCALE with {problem}"
        return scale_problem(_number(scale)) if colon else None
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in _FIELDS]:
            return f"an object with name and scale, without {unknown[0]}"
        return name_problem(value.get("name")) or scale_problem(value.get("scale", 1.0))
    return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def uses_of(items: Iterable[Any]) -> tuple[LoraUse, ...]:
    """Of checked items."""
    uses = []
    for item in items:
        if isinstance(item, Mapping):
            uses.append(LoraUse(item["name"], float(item.get("scale", 1.0))))
        else:
            name, colon, scale = str(item).partition(":")
            uses.append(LoraUse(name, float(scale) if colon else 1.0))
    return tuple(uses)


@dataclass(frozen=True, kw_only=True)
class LoraParams:
    """Adapters of the request, by the nicknames with which the engine loaded them."""

    lora: tuple[str | Mapping[str, Any], ...] | None = arg(
        None,
        help="LoRA adapters, each NAME, NAME:SCALE or an object of `name` and `scale`; an empty list means none. "
        "Requests with different adapters share a batch.",
        group="lora",
        unset="those set for the engine",
        check=_problem,
        may_be_empty=True,
        max_items=MAX_LORAS,
        metavar="NAME:SCALE",
        recorded=True,
    )

    @property
    def lora_uses(self) -> tuple[LoraUse, ...]:
        """The adapters that the request has; empty for none."""
        return uses_of(self.lora or ())
