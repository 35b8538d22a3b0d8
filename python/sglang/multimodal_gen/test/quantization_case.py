"""What tests of quantised weights share: pipelines with options, plain ones with given weights, quantised files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.fused import JoinedLinear
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear
from sglang.multimodal_gen.runtime.layers.quantization.schemes import QuantizedTensors, Scheme
from sglang.multimodal_gen.runtime.loader.quantized_layers import quantizable_layers
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.pipeline_parity import run

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(checkpoint: Path, lines: list[str] | None = None, **options: Any) -> Any:
    """Our pipeline under these options; what it reports goes to `lines`."""
    report = (lambda _: None) if lines is None else lines.append
    return build_pipeline(str(checkpoint), ExecutionArgs(device="cpu", **options), report=report)


def latents(pipeline: Any, wish: Mapping[str, Any]) -> Tensor:
    """Of a whole request."""
    with torch.inference_mode():
        found = run(pipeline, wish)[0].latents
    assert found is not None
    return found


def quantized_layers(module: nn.Module) -> dict[str, AdaptableLinear]:
    """Those that are, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, AdaptableLinear) and layer.quantization is not None
    }


def dequantized(layer: AdaptableLinear) -> Tensor:
    """Multiplied out by hand, in fp32."""
    return layer.weight.float() * layer.get_parameter("weight_scale")


def set_weights(pipeline: Any, weights: Mapping[str, Tensor]) -> Any:
    """The pipeline, whose transformer's layers of these names have these weights now."""
    for name, weight in weights.items():
        pipeline.transformer.get_submodule(name).weight.data.copy_(weight)
    return pipeline


def realigned(pipeline: Any) -> Any:
    """The pipeline, whose tensors begin where memory is allocated, not where they lie in mapped files: the last bits of
    a processor's products depend on that."""
    for module in pipeline.modules.values():
        joined = [j for m in module.modules() for j in vars(m).values() if isinstance(j, JoinedLinear)]
        views = {id(p) for each in joined for layer in each.layers for p in layer.parameters(recurse=False)}
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in views:
                tensor.data = tensor.data.clone()
    return pipeline


def stored_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Of the transformer."""
    return load_file(checkpoint / "transformer" / WEIGHTS)


def quantized_file(pipeline: Any, checkpoint: Path, scheme: Scheme) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's tensors with values in place of the weights that can be quantised, and those weights' scales by
    the names of their layers."""
    tensors, scales = stored_weights(checkpoint), {}
    for name in quantizable_layers(pipeline.transformer):
        found: QuantizedTensors = scheme.quantize(tensors[f"{name}.weight"])
        tensors[f"{name}.weight"], scales[name] = found
    return tensors, scales


def with_transformer(checkpoint: Path, target: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A copy of the checkpoint with this transformer, and these values in its config."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(checkpoint)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    save_file(dict(tensors), target / "transformer" / WEIGHTS)
    path = target / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target
