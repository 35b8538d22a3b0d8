"""Sampling defaults of the published Qwen-Image checkpoints. Source: https://github.com/QwenLM/Qwen-Image"""

from __future__ import annotations

from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams

_MAX_PIXELS = 2048 * 2048
# Of the chat that asks for an edit nothing is cut but a prompt beyond this, which no release was trained with.
_MAX_TEXT_TOKENS = 1024
# The model cards guide with a blank, which costs a second forward at each step.
_BLANK = " "
_NEGATIVE_2512 = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
    "构图混乱。文字模糊，扭曲。"
)

QWEN_IMAGE = PipelineConfig(
    tasks=("T2I", "I2I"),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=50,
        guidance_scale=4.0,
        negative_prompt=_BLANK,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=_MAX_TEXT_TOKENS,
    transformer=QwenImageTransformerConfig,
    guided_by=("true_cfg_scale", "guidance_scale"),
    guided_by_negative_prompts_alone=True,
)

QWEN_IMAGE_2512 = PipelineConfig(
    tasks=("T2I", "I2I"),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=50,
        guidance_scale=4.0,
        negative_prompt=_NEGATIVE_2512,
        max_sequence_length=512,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=_MAX_TEXT_TOKENS,
    transformer=QwenImageTransformerConfig,
    guided_by=("true_cfg_scale", "guidance_scale"),
    guided_by_negative_prompts_alone=True,
)

QWEN_IMAGE_EDIT = PipelineConfig(
    tasks=("TI2I",),
    # Where a request says no size, its picture does; this one is for requests that are made up, such as a warm-up.
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=50,
        guidance_scale=4.0,
        negative_prompt=_BLANK,
        max_sequence_length=_MAX_TEXT_TOKENS,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=_MAX_TEXT_TOKENS,
    transformer=QwenImageTransformerConfig,
    guided_by=("true_cfg_scale", "guidance_scale"),
    guided_by_negative_prompts_alone=True,
    reference_images=1,
)

QWEN_IMAGE_EDIT_PLUS = PipelineConfig(
    tasks=("TI2I",),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_frames=1,
        num_inference_steps=40,
        guidance_scale=4.0,
        negative_prompt=_BLANK,
        max_sequence_length=_MAX_TEXT_TOKENS,
    ),
    max_pixels=_MAX_PIXELS,
    max_sequence_length=_MAX_TEXT_TOKENS,
    transformer=QwenImageTransformerConfig,
    guided_by=("true_cfg_scale", "guidance_scale"),
    guided_by_negative_prompts_alone=True,
    reference_images=1,
)

_MODULES = "sglang.multimodal_gen.runtime.pipelines"
_LICENCE = "Apache-2.0"

ENTRIES = (
    ModelEntry(
        name="qwen-image",
        pipeline=f"{_MODULES}.qwen_image:QwenImagePipeline",
        config=f"{__name__}:QWEN_IMAGE",
        pipeline_class_names=("QwenImagePipeline",),
        hub_ids=("Qwen/Qwen-Image",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="qwen-image-2512",
        pipeline=f"{_MODULES}.qwen_image:QwenImagePipeline",
        config=f"{__name__}:QWEN_IMAGE_2512",
        pipeline_class_names=("QwenImagePipeline",),
        hub_ids=("Qwen/Qwen-Image-2512",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="qwen-image-edit",
        pipeline=f"{_MODULES}.qwen_image_edit:QwenImageEditPipeline",
        config=f"{__name__}:QWEN_IMAGE_EDIT",
        pipeline_class_names=("QwenImageEditPipeline",),
        hub_ids=("Qwen/Qwen-Image-Edit",),
        licence=_LICENCE,
    ),
    ModelEntry(
        name="qwen-image-edit-plus",
        pipeline=f"{_MODULES}.qwen_image_edit:QwenImageEditPlusPipeline",
        config=f"{__name__}:QWEN_IMAGE_EDIT_PLUS",
        pipeline_class_names=("QwenImageEditPlusPipeline",),
        hub_ids=(
            "Qwen/Qwen-Image-Edit-2509",
            "Qwen/Qwen-Image-Edit-2511",
            "FireRedTeam/FireRed-Image-Edit-1.0",
            "FireRedTeam/FireRed-Image-Edit-1.1",
        ),
        licence=_LICENCE,
    ),
)
