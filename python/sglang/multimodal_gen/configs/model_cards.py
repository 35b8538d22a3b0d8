"""What is known of each published model before it is loaded: for `sglang models` and the docs' table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen.configs.component_sizes import component_parameters, stored_parameters
from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.registry import EMBEDDED_MODEL, entries, get_model_info, load_config

_BYTES_PER_PARAMETER = 2  # bf16, as GPUs compute
_FP32_BYTES = 4
# Activations of one request at the default size, and what the CUDA libraries hold.
_WORKING_BYTES = 3 * 2**30
_TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One model that the registry resolves natively. Sizes are None where no config of the checkpoint is known.

    `num_parameters` counts all components, `transformer_parameters` what runs at every step. `weight_bytes` is what the
    weights take on a GPU, `gpu_bytes` the least memory of a GPU that holds all of them and works.
    """

    id: str
    family: str
    pipeline_class: str
    tasks: tuple[str, ...]
    num_parameters: int | None
    transformer_parameters: int | None
    weight_bytes: int | None
    gpu_bytes: int | None
    licence: str
    defaults: SamplingParams
    config: PipelineConfig

    def as_dict(self) -> dict[str, Any]:
        """As plain data, under the names of /v1/models."""
        return {
            "id": self.id,
            "family": self.family,
            "pipeline_class": self.pipeline_class,
            "tasks": list(self.tasks),
            "num_parameters": self.num_parameters,
            "transformer_parameters": self.transformer_parameters,
            "weight_bytes": self.weight_bytes,
            "gpu_bytes": self.gpu_bytes,
            "licence": self.licence,
        }


def cards() -> tuple[ModelCard, ...]:
    """The embedded model, then every hub id with a native pipeline, family by family."""
    published = [entry for entry in entries() if entry.needs_checkpoint]
    return (_embedded(), *(_card(hub_id, entry) for entry in published for hub_id in entry.hub_ids))


def find_card(name: str) -> ModelCard | None:
    """The model with this id, whose letter case does not matter."""
    return next((card for card in cards() if card.id.lower() == name.lower()), None)


def _embedded() -> ModelCard:
    resolved = get_model_info(EMBEDDED_MODEL)
    assert resolved.entry is not None and resolved.local_path is not None, "it is a directory of the package"
    files = sorted(resolved.local_path.glob("*/*.safetensors"))
    sizes = {path.parent.name: stored_parameters(path) for path in files}
    weight_bytes, config = sum(path.stat().st_size for path in files), load_config(resolved.entry)
    return ModelCard(
        id=EMBEDDED_MODEL,
        family=resolved.entry.name,
        pipeline_class=resolved.entry.pipeline.rpartition(":")[2],
        tasks=config.tasks,
        num_parameters=sum(sizes.values()),
        transformer_parameters=sizes["transformer"],
        weight_bytes=weight_bytes,
        gpu_bytes=weight_bytes + _WORKING_BYTES // 2,
        licence="Apache-2.0",
        defaults=resolved.defaults,
        config=config,
    )


def _card(hub_id: str, entry: ModelEntry) -> ModelCard:
    config, sizes = load_config(entry), component_parameters(hub_id, entry)
    weight_bytes = None
    if sizes is not None:
        weight_bytes = sum(
            count * (_FP32_BYTES if name in config.fp32_components else _BYTES_PER_PARAMETER)
            for name, count in sizes.items()
        )
    return ModelCard(
        id=hub_id,
        family=entry.name,
        pipeline_class=entry.pipeline.rpartition(":")[2],
        tasks=config.tasks,
        num_parameters=None if sizes is None else sum(sizes.values()),
        transformer_parameters=None if sizes is None else sum(sizes.get(name, 0) for name in _TRANSFORMERS),
        weight_bytes=weight_bytes,
        gpu_bytes=None if weight_bytes is None else weight_bytes + _WORKING_BYTES,
        licence=entry.licence,
        defaults=config.defaults,
        config=config,
    )
