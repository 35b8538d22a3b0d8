"""In how many bits the transformer's weights lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.declare import LOCAL_ONLY, arg

METHODS = ("fp8", "int8")
GRANULARITIES = ("row", "tensor")
DEFAULT_GRANULARITY = "row"
QUANTIZED_BYTES = 1
"""Of a weight, beside its scales."""
CONFIG_KEY = "quantization_config"
"""Of `config.json`."""
MODELOPT = "modelopt"
READ_METHODS = (*METHODS, MODELOPT)
"""Values of `quant_method` there that we read; of modelopt only its FP8."""


@dataclass(frozen=True, kw_only=True)
class QuantizationArgs:
    """Which weights are quantised while they load, and how."""

    quantization: str | None = arg(
        None,
        help="Format of the transformer's weights in memory, to which they are brought while they load: `fp8` halves "
        "them and, on GPUs that multiply in fp8, computes with activations in fp8 too; `int8` halves them and computes "
        "as without.",
        group="quantization",
        unset="as the checkpoint has them",
        choices=METHODS,
    )
    quantization_granularity: str = arg(
        DEFAULT_GRANULARITY,
        help="Whether each output row of a weight has a scale of its own, which is nearer to the original, or the "
        "whole tensor one.",
        group="quantization",
        choices=GRANULARITIES,
    )
    quantization_ignored_layers: tuple[str, ...] | None = arg(
        None,
        help="Parts of names of layers that stay as they are, besides embeddings, modulations and the last projection.",
        group="quantization",
        unset="none",
        metavar="PART",
        max_length=256,
    )
    transformer_weights_path: str | None = arg(
        None,
        help="Safetensors file, or directory of them, in place of the transformer's own weights, such as ones that are "
        "quantised already, by the names of diffusers' checkpoints or of the model's first repository.",
        group="quantization",
        unset="the model's own",
        exposed=LOCAL_ONLY,
        max_length=4096,
        metavar="PATH",
    )
    transformer_2_weights_path: str | None = arg(
        None,
        help="The same for the second transformer of a model that has two.",
        group="quantization",
        unset="the model's own",
        exposed=LOCAL_ONLY,
        max_length=4096,
        metavar="PATH",
    )

    def weights_paths(self) -> dict[str, str]:
        """By component what is read in place of its own files."""
        paths = {"transformer": self.transformer_weights_path, "transformer_2": self.transformer_2_weights_path}
        return {name: path for name, path in paths.items() if path is not None}
