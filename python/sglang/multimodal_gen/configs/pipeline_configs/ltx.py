"""Sampling defaults of the published LTX-Video checkpoints. Source: https://github.com/Lightricks/LTX-Video"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.models.dits.ltx import LTXVideoTransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.teacache import TeaCacheFit

# The largest size and length that the family's cards show: 1216x704 and 257 frames, with room for upright and wide.
_MAX_PIXELS = 1280 * 1280
_MAX_FRAMES = 257


@dataclass(frozen=True, kw_only=True)
class LTXPipelineConfig(PipelineConfig):
    """What differs between the releases beside sizes."""

    sigmas: tuple[float, ...] = ()
    """The noise levels that a distilled model was trained for; used when a request has as many steps."""


_FIRST_DEFAULTS = SamplingParams(
    width=704,
    height=512,
    num_frames=161,
    fps=25,
    num_inference_steps=50,
    guidance_scale=3.0,
    guidance_rescale=0.0,
    max_sequence_length=128,
)
_TIMED_DEFAULTS = dataclasses.replace(_FIRST_DEFAULTS, decode_timestep=0.05, decode_noise_scale=0.025)
_CONDITION_DEFAULTS = dataclasses.replace(_FIRST_DEFAULTS, image_cond_noise_scale=0.15, max_sequence_length=256)

# What diffusers does with a checkpoint that is none of the published ones.
LTX_VIDEO = LTXPipelineConfig(
    tasks=("T2V", "I2V"),
    defaults=_FIRST_DEFAULTS,
    max_pixels=_MAX_PIXELS,
    max_frames=_MAX_FRAMES,
    max_sequence_length=128,
    transformer=LTXVideoTransformerConfig,
    temporal_ratio=8,
    spatial_ratio=32,
    # Source: https://github.com/ali-vilab/TeaCache, TeaCache4LTX-Video, the faster threshold.
    teacache=TeaCacheFit(
        coefficients=(21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326), threshold=0.05
    ),
)
LTX_IMAGE_TO_VIDEO = dataclasses.replace(LTX_VIDEO, tasks=("I2V",))
LTX_VIDEO_0_9_1 = dataclasses.replace(LTX_VIDEO, defaults=_TIMED_DEFAULTS)
LTX_CONDITION = dataclasses.replace(LTX_VIDEO, defaults=_CONDITION_DEFAULTS, max_sequence_length=256, teacache=None)
LTX_VIDEO_0_9_5 = dataclasses.replace(
    LTX_CONDITION,
    defaults=dataclasses.replace(_CONDITION_DEFAULTS, decode_timestep=0.05, decode_noise_scale=0.025),
)
LTX_VIDEO_DISTILLED = dataclasses.replace(
    LTX_VIDEO_0_9_5,
    defaults=dataclasses.replace(
        LTX_VIDEO_0_9_5.defaults, num_inference_steps=8, guidance_scale=1.0, image_cond_noise_scale=0.0
    ),
    sigmas=(1.0, 0.993, 0.987, 0.981, 0.975, 0.909, 0.725, 0.00003),
)

_PIPELINES = "sglang.multimodal_gen.runtime.pipelines.ltx"
_LICENCE = "LTX-Video Open Weights"

ENTRIES = (
    ModelEntry(
        name="ltx-video",
        pipeline=f"{_PIPELINES}:LTXPipeline",
        config=f"{__name__}:LTX_VIDEO",
        pipeline_class_names=("LTXPipeline",),
        hub_ids=("Lightricks/LTX-Video",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="ltx-video-i2v",
        pipeline=f"{_PIPELINES}:LTXImageToVideoPipeline",
        config=f"{__name__}:LTX_IMAGE_TO_VIDEO",
        pipeline_class_names=("LTXImageToVideoPipeline",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="ltx-video-0.9.1",
        pipeline=f"{_PIPELINES}:LTXPipeline",
        config=f"{__name__}:LTX_VIDEO_0_9_1",
        pipeline_class_names=("LTXPipeline",),
        hub_ids=("a-r-r-o-w/LTX-Video-0.9.1-diffusers",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="ltx-video-condition",
        pipeline=f"{_PIPELINES}:LTXConditionPipeline",
        config=f"{__name__}:LTX_CONDITION",
        pipeline_class_names=("LTXConditionPipeline",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="ltx-video-0.9.5",
        pipeline=f"{_PIPELINES}:LTXConditionPipeline",
        config=f"{__name__}:LTX_VIDEO_0_9_5",
        pipeline_class_names=("LTXConditionPipeline",),
        hub_ids=("Lightricks/LTX-Video-0.9.5", "Lightricks/LTX-Video-0.9.7-dev"),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="ltx-video-distilled",
        pipeline=f"{_PIPELINES}:LTXConditionPipeline",
        config=f"{__name__}:LTX_VIDEO_DISTILLED",
        pipeline_class_names=("LTXConditionPipeline",),
        hub_ids=("Lightricks/LTX-Video-0.9.7-distilled", "Lightricks/LTX-Video-0.9.8-13B-distilled"),
        licence=_LICENCE,
    ),
)
