"""Puts quantised weights into a transformer's linear layers: as the files have them, or quantised while they load.

A weight is brought to the device whole, quantised, and cut to this rank's part, so that ranks and files that were
written once have the same bits as one process. Only one weight at a time lies on the device as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.errors_quantization import InvalidQuantizedWeights, QuantizationConflict, UnknownLayers
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear
from sglang.multimodal_gen.runtime.layers.quantization.products import (
    SCALE_NAME,
    Quantization,
    computes_in_fp8,
    fits_fp8,
)
from sglang.multimodal_gen.runtime.layers.quantization.schemes import QUANTIZED_DTYPES, QuantizedTensors, Scheme
from sglang.multimodal_gen.runtime.layers.shards import Shard
from sglang.multimodal_gen.runtime.loader.parallel_reading import DTYPES
from sglang.multimodal_gen.runtime.loader.stored_quantization import StoredQuantization, take_apart
from sglang.multimodal_gen.runtime.loader.weight_utils import StoredWeights

_WEIGHT = ".weight"


def takes_quantization(cls: type[nn.Module]) -> bool:
    """Whether a class says which of its layers stay as they are, so that the others can be quantised."""
    return hasattr(cls, "keep_unquantized")


def quantizable_layers(module: nn.Module) -> dict[str, AdaptableLinear]:
    """By name: linear layers that are not within a name of the class's `keep_unquantized`, where `*` is any text."""
    kept: tuple[str, ...] = module.keep_unquantized  # type: ignore[assignment]
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, AdaptableLinear) and not _is_within(name, kept)
    }


def _is_within(name: str, patterns: tuple[str, ...]) -> bool:
    parts = name.split(".")
    outer = [".".join(parts[: length + 1]) for length in range(len(parts))]
    return any(fnmatchcase(part, pattern) for part in outer for pattern in patterns)


@dataclass(frozen=True)
class _Placed:
    """What a layer will hold, on this rank."""

    tensors: QuantizedTensors
    exact: bool


class LayerQuantizer:
    """Of one module while it loads. Sources of weights hand it each tensor; `install` gives the layers what it kept.

    Raises: UnknownLayers for ignored layers that are not there.
    """

    def __init__(
        self,
        module: nn.Module,
        options: QuantizationArgs,
        *,
        dtype: torch.dtype,
        device: torch.device,
        runs_on: torch.device | None = None,
    ) -> None:
        """Tensors are placed on `device`; `runs_on` is where the layers will compute, None for there."""
        self._dtype, self._device = dtype, device
        self._runs_on = runs_on or device
        method = options.quantization
        self._scheme = None if method is None else Scheme(method, options.quantization_granularity)
        layers = quantizable_layers(module)
        ignored = options.quantization_ignored_layers or ()
        linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        if unknown := [text for text in ignored if not any(text in name for name in linears)]:
            raise UnknownLayers(unknown, linears)
        self._layers = {n: layer for n, layer in layers.items() if not any(text in n for text in ignored)}
        self._stored = StoredQuantization()
        self._placed: dict[str, _Placed] = {}

    def take_apart(self, stored: StoredWeights) -> StoredWeights:
        """Those of a file's tensors that the module has; what says how they are quantised is remembered.

        Raises: QuantizationConflict for a file that is quantised in another way than is asked for; else as
            `take_apart`.
        """
        own, self._stored = take_apart(stored)
        for method in sorted(set(self._stored.methods.values())):
            if self._scheme is not None and method != self._scheme.method:
                raise QuantizationConflict(stored.directory.name, self._scheme.method, method)
        return own

    def takes(self, name: str, key: str, stored_dtype: str) -> bool:
        """Whether `placed` says what the module's tensor `name` is, for a file's tensor in this dtype of the format."""
        holds = name.endswith(_WEIGHT) and name.removesuffix(_WEIGHT) in self._layers
        if key in self._stored.methods or (holds and self._scheme is not None):
            return True
        return DTYPES[stored_dtype] in QUANTIZED_DTYPES and not holds

    def placed(self, name: str, key: str, tensor: Tensor, shard: Shard | None, dtype: torch.dtype) -> Tensor | None:
        """What the module's tensor `name` is: this rank's part of a file's whole tensor, of which it takes a view. None
        for one that is not quantised and not to be. Any thread may call it."""
        layer = name.removesuffix(_WEIGHT)
        holds = name.endswith(_WEIGHT) and layer in self._layers
        if key in self._stored.methods:
            quantized = QuantizedTensors(tensor.to(self._device), self._stored.scales[key].to(self._device))
            if not holds:
                whole = quantized.dequantized(dtype)
                return whole if shard is None else shard.cut(whole)
            return self._hold(layer, quantized, shard, exact=key in self._stored.exact)
        if tensor.dtype in QUANTIZED_DTYPES and not holds:  # a bias or a norm that was cast with all else
            part = tensor if shard is None else shard.cut(tensor.float())
            return part.to(self._device, dtype)
        if not holds or self._scheme is None:
            return None
        quantized = self._scheme.quantize(tensor.to(self._device))
        if not bool(quantized.scales.isfinite().all()):
            raise InvalidQuantizedWeights("the transformer", "weights that are not finite", [key], "finite numbers")
        return self._hold(layer, quantized, shard, exact=False)

    def _hold(self, layer: str, whole: QuantizedTensors, shard: Shard | None, *, exact: bool) -> Tensor:
        values, scales = whole
        if shard is not None:
            values = _cut(shard, values)
            scales = shard.cut(scales) if shard.dim == 0 and whole.by_row else scales
        self._placed[layer] = _Placed(QuantizedTensors(values.contiguous(), scales.contiguous()), exact)
        return values

    def give_up(self, layer: str) -> QuantizedTensors | None:
        """What was kept for a layer, which will not hold it; None for one that is not quantised."""
        placed = self._placed.pop(layer, None)
        return None if placed is None else placed.tensors

    def install(self) -> dict[str, Tensor]:
        """Let the layers hold what was kept for them; their values and scales by name, for the module's state."""
        tensors: dict[str, Tensor] = {}
        for name, placed in self._placed.items():
            values, scales = placed.tensors
            multiplies = computes_in_fp8(self._runs_on) and fits_fp8(values) and not placed.exact
            layer = self._layers[name]
            layer.quantize(values, scales, Quantization(self._dtype, scales_inputs=multiplies))
            tensors |= {f"{name}{_WEIGHT}": values, f"{name}.{SCALE_NAME}": scales}
        return tensors


def _cut(shard: Shard, values: Tensor) -> Tensor:
    # Not every device copies eight-bit floats; bytes are copied everywhere.
    return shard.cut(values.view(torch.uint8)).view(values.dtype)
