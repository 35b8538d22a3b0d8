"""Sampling defaults of the published HunyuanVideo checkpoints. Source: https://github.com/Tencent/HunyuanVideo"""

from __future__ import annotations

import dataclasses

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.teacache import TeaCacheFit

_MAX_PIXELS = 1920 * 1088
# Twice the length that the model was trained with.
_MAX_FRAMES = 257

HUNYUAN_VIDEO_T2V = PipelineConfig(
    tasks=("T2V", "T2I"),
    defaults=SamplingParams(
        width=1280,
        height=720,
        num_frames=129,
        fps=24,
        num_inference_steps=50,
        guidance_scale=6.0,
        true_cfg_scale=1.0,
        max_sequence_length=256,
    ),
    max_pixels=_MAX_PIXELS,
    max_frames=_MAX_FRAMES,
    max_sequence_length=256,
    transformer=HunyuanVideoTransformerConfig,
    temporal_ratio=4,
    guided_by=("true_cfg_scale",),
    guided_by_negative_prompts_alone=True,
    # Source: https://github.com/ali-vilab/TeaCache, TeaCache4HunyuanVideo, the faster threshold.
    teacache=TeaCacheFit(coefficients=(733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896), threshold=0.15),
)

FAST_HUNYUAN = dataclasses.replace(
    HUNYUAN_VIDEO_T2V,
    defaults=dataclasses.replace(HUNYUAN_VIDEO_T2V.defaults, num_frames=125, num_inference_steps=6, flow_shift=17.0),
    teacache=None,
)

HUNYUAN_VIDEO_I2V = dataclasses.replace(HUNYUAN_VIDEO_T2V, tasks=("I2V",), teacache=None)

# The transformer with 33 channels is told no guidance scale. It makes four frames more than the clip has.
HUNYUAN_VIDEO_I2V_33CH = dataclasses.replace(
    HUNYUAN_VIDEO_I2V,
    defaults=dataclasses.replace(HUNYUAN_VIDEO_I2V.defaults, num_frames=125, guidance_scale=1.0),
)

SKYREELS_V1_I2V = dataclasses.replace(
    HUNYUAN_VIDEO_I2V,
    defaults=dataclasses.replace(
        HUNYUAN_VIDEO_I2V.defaults,
        width=960,
        height=544,
        num_frames=97,
        guidance_scale=1.0,
        true_cfg_scale=6.0,
    ),
)

_MODULE = "sglang.multimodal_gen.runtime.pipelines"
_LICENCE = "Tencent Hunyuan Community"

ENTRIES = (
    ModelEntry(
        name="hunyuan-video",
        pipeline=f"{_MODULE}.hunyuan_video:HunyuanVideoPipeline",
        config=f"{__name__}:HUNYUAN_VIDEO_T2V",
        pipeline_class_names=("HunyuanVideoPipeline",),
        hub_ids=("hunyuanvideo-community/HunyuanVideo",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="hunyuan-video-fast",
        pipeline=f"{_MODULE}.hunyuan_video:HunyuanVideoPipeline",
        config=f"{__name__}:FAST_HUNYUAN",
        pipeline_class_names=("HunyuanVideoPipeline",),
        hub_ids=("FastVideo/FastHunyuan-diffusers",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="hunyuan-video-i2v",
        pipeline=f"{_MODULE}.hunyuan_video_image:HunyuanVideoImageToVideoPipeline",
        config=f"{__name__}:HUNYUAN_VIDEO_I2V",
        pipeline_class_names=("HunyuanVideoImageToVideoPipeline",),
        hub_ids=("hunyuanvideo-community/HunyuanVideo-I2V",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="hunyuan-video-i2v-33ch",
        pipeline=f"{_MODULE}.hunyuan_video_image:HunyuanVideoImageToVideoPipeline",
        config=f"{__name__}:HUNYUAN_VIDEO_I2V_33CH",
        pipeline_class_names=("HunyuanVideoImageToVideoPipeline",),
        hub_ids=("hunyuanvideo-community/HunyuanVideo-I2V-33ch",),
        licence=_LICENCE,
    ),
    # The hub has its transformer alone; saved with HunyuanVideo's other components it is a checkpoint of this class.
    ModelEntry(
        name="skyreels-v1-i2v",
        pipeline=f"{_MODULE}.hunyuan_video_image:HunyuanSkyreelsImageToVideoPipeline",
        config=f"{__name__}:SKYREELS_V1_I2V",
        pipeline_class_names=("HunyuanSkyreelsImageToVideoPipeline",),
        licence=_LICENCE,
    ),
)
