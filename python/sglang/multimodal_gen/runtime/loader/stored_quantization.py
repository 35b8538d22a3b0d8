"""Checkpoints whose weights are quantised already: which of their tensors are scales, and what is written about them.

Read are weights in fp8 or int8 with one scale, or one for each output row, as ComfyUI (`X.scale_weight`, or
`X.weight_scale` and `X.comfy_quant`), ModelOpt and `sglang quantize` (`X.weight_scale`) write them, and weights that
were cast to fp8 without a scale. Sources: ComfyUI's QUANTIZATION.md, diffusers' layerwise casting, NVIDIA ModelOpt.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.quantization_args import CONFIG_KEY, MODELOPT, READ_METHODS
from sglang.multimodal_gen.errors_quantization import InvalidQuantizedWeights, QuantizationNotReadable
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.loader.weight_utils import StoredWeights

_WEIGHT = ".weight"
_SCALES = (".weight_scale", ".scale_weight")
# Scales of activations: ours are quantised by what they are while the model runs.
_OTHERS = (".input_scale", ".scale_input", ".comfy_quant")
_MARKER = "scaled_fp8"
# ComfyUI marks a file whose products are to be of dequantised weights by two elements, others by none.
_MARKS_EXACT = 2
_STORED = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8"}
_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_ACCEPTED = "one scale for a weight, or one for each output row, all of them positive numbers"


@dataclass(frozen=True)
class StoredQuantization:
    """Of a file's weights those that are quantised: the method and the scales [O or 1, 1] of each, by its key, and
    which of them are not to be multiplied in fp8."""

    methods: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    exact: Collection[str] = ()


def take_apart(stored: StoredWeights) -> tuple[StoredWeights, StoredQuantization]:
    """The tensors that a module has, and what says how they are quantised.

    Raises:
        InvalidQuantizedWeights: scales are missing, too many, misshaped, or not positive and finite.
        QuantizationNotReadable: a layer has a format that we do not read.
    """
    keys = stored.tensors
    methods = {key: _STORED[tensor.dtype] for key, tensor in keys.items() if _is_quantized(key, stored)}
    scale_keys = {f"{key.removesuffix(end)}{_WEIGHT}": key for key in keys for end in _SCALES if key.endswith(end)}
    where = stored.directory.name
    if unscaled := [key for key, method in methods.items() if method == "int8" and key not in scale_keys]:
        raise InvalidQuantizedWeights(where, "weights in int8 without a weight_scale", unscaled, _ACCEPTED)
    if idle := [scale for key, scale in scale_keys.items() if key not in methods]:
        raise InvalidQuantizedWeights(where, "scales of weights that are not quantised", idle, _ACCEPTED)
    scales = _read_scales(stored, scale_keys)
    exact = _exact_layers(stored, methods)
    extra = {key for key in keys if key.endswith((*_SCALES, *_OTHERS)) or key == _MARKER}
    own = {key: tensor for key, tensor in keys.items() if key not in extra}
    for key in methods:
        scales.setdefault(key, torch.ones(1, 1))
    return replace(stored, tensors=own), StoredQuantization(methods, scales, exact)


def _is_quantized(key: str, stored: StoredWeights) -> bool:
    tensor = stored.tensors[key]
    return tensor.dtype in _STORED and len(tensor.shape) == 2 and key.endswith(_WEIGHT)


def _read_scales(stored: StoredWeights, scale_keys: Mapping[str, str]) -> dict[str, Tensor]:
    found = stored.load(list(scale_keys.values()), lambda _, tensor: tensor.clone())
    misshaped, bad, scales = [], [], {}
    for key, scale_key in scale_keys.items():
        scale, rows = found[scale_key], stored.tensors[key].shape[0]
        if scale.numel() not in (1, rows) or tuple(scale.shape) not in {(), (1,), (1, 1), (rows,), (rows, 1)}:
            misshaped.append(f"{scale_key} ({list(scale.shape)} of {rows} rows)")
            continue
        wide = scale.float().view(-1, 1)
        if not bool((wide.isfinite() & (wide > 0)).all()):
            bad.append(scale_key)
        scales[key] = wide
    where = stored.directory.name
    if misshaped:
        raise InvalidQuantizedWeights(where, "scales of a shape that is not read", misshaped, _ACCEPTED)
    if bad:
        raise InvalidQuantizedWeights(where, "scales that are zero, negative or no numbers", bad, _ACCEPTED)
    return scales


def _exact_layers(stored: StoredWeights, methods: Mapping[str, str]) -> Collection[str]:
    """Those that the file says to multiply as they are when dequantised."""
    marker = stored.tensors.get(_MARKER)
    if marker is not None and marker.shape == (_MARKS_EXACT,):
        return frozenset(methods)
    described = [key for key in stored.tensors if key.endswith(".comfy_quant")]
    exact = set()
    for key, tensor in stored.load(described, lambda _, tensor: tensor.clone()).items():
        try:
            says: Any = json.loads(bytes(tensor.tolist()))
            layer_format = str(says["format"])
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidQuantizedWeights(
                stored.directory.name, "descriptions that cannot be read", [key], 'JSON with a "format"'
            ) from error
        if layer_format not in _COMFY_FORMATS:
            raise QuantizationNotReadable(f"{stored.directory.name}: {key}", layer_format, _COMFY_FORMATS)
        if says.get("full_precision_matrix_mult"):
            exact.add(key.removesuffix(".comfy_quant") + _WEIGHT)
    return exact


def check_stored_method(directory: Path) -> None:
    """Raises QuantizationNotReadable where `config.json` says that weights are quantised in a way we do not read."""
    config = directory / "config.json"
    said = read_json_object(config).get(CONFIG_KEY) if config.is_file() else None
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, dict) else said
    where = f"{directory.name}/config.json"
    if method not in READ_METHODS:
        raise QuantizationNotReadable(where, str(method), READ_METHODS)
    algorithm = said.get("quant_algo", said.get("quant_type", "FP8"))
    if method == MODELOPT and str(algorithm).upper() != "FP8":
        raise QuantizationNotReadable(where, f"{MODELOPT} {algorithm}", [f"{MODELOPT} FP8"])
