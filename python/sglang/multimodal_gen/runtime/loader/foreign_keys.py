"""A file's tensors under a module's own names, where another program wrote the file.

Several layers of ours may lie in one tensor of the original, one after another: each is a part of it, at its own place
in the file, so that nothing is read twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName
from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.runtime.layers.shards import whole_shapes
from sglang.multimodal_gen.runtime.loader.parallel_reading import DTYPES
from sglang.multimodal_gen.runtime.loader.weight_utils import StoredTensor, StoredWeights

# Bytes of a text, whatever their number.
_DESCRIPTION = ".comfy_quant"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def with_own_names(stored: StoredWeights, module: nn.Module) -> StoredWeights:
    """The same tensors by the names of the module, as far as its config knows the file's; others keep theirs.

    Raises: CorruptCheckpoint for a tensor whose rows are not those of the layers that lie in it.
    """
    stored = _without_prefix(stored, getattr(module, "stored_prefixes", _PREFIXES))
    config = getattr(module, "config", None)
    rules = config.foreign_names if isinstance(config, TransformerConfig) else ()
    if not rules:
        return stored
    shapes = whole_shapes(module)
    table = _Table(rules)
    own: dict[str, StoredTensor] = {}
    for key, tensor in stored.tensors.items():
        layer, _, leaf = key.rpartition(".")
        if key in shapes or f"{layer}.weight" in shapes:
            own[key] = tensor
        elif (rule := table.find(key)) is not None:
            own |= _parts(stored, key, rule, dict.fromkeys(rule.own, 1))
        elif (rule := table.find(layer)) is not None and all(f"{name}.weight" in shapes for name in rule.own):
            rows = {name: shapes[f"{name}.weight"][0] for name in rule.own}
            parts = _parts(stored, key, rule, rows)
            own |= {f"{name}.{leaf}": part for name, part in parts.items()}
        else:
            own[key] = tensor
    return replace(stored, tensors=own)


def _without_prefix(stored: StoredWeights, prefixes: Iterable[str]) -> StoredWeights:
    """Where a file holds more than one model, or one in another, the module's part of it."""
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in stored.tensors):
            own = {key.removeprefix(prefix): tensor for key, tensor in stored.tensors.items() if key.startswith(prefix)}
            # What marks the file stands among its tensors.
            return replace(stored, tensors=own)
    return stored


class _Table:
    """Rules by their names, whose numbers may be any."""

    def __init__(self, rules: Iterable[ForeignName]) -> None:
        self._rules: dict[str, list[ForeignName]] = {}
        for rule in rules:
            self._rules.setdefault(re.sub(r"\d+|\{\}", "#", rule.name), []).append(rule)

    def find(self, name: str) -> ForeignName | None:
        """The first rule for the layer or tensor, with its numbers set."""
        for rule in self._rules.get(re.sub(r"\d+", "#", name), ()):
            if found := re.fullmatch(re.escape(rule.name).replace(r"\{\}", r"(\d+)"), name):
                own = tuple(each.format(*found.groups()) for each in rule.own)
                return rule._replace(name=name, own=own)
        return None


def _parts(stored: StoredWeights, key: str, rule: ForeignName, rows: Mapping[str, int]) -> dict[str, StoredTensor]:
    """What of a tensor each layer has: its rows, or all of what says something of the whole layer."""
    tensor, total = stored.tensors[key], sum(rows.values())
    if not rows:
        return {}
    if key.endswith(_DESCRIPTION):
        return dict.fromkeys(rule.own, tensor)
    if len(rows) == 1:
        halved = rule.halves_swapped and tensor.shape[:1] == (total,)
        return dict.fromkeys(rule.own, replace(tensor, halves_swapped=halved))
    if tensor.shape[:1] != (total,):
        if math.prod(tensor.shape) == 1:
            return dict.fromkeys(rule.own, tensor)
        raise CorruptCheckpoint(
            f"{stored.directory.name}: {key} is {list(tensor.shape)}, but {', '.join(rows)} have {total} rows together"
        )
    row_bytes = math.prod(tensor.shape[1:]) * DTYPES[tensor.dtype].itemsize
    parts, begin = {}, tensor.offset
    for name, count in rows.items():
        parts[name] = replace(tensor, shape=(count, *tensor.shape[1:]), offset=begin)
        begin += count * row_bytes
    return parts
