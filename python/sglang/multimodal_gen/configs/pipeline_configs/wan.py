"""Sampling defaults of the published Wan text-to-video checkpoints. Source: https://github.com/Wan-Video/Wan2.1"""

from __future__ import annotations

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams

NEGATIVE_PROMPT = (
    "overexposed, garish colours, blurry, washed out, motionless, frozen frame, subtitles, watermark, painting, "
    "low quality, compression artefacts, ugly, malformed hands, malformed faces, deformed limbs, extra fingers, "
    "fused fingers, cluttered background, crowd in the background, walking backwards"
)

_MAX_PIXELS = 1920 * 1088
# 64 seconds; the rotary table would allow 4093 frames, but nothing was trained near that.
_MAX_FRAMES = 1025

WAN21_T2V_1_3B = PipelineConfig(
    tasks=("T2V", "T2I"),
    defaults=SamplingParams(
        width=832,
        height=480,
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        guidance_scale=3.0,
        negative_prompt=NEGATIVE_PROMPT,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_frames=_MAX_FRAMES,
    # In bf16 the autoencoder bands smooth gradients; it is a small part of the weights.
    fp32_components=("vae",),
)

WAN21_T2V_14B = PipelineConfig(
    tasks=("T2V", "T2I"),
    defaults=SamplingParams(
        width=1280,
        height=720,
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        guidance_scale=5.0,
        flow_shift=5.0,
        negative_prompt=NEGATIVE_PROMPT,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_frames=_MAX_FRAMES,
    fp32_components=("vae",),
)

# A checkpoint of the architecture that is none of the published ones: size and length are the small model's, the rest
# is what diffusers would do.
WAN21_T2V = PipelineConfig(
    tasks=("T2V", "T2I"),
    defaults=SamplingParams(
        width=832,
        height=480,
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        guidance_scale=5.0,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_frames=_MAX_FRAMES,
    fp32_components=("vae",),
)

_PIPELINE = "sglang.multimodal_gen.runtime.pipelines.wan:WanPipeline"
_LICENCE = "Apache-2.0"

ENTRIES = (
    ModelEntry(
        name="wan2.1-t2v",
        pipeline=_PIPELINE,
        config=f"{__name__}:WAN21_T2V",
        pipeline_class_names=("WanPipeline",),
    ),
    ModelEntry(
        name="wan2.1-t2v-1.3b",
        pipeline=_PIPELINE,
        config=f"{__name__}:WAN21_T2V_1_3B",
        pipeline_class_names=("WanPipeline",),
        hub_ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="wan2.1-t2v-14b",
        pipeline=_PIPELINE,
        config=f"{__name__}:WAN21_T2V_14B",
        pipeline_class_names=("WanPipeline",),
        hub_ids=("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
        licence=_LICENCE,
    ),
)
