"""Defaults of the family that does nothing; see runtime/pipelines/null.py."""

from __future__ import annotations

from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams

NULL = PipelineConfig(
    tasks=("T2V",),
    defaults=SamplingParams(width=16, height=16, num_frames=5, fps=8, num_inference_steps=4, guidance_scale=1.0),
    max_pixels=1 << 20,
    max_frames=1001,
)
