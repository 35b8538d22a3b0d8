"""Configs of published checkpoints, without their weights: one directory in diffusers layout for each hub id.

Benchmarks build real modules from them without a download, and tests compare our modules with them. Values were taken
from diffusers' conversion scripts and class defaults; where the hub's own file says more, no module reads it.
"""

from __future__ import annotations

from pathlib import Path

from sglang.multimodal_gen.configs.declare import hint
from sglang.multimodal_gen.errors import NotAModel, shown

_DIRECTORY = Path(__file__).parent
SIZES_FILE = _DIRECTORY / "sizes.json"
"""Number of parameters by hub id and component; written by scripts/count_parameters.py."""
_SLASH = "--"  # as the hub's cache spells it


def published_ids() -> tuple[str, ...]:
    """The hub ids with configs here."""
    return tuple(sorted(path.name.replace(_SLASH, "/", 1) for path in _DIRECTORY.iterdir() if _SLASH in path.name))


def published_directory(hub_id: str) -> Path:
    """The directory with the configs of a hub id, whose letter case does not matter. Raises NotAModel without one."""
    for known in published_ids():
        if known.lower() == hub_id.lower():
            return _DIRECTORY / known.replace("/", _SLASH)
    raise NotAModel(
        f"model_path: the package has no configs of {shown(hub_id)}; known are {', '.join(published_ids())}, "
        f"and any local directory in diffusers layout{hint(hub_id, published_ids())}",
        param="model_path",
    )
