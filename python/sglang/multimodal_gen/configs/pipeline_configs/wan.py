"""Sampling defaults of the published Wan checkpoints.

Source: https://github.com/Wan-Video/Wan2.1, https://github.com/Wan-Video/Wan2.2
"""

from __future__ import annotations

from dataclasses import replace

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.teacache import TeaCacheFit

NEGATIVE_PROMPT = (
    "overexposed, garish colours, blurry, washed out, motionless, frozen frame, subtitles, watermark, painting, "
    "low quality, compression artefacts, ugly, malformed hands, malformed faces, deformed limbs, extra fingers, "
    "fused fingers, cluttered background, crowd in the background, walking backwards"
)

_MAX_PIXELS = 1920 * 1088
# 64 seconds; the rotary table would allow 4093 frames, but nothing was trained near that.
_MAX_FRAMES = 1025

# A small part of the weights, and published in fp32. So is the autoencoder, but docs/decisions/0016 says why it is not.
_FP32_COMPONENTS = ("image_encoder",)


def _config(
    defaults: SamplingParams, *tasks: str, spatial_ratio: int = 8, teacache: TeaCacheFit | None = None
) -> PipelineConfig:
    return PipelineConfig(
        tasks=tasks,
        defaults=defaults,
        max_pixels=_MAX_PIXELS,
        max_frames=_MAX_FRAMES,
        fp32_components=_FP32_COMPONENTS,
        transformer=WanTransformerConfig,
        temporal_ratio=4,
        spatial_ratio=spatial_ratio,
        teacache=teacache,
    )


# A checkpoint of the architecture that is none of the published ones: size and length are the small model's, the rest
# is what diffusers would do.
_UNNAMED = SamplingParams(
    width=832, height=480, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0, max_sequence_length=512
)
_AT_480P = replace(_UNNAMED, negative_prompt=NEGATIVE_PROMPT)
_AT_720P = replace(_AT_480P, width=1280, height=720)

# One frame is an image; a clip or an image may stand at the start instead of noise alone.
_FROM_TEXT = ("T2V", "T2I", "V2V", "I2I")

# Source: https://github.com/ali-vilab/TeaCache, TeaCache4Wan2.1, the faster threshold of each.
_TEACACHE_1_3B = TeaCacheFit(
    coefficients=(2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    modulation_coefficients=(-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    threshold=0.08,
)
_TEACACHE_14B = TeaCacheFit(
    coefficients=(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    modulation_coefficients=(-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    threshold=0.2,
)
_TEACACHE_I2V_480P = TeaCacheFit(
    coefficients=(-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    modulation_coefficients=(257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    threshold=0.26,
)
_TEACACHE_I2V_720P = TeaCacheFit(
    coefficients=(-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    modulation_coefficients=(8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
    threshold=0.3,
)

WAN21_T2V = _config(_UNNAMED, *_FROM_TEXT)
WAN21_T2V_1_3B = _config(replace(_AT_480P, guidance_scale=3.0), *_FROM_TEXT, teacache=_TEACACHE_1_3B)
WAN21_T2V_14B = _config(replace(_AT_720P, flow_shift=5.0), *_FROM_TEXT, teacache=_TEACACHE_14B)
WAN22_T2V_A14B = _config(
    replace(_AT_720P, num_inference_steps=40, guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0),
    *_FROM_TEXT,
)

WAN_I2V = _config(_UNNAMED, "I2V")
WAN21_I2V_480P = _config(replace(_AT_480P, flow_shift=3.0), "I2V", teacache=_TEACACHE_I2V_480P)
WAN21_I2V_720P = _config(replace(_AT_720P, flow_shift=5.0), "I2V", teacache=_TEACACHE_I2V_720P)
# First and last frame. The shift in the checkpoint, 16, is the one that it is sampled with.
WAN21_FLF2V_720P = _config(_AT_720P, "I2V")
WAN21_FUN_INP_1_3B = _config(_AT_480P, "I2V")
WAN22_I2V_A14B = _config(
    replace(_AT_720P, num_inference_steps=40, guidance_scale=3.5, guidance_scale_2=3.5, flow_shift=5.0), "I2V"
)

# With a picture or without.
WAN22_TI2V_5B = _config(
    replace(_AT_720P, height=704, num_frames=121, fps=24, flow_shift=5.0),
    "TI2V",
    "T2V",
    "I2V",
    "T2I",
    spatial_ratio=16,
)

_PIPELINES = "sglang.multimodal_gen.runtime.pipelines"
_TEXT = f"{_PIPELINES}.wan:WanPipeline"
_IMAGE = f"{_PIPELINES}.wan_image_to_video:WanImageToVideoPipeline"
_TEXT_IMAGE = f"{_PIPELINES}.wan_text_image_to_video:WanTextImageToVideoPipeline"
_LICENCE = "Apache-2.0"


def _text_to_video(name: str, config: str, *hub_ids: str, requires: tuple[str, ...] = ()) -> ModelEntry:
    return ModelEntry(
        name=name,
        pipeline=_TEXT,
        config=f"{__name__}:{config}",
        pipeline_class_names=("WanPipeline",),
        requires=requires,
        hub_ids=hub_ids,
        licence=_LICENCE if hub_ids else "",
    )


def _image_to_video(name: str, config: str, *hub_ids: str, requires: tuple[str, ...] = ()) -> ModelEntry:
    return ModelEntry(
        name=name,
        pipeline=_IMAGE,
        config=f"{__name__}:{config}",
        pipeline_class_names=("WanImageToVideoPipeline",),
        requires=requires,
        hub_ids=hub_ids,
        licence=_LICENCE if hub_ids else "",
    )


_CLIP, _EXPERTS = ("image_encoder",), ("transformer_2",)
ENTRIES = (
    _text_to_video("wan2.1-t2v", "WAN21_T2V"),
    _text_to_video("wan2.1-t2v-1.3b", "WAN21_T2V_1_3B", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    _text_to_video("wan2.1-t2v-14b", "WAN21_T2V_14B", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    _text_to_video("wan2.2-t2v-a14b", "WAN22_T2V_A14B", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", requires=_EXPERTS),
    _image_to_video("wan-i2v", "WAN_I2V"),
    _image_to_video("wan2.1-i2v", "WAN_I2V", requires=_CLIP),
    _image_to_video("wan2.1-i2v-480p", "WAN21_I2V_480P", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", requires=_CLIP),
    _image_to_video("wan2.1-i2v-720p", "WAN21_I2V_720P", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", requires=_CLIP),
    _image_to_video("wan2.1-flf2v-720p", "WAN21_FLF2V_720P", "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", requires=_CLIP),
    _image_to_video(
        "wan2.1-fun-inp-1.3b", "WAN21_FUN_INP_1_3B", "weizhou03/Wan2.1-Fun-1.3B-InP-Diffusers", requires=_CLIP
    ),
    _image_to_video("wan2.2-i2v-a14b", "WAN22_I2V_A14B", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", requires=_EXPERTS),
    ModelEntry(
        name="wan2.2-ti2v-5b",
        pipeline=_TEXT_IMAGE,
        config=f"{__name__}:WAN22_TI2V_5B",
        # diffusers has two pipelines for one checkpoint, and either may have saved it.
        pipeline_class_names=("WanPipeline", "WanImageToVideoPipeline"),
        requires=("expand_timesteps",),
        hub_ids=("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
        licence=_LICENCE,
    ),
)
