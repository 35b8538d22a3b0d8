"""The pipeline that a worker runs: `build_pipeline` makes it from a model path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sglang.multimodal_gen.configs.memory_args import MemoryArgs
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.registry import ResolvedModel, get_model_info, load_object, with_checkpoint
from sglang.multimodal_gen.runtime.loader.hub import ensure_local
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import (
    ComposedPipelineBase,
    Join,
    alone,
)
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, ModelArgs

__all__ = ["ComposedPipelineBase", "build_pipeline", "find_pipeline"]


def build_pipeline(
    model: str | ModelArgs | ResolvedModel,
    execution: ExecutionArgs | None = None,
    *,
    memory: MemoryArgs | None = None,
    local_rank: int = 0,
    num_gpus: int = 1,
    join: Join = alone,
    sized: SamplingParams | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> ComposedPipelineBase:
    """The loaded pipeline of a model path, downloaded first when it is a hub id.

    `report` hears what is being done and each choice that was made for the user. `join` meets the other ranks of the
    replica, once the device is known. `sized`: the largest requests to leave room for, if not of the model's own size.

    Raises: ModelError or InvalidRequest with one sentence on what cannot be found, read or done.
    """
    model_args = ModelArgs(model_path=model) if isinstance(model, str) else model
    random_weights = isinstance(model_args, ModelArgs) and model_args.random_weights
    resolved, pipeline_class = find_pipeline(model_args, report=report)
    if random_weights:
        report("weights: random numbers, so what is generated means nothing")
    return pipeline_class.load(
        resolved,
        execution or ExecutionArgs(),
        memory=memory or MemoryArgs(),
        local_rank=local_rank,
        num_gpus=num_gpus,
        join=join,
        sized=sized,
        random_weights=random_weights,
        report=report,
    )


def find_pipeline(
    model: ModelArgs | ResolvedModel, *, report: Callable[[str], None] = lambda _: None
) -> tuple[ResolvedModel, type[ComposedPipelineBase]]:
    """The model with its directory, downloaded first when it is a hub id with weights, and the class that loads it.

    Raises: as `build_pipeline`.
    """
    revision, random_weights, resolved = None, False, model
    if isinstance(model, ModelArgs):
        revision, random_weights = model.revision, model.random_weights
        resolved = get_model_info(model.model_path, model_id=model.model_id, backend=model.backend)
    assert isinstance(resolved, ResolvedModel)
    if resolved.needs_download:
        resolved = with_checkpoint(resolved, _directory(resolved, revision, random_weights, report))
    assert resolved.entry is not None, "a checkpoint on disk has an entry or was refused"
    pipeline_class = load_object(resolved.entry.pipeline)
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, ComposedPipelineBase)):
        raise UnsupportedModel(f"{resolved.entry.pipeline} is registered but no ComposedPipelineBase")
    return resolved, pipeline_class


def _directory(
    resolved: ResolvedModel, revision: str | None, random_weights: bool, report: Callable[[str], None]
) -> Path:
    """The configs of a hub id, with its weights unless they are random."""
    if random_weights:
        assert resolved.hub_id is not None, "a model without a directory is one of the hub"
        return published_directory(resolved.hub_id)
    return ensure_local(resolved, revision, report=report)
