"""`sglang models`: which models run natively, and what one of them does by default and at most."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen.configs.declare import CLI_ONLY, arg, hint, parameters
from sglang.multimodal_gen.configs.model_cards import ModelCard, cards, find_card
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue, UsageError
from sglang.multimodal_gen.runtime.entrypoints.cli.options import OptionParser

_UNKNOWN = "?"
_HEADER = ("id", "family", "tasks", "transformer", "weights", "GPU", "licence")


@dataclass(frozen=True, kw_only=True)
class ModelsCommandArgs:
    """How the list is printed."""

    json: bool = arg(False, help="Print JSON instead of a table.", group="output", exposed=CLI_ONLY)


@dataclass(frozen=True, kw_only=True)
class ListJob:
    """All models."""

    as_json: bool

    def run(self) -> int:
        """Print them."""
        if self.as_json:
            return _print_json([card.as_dict() for card in cards()])
        rows = [_HEADER, *(_row(card) for card in cards())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        for row in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            sys.stdout.write(line.rstrip() + "\n")
        sys.stdout.write(
            "\nweights: in bf16, all components. GPU: the least memory that holds them and one request of the default "
            "size.\nAny other diffusers pipeline runs through diffusers itself.\n"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class ShowJob:
    """One model."""

    card: ModelCard
    as_json: bool

    def run(self) -> int:
        """Print what it is, its defaults and its limits."""
        found = self.card.as_dict() | {"defaults": _defaults(self.card), "limits": _limits(self.card)}
        if self.as_json:
            return _print_json(found)
        facts = {
            name: value
            for name, value in zip(_HEADER, _row(self.card), strict=True)
            if name != "id" and value != _UNKNOWN
        }
        lines = [self.card.id, f"  pipeline: {self.card.pipeline_class}"]
        lines += [f"  {name}: {value}" for name, value in facts.items()]
        lines += ["", "defaults", *_listing(found["defaults"]), "", "limits", *_listing(found["limits"])]
        sys.stdout.write("\n".join(lines) + "\n")
        return 0


def parser() -> OptionParser:
    """The options of `sglang models`."""
    return OptionParser(
        "models", "List the models that run natively; `sglang models show ID` shows one.", parameters(ModelsCommandArgs)
    )


def configure(arguments: Sequence[str]) -> ListJob | ShowJob:
    """Read the command line. Raises UsageError, or InvalidValue for an id that is not known."""
    words = [text for text in arguments if not text.startswith("-")]
    options = parser().typed([text for text in arguments if text.startswith("-")])
    as_json = bool(options.get("json", False))
    if not words or words == ["list"]:
        return ListJob(as_json=as_json)
    if words[0] != "show" or len(words) != 2:
        raise UsageError(f"{' '.join(words)}: accepted is `sglang models` or `sglang models show ID`")
    card = find_card(words[1])
    if card is None:
        ids = [card.id for card in cards()]
        raise InvalidValue("ID", words[1], f"an id that `sglang models` lists{hint(words[1], ids)}")
    return ShowJob(card=card, as_json=as_json)


def _row(card: ModelCard) -> tuple[str, ...]:
    return (
        card.id,
        card.family,
        "+".join(card.tasks),
        count(card.transformer_parameters),
        gigabytes(card.weight_bytes),
        gigabytes(card.gpu_bytes),
        card.licence or _UNKNOWN,
    )


def count(number: int | None) -> str:
    """Parameters in words: 1.4B."""
    if number is None:
        return _UNKNOWN
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def gigabytes(number: int | None) -> str:
    """Bytes in words: 14.7 GB."""
    if number is None:
        return _UNKNOWN
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _defaults(card: ModelCard) -> dict[str, Any]:
    """What the model sets itself of the parameters of a request."""
    declared = parameters(SamplingParams)
    values = dataclasses.asdict(card.defaults)
    return {name: value for name, value in values.items() if value != declared[name].default}


def _limits(card: ModelCard) -> dict[str, Any]:
    config = card.config
    return {
        "max_pixels": config.max_pixels,
        "max_frames": config.max_frames,
        "max_sequence_length": config.max_sequence_length,
        "schedulers": list(config.schedulers) or "any",
    }


def _listing(values: dict[str, Any]) -> list[str]:
    return [f"  {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]


def _print_json(value: Any) -> int:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    return 0
