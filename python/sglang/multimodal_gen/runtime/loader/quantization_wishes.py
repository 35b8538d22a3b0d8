"""What the options about quantised weights mean for a pipeline's components, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang.multimodal_gen.configs.model_info import QuantizedWeights
from sglang.multimodal_gen.configs.quantization_args import DEFAULT_GRANULARITY, QuantizationArgs
from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.errors_quantization import QuantizationNotSupported
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear
from sglang.multimodal_gen.runtime.layers.quantization.products import SCALE_NAME, computes_in_fp8, fits_fp8
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader, NativeModule
from sglang.multimodal_gen.runtime.loader.quantized_layers import takes_quantization


def check_wishes(
    options: QuantizationArgs, components: Mapping[str, ComponentLoader], *, random_weights: bool = False
) -> None:
    """Raises QuantizationNotSupported where an option is set and none of a pipeline's components could follow it."""
    asked = {
        "quantization": options.quantization is not None,
        "quantization_granularity": options.quantization_granularity != DEFAULT_GRANULARITY,
        "quantization_ignored_layers": options.quantization_ignored_layers is not None,
        **{f"{name}_weights_path": True for name in options.weights_paths()},
    }
    named = [name for name, is_asked in asked.items() if is_asked]
    if not named:
        return
    natives = [load.module_class for load in components.values() if isinstance(load, NativeModule)]
    if not any(map(takes_quantization, natives)):
        raise QuantizationNotSupported(
            named[0], "this model has no transformer that runs natively; `sglang models` lists those that do"
        )
    for name in options.weights_paths():
        if name not in components:
            check_is_read(options, name)
        if random_weights:
            raise QuantizationNotSupported(f"{name}_weights_path", "with random_weights no file is read")


def check_is_read(options: QuantizationArgs, absent: str) -> None:
    """Raises QuantizationNotSupported where weights are given for a component that a model does not have."""
    if absent in options.weights_paths():
        raise QuantizationNotSupported(f"{absent}_weights_path", f"this model has no {absent}")


def replaced_weights(options: QuantizationArgs) -> dict[str, Path]:
    """By component what is read in place of its own files. Raises InvalidValue for a path that does not exist."""
    paths = {name: Path(path).expanduser() for name, path in options.weights_paths().items()}
    for name, path in paths.items():
        if not path.exists():
            raise InvalidValue(f"{name}_weights_path", path.name, "a safetensors file or a directory that exists")
    return paths


def describe_quantization(modules: Mapping[str, nn.Module]) -> QuantizedWeights | None:
    """What of the transformers among these is quantised, for people; None where nothing is."""
    linears = _linears(modules, quantized=False)
    quantized = _linears(modules, quantized=True)
    if not quantized:
        return None
    formats = {"int8" if layer.weight.dtype == torch.int8 else "fp8" for layer in quantized}
    by_row = {layer.get_parameter(SCALE_NAME).shape[0] > 1 for layer in quantized}
    return QuantizedWeights(
        method=" and ".join(sorted(formats)),
        granularity=" and ".join("row" if each else "tensor" for each in sorted(by_row)),
        num_layers=len(quantized),
        num_kept=len(linears),
        num_fp8_products=sum(bool(layer.quantization and layer.quantization.scales_inputs) for layer in quantized),
        weight_bytes=sum(layer.weight.nbytes + layer.get_parameter(SCALE_NAME).nbytes for layer in quantized),
    )


def explain_quantization(components: Mapping[str, Any], device: torch.device) -> Iterator[str]:
    """For the start-up log: what is quantised, and why some of it does not compute in fp8."""
    modules = {name: module for name, module in components.items() if isinstance(module, nn.Module)}
    found = describe_quantization(modules)
    if found is None:
        return
    yield f"quantization {found}"
    in_fp8 = [layer for layer in _linears(modules, quantized=True) if layer.weight.dtype != torch.int8]
    if in_fp8 and not computes_in_fp8(device):
        yield f"quantization: {device} does not multiply in fp8, so that only memory is saved"
    elif odd := sum(not fits_fp8(layer.weight) for layer in in_fp8):
        yield f"quantization: {odd} layers in fp8 have sizes or a format that the chip does not multiply"


def _linears(modules: Mapping[str, nn.Module], *, quantized: bool) -> list[AdaptableLinear]:
    return [
        layer
        for module in modules.values()
        if takes_quantization(type(module))
        for layer in module.modules()
        if isinstance(layer, AdaptableLinear) and (layer.quantization is not None) == quantized
    ]
