"""Random adapters for tiny checkpoints, as files, and the weights that peft makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource

# Of random weights with a mean square of 1 / inputs; an adapter changes them by about a third.
_SPREAD = 0.3


def random_adapter(model: nn.Module, seed: int, *, rank: int = 3) -> dict[str, Tensor]:
    """Both factors for every linear layer, by the names of peft."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            for part, size in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                found[f"transformer.{name}.lora_{part}.weight"] = torch.randn(size, generator=generator)
            found[f"transformer.{name}.lora_A.weight"] *= _SPREAD / (layer.in_features * rank) ** 0.5
    return found


def load_adapters(pipeline: Any, files: Mapping[str, Path | str], merged: Mapping[str, float]) -> None:
    """Into a pipeline, by name; those of `merged` become part of its weights."""
    for name, file in files.items():
        pipeline.adapters.load(name, LoraSource(path=str(file)))
    pipeline.adapters.merge_ids(list(merged.items()))


def reference_transformer(checkpoint: Path) -> Any:
    """diffusers' own."""
    config = diffusers.DiffusionPipeline.load_config(checkpoint)
    return getattr(diffusers, config["transformer"][1]).from_pretrained(checkpoint / "transformer")


def save_adapters(checkpoint: Path, directory: Path, ranks: Mapping[str, int]) -> dict[str, Path]:
    """A file for each name, with adapters of these ranks."""
    model, files = reference_transformer(checkpoint), {}
    for seed, (name, rank) in enumerate(ranks.items()):
        files[name] = directory / f"{name}.safetensors"
        save_file(random_adapter(model, seed, rank=rank), files[name])
    return files


def fused_weights(checkpoint: Path, files: Mapping[str, Path], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The transformer's weights with these adapters in them, computed by peft through diffusers."""
    model = reference_transformer(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are several is what is wanted
        for name in scales:
            model.load_lora_adapter(str(files[name].parent), weight_name=files[name].name, adapter_name=name)
    model.set_adapters(list(scales), weights=list(scales.values()))
    model.fuse_lora()
    model.unload_lora()
    return dict(model.state_dict())
