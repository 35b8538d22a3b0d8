"""Finding an adapter's file, in a directory, by itself or on the hub, and reading it without trusting it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sglang.multimodal_gen.errors import ModelError, shown
from sglang.multimodal_gen.errors_lora import InvalidLora
from sglang.multimodal_gen.registry import EMBEDDED_ADAPTERS, read_json_object
from sglang.multimodal_gen.runtime.loader.lora_formats import (
    MAIN_COMPONENT,
    AdapterTensors,
    AlphaRule,
    LayerNames,
    metadata_rules,
    sort_tensors,
)
from sglang.multimodal_gen.runtime.loader.weight_utils import PICKLE_ENDINGS, StoredWeights, read_header

_PREFERRED = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class LoraSource:
    """Where an adapter lies: a file, a directory, `owner/name` on the hub, or an embedded one's name. `weight_name`
    is the file in there, where there are several; `alpha` counts instead of what the file says."""

    path: str
    weight_name: str | None = None
    alpha: float | None = None


def read_adapter(source: LoraSource, names: Mapping[str, LayerNames]) -> AdapterTensors:
    """What the source changes in the components with these names; nothing of it is mapped any more.

    Raises:
        InvalidLora: there is no such file, it cannot be read, or it holds no LoRA.
        LoraDoesNotFit: it is another model's.
    """
    file = find_file(source)
    try:
        return sort_tensors(_tensors(file), names, _rules(file, source.alpha))
    except ModelError as error:
        raise InvalidLora(error.message.replace(f"{file.parent.name}/", "")) from error


def find_file(source: LoraSource) -> Path:
    """The safetensors file. Raises InvalidLora."""
    name = source.weight_name
    if name is not None and (Path(name).name != name or not name.endswith(".safetensors")):
        raise InvalidLora(f"the weight name {shown(name)} is no name of a safetensors file")
    path = Path(source.path).expanduser()
    if not path.exists():
        path = EMBEDDED_ADAPTERS.get(source.path) or _downloaded(source.path, name)
    if path.is_dir():
        return _file_in(path, name)
    if path.suffix != ".safetensors":
        kind = "holds pickled weights, which can run code when they are read" if path.suffix in PICKLE_ENDINGS else ""
        raise InvalidLora(f"{path.name} {kind or 'is no safetensors file'}; accepted are safetensors files")
    return path


def _file_in(directory: Path, name: str | None) -> Path:
    found = sorted(file.name for file in directory.glob("*.safetensors"))
    if name is not None:
        if name not in found:
            raise InvalidLora(
                f"there is no {shown(name)}; accepted are {', '.join(found[:8]) or 'directories with it'}"
            )
        return directory / name
    for preferred in _PREFERRED:
        if preferred in found:
            return directory / preferred
    if len(found) == 1:
        return directory / found[0]
    if found:
        raise InvalidLora(f"it holds {len(found)} files; say which as the weight name: {', '.join(found[:8])}")
    pickled = any(file.suffix in PICKLE_ENDINGS for file in directory.iterdir())
    raise InvalidLora(
        "it holds pickled weights only, which can run code when they are read; accepted are safetensors files"
        if pickled
        else "the directory holds no safetensors file"
    )


def _downloaded(hub_id: str, name: str | None) -> Path:
    """The hub repository's directory. Raises InvalidLora."""
    if hub_id.count("/") != 1 or hub_id.startswith(("/", ".", "~")):
        raise InvalidLora(f"{shown(Path(hub_id).name)} does not exist; accepted are a file, a directory or owner/name")
    wanted = [_CONFIG, "*.safetensors" if name is None else name]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError, ValueError) as error:
        reason = f"{shown(hub_id)} is no directory here and cannot be fetched from the hub ({type(error).__name__})"
        raise InvalidLora(f"{reason}; check the spelling, or give a file or directory") from error


def _tensors(file: Path) -> dict[str, Tensor]:
    """Copies: the file may be replaced while the adapter is in use."""
    stored = read_header(file)
    if not stored:
        raise InvalidLora(f"{file.name} holds no tensors")
    return StoredWeights(file.parent, stored).load(list(stored), lambda _, tensor: tensor.clone())


def _rules(file: Path, alpha: float | None) -> dict[str, AlphaRule]:
    """Of the config beside the file, else of the file's metadata."""
    if (file.parent / _CONFIG).is_file():
        config: dict[str, Any] = read_json_object(file.parent / _CONFIG)
        return {MAIN_COMPONENT: AlphaRule.of_config(config, override=alpha)}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise InvalidLora(f"{file.name} is no valid safetensors file") from error
    rules = metadata_rules(metadata, override=alpha)
    return rules if alpha is None else {MAIN_COMPONENT: AlphaRule(override=alpha), **rules}
