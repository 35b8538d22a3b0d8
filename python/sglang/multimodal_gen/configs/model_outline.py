"""What configs tell of a model before anything of it is loaded: its transformer, its weights, the work of a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang.multimodal_gen.configs.component_sizes import component_parameters, stored_component_parameters
from sglang.multimodal_gen.configs.cost_model import HALF_PRECISION_BYTES, StepWork, WeightBytes
from sglang.multimodal_gen.configs.encoder_outline import EncoderOutline, outline_encoder
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.published import published_directory, published_ids
from sglang.multimodal_gen.configs.quantization_args import CONFIG_KEY, QUANTIZED_BYTES
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.transformer_shape import TransformerShape
from sglang.multimodal_gen.errors import InvalidRequest, UnsupportedModel, shown
from sglang.multimodal_gen.registry import (
    MODEL_INDEX,
    ResolvedModel,
    load_config,
    read_json_object,
    read_model_index,
)

_FP32_BYTES = 4
_TRANSFORMERS = ("transformer", "transformer_2")
_AUTOENCODER = "vae"


@dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """`parameters` are by component, of those that the checkpoint has; `is_quantized` where it says so of its
    transformer's."""

    name: str
    shape: TransformerShape
    parameters: dict[str, int]
    encoders: tuple[EncoderOutline, ...]
    config: PipelineConfig
    defaults: SamplingParams
    is_quantized: bool = False

    def work(self, params: SamplingParams | None = None) -> StepWork:
        """A step of one request; what `params` does not say is the model's default."""
        complete = self.defaults if params is None else params.filled_from(self.defaults)
        width, height, num_frames = complete.width or 1024, complete.height or 1024, complete.num_frames or 1
        patch_t, patch_h, patch_w = self.shape.patch
        config = self.config
        frames = -(-((num_frames - 1) // config.temporal_ratio + 1) // patch_t)
        rows, columns = (
            max(1, side // (config.spatial_ratio * patch)) for side, patch in ((height, patch_h), (width, patch_w))
        )
        text = complete.max_sequence_length or config.max_sequence_length
        return StepWork(
            rows=config.num_rows(complete),
            image_tokens=frames * rows * columns * (1 + config.reference_images),
            text_tokens=text + self.shape.extra_text_tokens,
        )

    def weights(self, *, element_bytes: int = HALF_PRECISION_BYTES, quantized: bool = False) -> WeightBytes:
        """What transformers and autoencoder take on a GPU in this precision; `quantized`: their blocks' matrices, which
        are what ranks share, in eight bits."""

        def size(name: str) -> int:
            return self.parameters[name] * self.element_bytes(name, element_bytes)

        transformers = sum(size(name) for name in self.parameters if name in _TRANSFORMERS)
        share = self.shape.shared_parameters / self.shape.num_parameters
        shared = share * transformers
        if quantized or self.is_quantized:
            shared *= QUANTIZED_BYTES / element_bytes
        return WeightBytes(
            shared=shared,
            whole=(1 - share) * transformers,
            autoencoder=size(_AUTOENCODER) if _AUTOENCODER in self.parameters else 0,
        )

    def encoder_bytes(
        self, layout: ReplicaShape, *, element_bytes: int = HALF_PRECISION_BYTES, wish: str = "auto"
    ) -> float:
        """What the encoders take on each GPU of a layout; `wish` is what `--encoder-parallel` says."""
        found = 0.0
        for encoder in self.encoders:
            width = self.element_bytes(encoder.name, element_bytes)
            found += width * encoder.parameters_on_each(layout, element_bytes=width, wish=wish)
        return found

    def element_bytes(self, component: str, element_bytes: int) -> int:
        """Of a weight of the component, in a precision whose weights take `element_bytes`."""
        return _FP32_BYTES if component in self.config.fp32_components else element_bytes


def outline_of(resolved: ResolvedModel) -> ModelOutline:
    """Of the embedded model, a local directory, or a hub id whose configs ship with us; nothing is downloaded.

    Raises:
        UnsupportedModel: its transformer is not known before the checkpoint is read, or at all.
        CorruptCheckpoint: a file of the checkpoint cannot be read.
    """
    directory = _directory_of(resolved)
    config = None if resolved.entry is None else load_config(resolved.entry)
    if directory is None or config is None or config.transformer is None:
        raise UnsupportedModel(
            f"model_path: {shown(resolved.hub_id or resolved.name)} has no transformer whose configs are known before "
            "it loads; accepted here are an id that `sglang models` lists, a local directory of such a model, or demo",
            param="model_path",
        )
    transformer = read_json_object(directory / "transformer" / "config.json")
    try:
        shape = config.transformer.from_dict(transformer).shape
    except InvalidRequest as error:
        raise UnsupportedModel(f"transformer/config.json: {error.message}", param="model_path") from error
    sizes = _parameters(resolved, directory, shape)
    return ModelOutline(
        name=resolved.hub_id or resolved.name,
        shape=shape,
        parameters=sizes,
        encoders=tuple(
            _encoder(directory, name, sizes[name]) for name in sizes if name not in (*_TRANSFORMERS, _AUTOENCODER)
        ),
        config=config,
        defaults=resolved.defaults,
        is_quantized=CONFIG_KEY in transformer,
    )


def _encoder(directory: Path, name: str, num_parameters: int) -> EncoderOutline:
    config = directory / name / "config.json"
    return outline_encoder(name, read_json_object(config) if config.is_file() else {}, num_parameters)


def _directory_of(resolved: ResolvedModel) -> Path | None:
    """Where its configs are: its own directory, or that of a published model with the same architecture."""
    if resolved.local_path is not None or resolved.entry is None:
        return resolved.local_path
    shipped = {hub_id.lower(): hub_id for hub_id in published_ids()}
    names = (resolved.hub_id or "", *resolved.entry.hub_ids)
    return next((published_directory(name) for name in names if name.lower() in shipped), None)


def _parameters(resolved: ResolvedModel, directory: Path, shape: TransformerShape) -> dict[str, int]:
    """Stored ones where there are weights; else the transformers' by their shape, the others' as published."""
    assert resolved.entry is not None, "it has a config"
    index = read_model_index(directory) if (directory / MODEL_INDEX).is_file() else {}
    listed = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    published = component_parameters(resolved.hub_id, resolved.entry) or {}
    known = {name: published[name] for name in listed if name in published}
    known |= {name: shape.num_parameters for name in listed if name in _TRANSFORMERS}
    return known | stored_component_parameters(directory)
