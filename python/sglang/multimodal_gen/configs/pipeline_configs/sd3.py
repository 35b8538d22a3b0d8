"""Sampling defaults of the published Stable Diffusion 3 and 3.5 checkpoints.

Source: https://github.com/Stability-AI/sd3.5, and the cards of the checkpoints.
"""

from __future__ import annotations

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.models.dits.sd3 import SD3TransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams


def _config(*, steps: int, guidance_scale: float) -> PipelineConfig:
    return PipelineConfig(
        tasks=("T2I", "I2I"),
        defaults=SamplingParams(
            width=1024,
            height=1024,
            num_frames=1,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=256,
            skip_layer_guidance_scale=2.8,
            skip_layer_guidance_start=0.01,
            skip_layer_guidance_stop=0.2,
        ),
        max_pixels=2048 * 2048,
        max_sequence_length=512,
        transformer=SD3TransformerConfig,
    )


SD3_MEDIUM = _config(steps=28, guidance_scale=7.0)
SD35_MEDIUM = _config(steps=40, guidance_scale=4.5)
SD35_LARGE = _config(steps=28, guidance_scale=3.5)
SD35_LARGE_TURBO = _config(steps=4, guidance_scale=0.0)


def _entry(name: str, config: str, hub_id: str) -> ModelEntry:
    return ModelEntry(
        name=name,
        pipeline="sglang.multimodal_gen.runtime.pipelines.sd3:StableDiffusion3Pipeline",
        config=f"{__name__}:{config}",
        pipeline_class_names=("StableDiffusion3Pipeline",),
        hub_ids=(hub_id,),
        licence="Stability AI Community",
    )


ENTRIES = (
    _entry("sd3-medium", "SD3_MEDIUM", "stabilityai/stable-diffusion-3-medium-diffusers"),
    _entry("sd3.5-medium", "SD35_MEDIUM", "stabilityai/stable-diffusion-3.5-medium"),
    _entry("sd3.5-large", "SD35_LARGE", "stabilityai/stable-diffusion-3.5-large"),
    _entry("sd3.5-large-turbo", "SD35_LARGE_TURBO", "stabilityai/stable-diffusion-3.5-large-turbo"),
)
