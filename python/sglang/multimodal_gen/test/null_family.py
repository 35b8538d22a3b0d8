"""A do-nothing family: no checkpoint, no tensors of size, every unit returns at once. Measures the engine alone.

Registered with `register_configs` and nothing else. The prompt steers faults: `sleep MS`, `fail`, `fail-alone`, `exit`,
`hang` act in the denoising unit named after them, `exit-once PATH` only while PATH does not exist.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang.multimodal_gen.configs.model_info import ModelInfo, TaskLimits
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.registry import register_configs
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

NULL_CONFIG = PipelineConfig(
    tasks=("T2V",),
    defaults=SamplingParams(width=16, height=16, num_frames=5, fps=8, num_inference_steps=4, guidance_scale=1.0),
    max_pixels=1 << 20,
    max_frames=1001,
)


def register() -> None:
    """Make `null-model` known in this process and, through the engine's configuration, in its workers."""
    register_configs(
        name="null",
        pipeline="sglang.multimodal_gen.test.null_family:NullPipeline",
        config="sglang.multimodal_gen.test.null_family:NULL_CONFIG",
        pipeline_class_names=("NullPipeline",),
        hub_ids=("null-model",),
        needs_checkpoint=False,
    )
