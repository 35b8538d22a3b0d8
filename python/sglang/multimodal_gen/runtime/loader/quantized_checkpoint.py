"""Writes a model directory whose transformers are quantised, so that loading it needs neither the time nor the disk
space of the original."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sglang.multimodal_gen.configs.quantization_args import CONFIG_KEY, QuantizationArgs
from sglang.multimodal_gen.errors import storage_error
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.quantization.products import SCALE_NAME
from sglang.multimodal_gen.runtime.loader.component_loader import NativeModule, without_memory
from sglang.multimodal_gen.runtime.loader.foreign_keys import with_own_names
from sglang.multimodal_gen.runtime.loader.quantized_layers import LayerQuantizer
from sglang.multimodal_gen.runtime.loader.weight_utils import open_weights

SHARD_BYTES = 4 << 30
_STEM = "diffusion_pytorch_model"
_WEIGHT = ".weight"
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt")
_OS_ERROR = re.compile(r"os error (\d+)")
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Written:
    """Of one component: how many layers are quantised, and the bytes of its files before and after."""

    component: str
    num_layers: int
    bytes_before: int
    bytes_after: int


@dataclass
class _Shards:
    """Files of at most so many bytes, each written when it is full, and an index of them."""

    directory: Path
    most_bytes: int
    total_bytes: int = 0
    files: list[list[str]] = field(default_factory=list)
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _waiting_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor, which is copied: files that it may be a view of are mapped."""
        if self._waiting and self._waiting_bytes + tensor.nbytes > self.most_bytes:
            self._write()
        self._waiting[name] = tensor.to("cpu", copy=True).contiguous()
        self._waiting_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and give the files the names that tell how many there are."""
        self._write()
        count = len(self.files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.files):
            file = f"{_STEM}.safetensors" if count == 1 else f"{_STEM}-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.directory / f"{_STEM}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write(self) -> None:
        path = self._temporary(len(self.files))
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise as_os_error(error) from error
        self.files.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.directory / f"part-{number}"


def as_os_error(error: SafetensorError) -> OSError:
    """What the system said, which safetensors has in a text alone."""
    found = _OS_ERROR.search(str(error))
    number = errno.EIO if found is None else int(found.group(1))
    return OSError(number, os.strerror(number))


def write_quantized(
    source: Path,
    target: Path,
    components: dict[str, NativeModule],
    options: QuantizationArgs,
    *,
    device: torch.device,
    tell: Tell = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Written]:
    """Fill the empty directory `target`: the named components quantised, all else as in `source`, as links to the same
    files where the disk is the same.

    Raises:
        InsufficientStorage, StorageError: what is written has no room, or cannot be written.
        ModelError, InvalidRequest: as loading such a model does.
    """
    try:
        _copy_rest(source, target, components)
        return [
            _write_component(source / name, target / name, native, options, device, tell, shard_bytes)
            for name, native in components.items()
        ]
    except OSError as error:
        raise storage_error(f"output: {target.name} cannot be written", error) from error


def _copy_rest(source: Path, target: Path, components: Collection[str]) -> None:
    """Every file but the weights of these components, and hidden ones."""
    for file in sorted(source.rglob("*")):
        place = file.relative_to(source)
        if any(part.startswith(".") for part in place.parts) or not file.is_file():
            continue
        if len(place.parts) == 2 and place.parts[0] in components and file.name.endswith(_WEIGHT_FILES):
            continue
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        try:
            # The hub's cache holds links to files elsewhere; those are what is linked.
            os.link(file.resolve(), target / place)
        except OSError:
            shutil.copyfile(file, target / place)


def _write_component(
    source: Path,
    target: Path,
    native: NativeModule,
    options: QuantizationArgs,
    device: torch.device,
    tell: Tell,
    shard_bytes: int,
) -> Written:
    tell(f"quantising {source.name}")
    module = without_memory(native.module_class, native.config(source), LayerContext())
    quantizer = LayerQuantizer(module, options, dtype=torch.bfloat16, device=device)
    stored = quantizer.take_apart(with_own_names(open_weights(source, quantized=True), module))
    shards, num_layers = _Shards(target, shard_bytes), 0

    def write(key: str, tensor: Tensor) -> Tensor:
        nonlocal num_layers
        layer = key.removesuffix(_WEIGHT)
        plain = quantizer.placed(key, key, tensor, None, torch.bfloat16)
        quantized = quantizer.give_up(layer)
        if quantized is None or not key.endswith(_WEIGHT):
            shards.add(key, tensor if plain is None else plain)
        else:
            shards.add(key, quantized.values)
            shards.add(f"{layer}.{SCALE_NAME}", quantized.scales)
            num_layers += 1
        return tensor.new_empty(0)

    # One by one: several at once would come in any order, and the shards with them.
    for key in sorted(stored.tensors, key=lambda key: (stored.tensors[key].file, stored.tensors[key].offset)):
        stored.load([key], write)
    shards.close()
    _write_config(source, target, options)
    files = {tensor.file for tensor in stored.tensors.values()}
    before = sum(file.stat().st_size for file in files)
    after = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return Written(component=source.name, num_layers=num_layers, bytes_before=before, bytes_after=after)


def _write_config(source: Path, target: Path, options: QuantizationArgs) -> None:
    said = {
        "quant_method": options.quantization,
        "granularity": options.quantization_granularity,
        "modules_to_not_convert": list(options.quantization_ignored_layers or ()),
        "producer": "sglang.multimodal_gen",
    }
    config = read_json_object(source / "config.json") | {CONFIG_KEY: said}
    path = target / "config.json"
    path.unlink(missing_ok=True)  # it may be the original's own file
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
