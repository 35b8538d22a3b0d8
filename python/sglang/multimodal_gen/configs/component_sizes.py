"""How many parameters the components of a checkpoint have: from the headers of its files, or as counted once."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.published import SIZES_FILE
from sglang.multimodal_gen.errors import CorruptCheckpoint

_HEADER_LENGTH_BYTES = 8
# They belong to weights that are counted.
_SCALES = (".weight_scale", ".scale_weight", ".input_scale", ".scale_input")


def component_parameters(hub_id: str | None, entry: ModelEntry) -> dict[str, int] | None:
    """By component: those of the hub id itself, or of one that shares its architecture; None where neither is known."""
    known = _all_sizes()
    own = () if hub_id is None else (hub_id,)
    return next((known[name] for name in (*own, *entry.hub_ids) if name in known), None)


def stored_component_parameters(directory: Path) -> dict[str, int]:
    """By component with weights in a directory in diffusers layout, from headers alone.

    Files of another precision, such as `model.fp16.safetensors`, are not counted.
    """
    found: dict[str, int] = {}
    for path in sorted(directory.glob("*/*.safetensors")):
        if "." not in path.stem:
            found[path.parent.name] = found.get(path.parent.name, 0) + stored_parameters(path)
    return found


def stored_parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header: its length, then a JSON object of tensors.

    Raises: CorruptCheckpoint when there is none.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")))
        return sum(
            math.prod(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__" and not name.endswith(_SCALES)
        )
    except (ValueError, OSError, KeyError, AttributeError, TypeError, MemoryError, OverflowError) as error:
        raise CorruptCheckpoint(f"{path.parent.name}/{path.name} has no header that can be read: {error}") from error


@functools.cache
def _all_sizes() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(SIZES_FILE.read_text(encoding="utf-8"))
    return found
