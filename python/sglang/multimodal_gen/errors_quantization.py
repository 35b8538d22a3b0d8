"""Errors about quantised weights, one class per cause, as those of `errors`."""

from __future__ import annotations

from collections.abc import Sequence

from sglang.multimodal_gen.errors import InvalidRequest, ModelError, shown

_SHOWN_KEYS = 8


def named(keys: Sequence[str]) -> str:
    """The first few of them."""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(map(shown, keys[:_SHOWN_KEYS])) + more


class QuantizationNotReadable(ModelError):
    """A checkpoint was quantised by a method that we do not read."""

    code = "quantization_not_readable"
    http_status = 400

    def __init__(self, where: str, method: str, accepted: Sequence[str]) -> None:
        self.method = method
        super().__init__(
            f"{where} is quantised by {shown(method)}; accepted are {', '.join(accepted)}, and weights that are not "
            "quantised, for which --quantization can be set"
        )


class InvalidQuantizedWeights(ModelError):
    """Scales that are missing, of a shape that no scheme has, or no positive numbers; `keys` are theirs."""

    code = "invalid_quantized_weights"

    def __init__(self, where: str, problem: str, keys: Sequence[str], accepted: str) -> None:
        self.keys = tuple(keys)
        super().__init__(f"{where}: {problem}: {named(keys)}; accepted is {accepted}")


class QuantizationNotSupported(InvalidRequest):
    """The model that is asked for has no transformer whose weights we quantise."""

    code = "quantization_not_supported"

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}", param=field)


class QuantizationConflict(InvalidRequest):
    """A checkpoint that is quantised already is to be quantised in another way."""

    code = "quantization_conflict"

    def __init__(self, where: str, asked: str, stored: str) -> None:
        super().__init__(
            f"quantization: got {asked}, but {where} is quantised to {stored} already; leave the option out, or take "
            "the checkpoint that is not quantised",
            param="quantization",
        )


class UnknownLayers(InvalidRequest):
    """Layers that are to stay as they are, and are not there."""

    code = "unknown_layers"

    def __init__(self, texts: Sequence[str], examples: Sequence[str]) -> None:
        self.texts = tuple(texts)
        super().__init__(
            f"quantization_ignored_layers: no layer's name holds {named(texts)}; names are such as {named(examples)}",
            param="quantization_ignored_layers",
        )


class MergeNotPossible(InvalidRequest):
    """Adapters cannot become part of weights in eight bits."""

    code = "merge_not_possible"

    def __init__(self, layer: str) -> None:
        super().__init__(
            f"lora_merge_mode: {layer} has quantised weights, which an adapter would change by less than they are "
            "rounded; accepted is dynamic, which computes it beside them",
            param="lora_merge_mode",
        )


class OutputNotEmpty(InvalidRequest):
    """What is to be written would lie among other files."""

    code = "output_not_empty"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"output: {shown(name)} exists and is not empty; accepted is a directory that does not exist or is empty",
            param="output",
        )
