"""Sampling defaults of the published Z-Image checkpoints. Source: https://github.com/Tongyi-MAI/Z-Image"""

from __future__ import annotations

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.models.dits.zimage import ZImageTransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams

_MAX_PIXELS = 2048 * 2048

Z_IMAGE = PipelineConfig(
    tasks=("T2I", "I2I"),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=50,
        guidance_scale=5.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=512,
    transformer=ZImageTransformerConfig,
    guided_above=0.0,
)

Z_IMAGE_TURBO = PipelineConfig(
    tasks=("T2I", "I2I"),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=9,
        guidance_scale=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=512,
    transformer=ZImageTransformerConfig,
    guided_above=0.0,
)

_PIPELINE = "sglang.multimodal_gen.runtime.pipelines.zimage:ZImagePipeline"

ENTRIES = (
    ModelEntry(
        name="zimage",
        pipeline=_PIPELINE,
        config=f"{__name__}:Z_IMAGE",
        pipeline_class_names=("ZImagePipeline",),
        hub_ids=("Tongyi-MAI/Z-Image",),
        licence="Apache-2.0",
    ),
    ModelEntry(
        name="zimage-turbo",
        pipeline=_PIPELINE,
        config=f"{__name__}:Z_IMAGE_TURBO",
        pipeline_class_names=("ZImagePipeline",),
        hub_ids=("Tongyi-MAI/Z-Image-Turbo",),
        licence="Apache-2.0",
    ),
)
