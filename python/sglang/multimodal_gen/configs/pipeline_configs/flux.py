"""Sampling defaults of the published FLUX.1 checkpoints. Source: https://github.com/black-forest-labs/flux"""

from __future__ import annotations

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.models.dits.flux import FluxTransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.teacache import TeaCacheFit

_MAX_PIXELS = 2048 * 2048

# Source: https://github.com/ali-vilab/TeaCache, TeaCache4FLUX, the middle threshold.
_TEACACHE_DEV = TeaCacheFit(coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), threshold=0.4)

FLUX1_DEV = PipelineConfig(
    tasks=("T2I", "I2I"),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=28,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=512,
    transformer=FluxTransformerConfig,
    guided_by=("true_cfg_scale",),
    guided_by_negative_prompts_alone=True,
    teacache=_TEACACHE_DEV,
)

FLUX1_SCHNELL = PipelineConfig(
    tasks=("T2I", "I2I"),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=4,
        guidance_scale=0.0,
        true_cfg_scale=1.0,
        max_sequence_length=256,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=512,
    transformer=FluxTransformerConfig,
    guided_by=("true_cfg_scale",),
    guided_by_negative_prompts_alone=True,
)

FLUX1_KONTEXT = PipelineConfig(
    tasks=("TI2I", "T2I"),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=28,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        max_sequence_length=512,
        auto_resize=True,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=512,
    transformer=FluxTransformerConfig,
    reference_images=1,
    guided_by=("true_cfg_scale",),
    guided_by_negative_prompts_alone=True,
)

FLUX1_FILL = PipelineConfig(
    tasks=("I2I",),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=50,
        guidance_scale=30.0,
        strength=1.0,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=512,
    transformer=FluxTransformerConfig,
    guided_by=("true_cfg_scale",),
    guided_by_negative_prompts_alone=True,
)

_PIPELINE = "sglang.multimodal_gen.runtime.pipelines.flux:FluxPipeline"
_EDIT = "sglang.multimodal_gen.runtime.pipelines.flux_edit"
_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial"

ENTRIES = (
    ModelEntry(
        name="flux.1-dev",
        pipeline=_PIPELINE,
        config=f"{__name__}:FLUX1_DEV",
        pipeline_class_names=("FluxPipeline",),
        hub_ids=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev"),
        licence=_DEV_LICENCE,
    ),
    ModelEntry(
        name="flux.1-schnell",
        pipeline=_PIPELINE,
        config=f"{__name__}:FLUX1_SCHNELL",
        pipeline_class_names=("FluxPipeline",),
        hub_ids=("black-forest-labs/FLUX.1-schnell",),
        licence="Apache-2.0",
    ),
    ModelEntry(
        name="flux.1-kontext",
        pipeline=f"{_EDIT}:FluxKontextPipeline",
        config=f"{__name__}:FLUX1_KONTEXT",
        pipeline_class_names=("FluxKontextPipeline",),
        hub_ids=("black-forest-labs/FLUX.1-Kontext-dev",),
        licence=_DEV_LICENCE,
    ),
    ModelEntry(
        name="flux.1-fill",
        pipeline=f"{_EDIT}:FluxFillPipeline",
        config=f"{__name__}:FLUX1_FILL",
        pipeline_class_names=("FluxFillPipeline",),
        hub_ids=("black-forest-labs/FLUX.1-Fill-dev",),
        licence=_DEV_LICENCE,
    ),
)
