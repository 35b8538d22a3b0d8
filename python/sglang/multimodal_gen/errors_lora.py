"""Errors about LoRA adapters, one class per cause, as those of `errors`."""

from __future__ import annotations

from collections.abc import Sequence

from sglang.multimodal_gen.errors import InvalidRequest, shown

_SHOWN_KEYS = 8


class InvalidLora(InvalidRequest):
    """A file that holds no adapter which can be used; `reason` says what is wrong with it."""

    code = "invalid_lora"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"lora_path: {reason}", param="lora_path")


class LoraDoesNotFit(InvalidLora):
    """An adapter of another model: `keys` are those whose layers or shapes this one has not."""

    def __init__(self, problem: str, keys: Sequence[str], remedy: str) -> None:
        self.keys = tuple(keys)
        more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        super().__init__(f"{problem}: {', '.join(map(shown, keys[:_SHOWN_KEYS]))}{more}; {remedy}")


class UnknownLora(InvalidRequest):
    """A request names an adapter that is not loaded."""

    code = "unknown_lora"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name = name
        self.known = tuple(known)
        accepted = ", ".join(map(shown, known[:_SHOWN_KEYS])) or "none; load one with set_lora"
        super().__init__(f"lora: no adapter is called {shown(name)}; loaded are {accepted}", param="lora")


class LoraNameTaken(InvalidRequest):
    """The nickname belongs to an adapter from somewhere else."""

    code = "lora_name_taken"

    def __init__(self, name: str) -> None:
        self.name = name
        text = f"lora_nickname: {shown(name)} is loaded from another path; remove it first, or take another name"
        super().__init__(text, param="lora_nickname")


class LoraNotSupported(InvalidRequest):
    """The model that is served takes no adapters."""

    code = "lora_not_supported"
