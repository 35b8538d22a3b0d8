"""Image editing with Qwen-Image-Edit: one picture, or with the later releases up to three, and what is to be done.

Source: arXiv:2508.02324, https://github.com/QwenLM/Qwen-Image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import InputLimits, SizeFromImage, TaskLimits
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader
from sglang.multimodal_gen.runtime.loader.library_module import transformers_module
from sglang.multimodal_gen.runtime.loader.picture_processor import PictureProcessor
from sglang.multimodal_gen.runtime.models.dits.qwen_image import ImageShapes
from sglang.multimodal_gen.runtime.models.vaes.qwen_image_vae import AutoencoderKLQwenImage
from sglang.multimodal_gen.runtime.pipelines.qwen_image import PICTURES, QwenImagePipeline
from sglang.multimodal_gen.runtime.pipelines.qwen_image_prompts import EDITING, QwenPicturePrompts, size_of
from sglang.multimodal_gen.runtime.pipelines_core.conditioning_cache import ConditioningCache
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import pack
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import clip_of
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import PromptEncoder
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

_SIZE_MULTIPLE = 32
_MILLION_PIXELS = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class EditingRules:
    """How a release looks at pictures.

    `shown`: the size in which the text encoder sees them. `latents`: the size in which they become latents, and that of
    a result for which none is asked. `spatial_positions`: whether the text encoder is told a picture's rows and
    columns. It was trained with them, but diffusers 0.42 with transformers 5, which results are to equal, does not
    (https://github.com/huggingface/diffusers/issues/14194); decision 0008.
    """

    max_images: int
    label: str
    shown: SizeFromImage
    latents: SizeFromImage
    spatial_positions: bool = False


ONE_PICTURE = EditingRules(
    max_images=1,
    label="",
    shown=SizeFromImage(area=_MILLION_PIXELS, multiple=_SIZE_MULTIPLE, source="first"),
    latents=SizeFromImage(area=_MILLION_PIXELS, multiple=_SIZE_MULTIPLE, source="first"),
)
SEVERAL_PICTURES = EditingRules(
    max_images=3,
    label="Picture {}: ",
    shown=SizeFromImage(area=384 * 384, multiple=_SIZE_MULTIPLE, source="last"),
    latents=SizeFromImage(area=_MILLION_PIXELS, multiple=_SIZE_MULTIPLE, source="last"),
)


class PictureEncodingStage(Stage):
    """The pictures as packed latents, one after the other; equal ones are encoded once."""

    name: str = "picture_encode"
    reads: ClassVar[tuple[str, ...]] = ("inputs",)
    writes: ClassVar[tuple[str, ...]] = ("conditioning",)

    def __init__(
        self, vae: AutoencoderKLQwenImage, *, rules: EditingRules, memory: DecoderMemory, cache: ConditioningCache
    ) -> None:
        self.vae = vae
        self.rules = rules
        self.memory = memory
        self.cache = cache
        self.dtype, self.device = vae.quant_conv.weight.dtype, compute_device(vae)

    def phase(self, req: Req) -> Phase:
        sizes = [size_of(image, self.rules.latents) for image in req.inputs.images]
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(sum(width * height for width, height in sizes)),
            peak_bytes=max(
                self.memory.encoding_bytes(self.vae.strips, 1, height, width, ratio=self.vae.config.spatial_ratio)
                for width, height in sizes
            ),
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        found: list[Tensor] = []
        for req in requests:
            key = (self.name, req.inputs.digest())
            tokens = self.cache.get(key)
            if tokens is None:
                tokens = torch.cat([self._tokens(image) for image in req.inputs.images])
                self.cache.put(key, tokens)
            found.append(tokens)
        for req, tokens in zip(requests, found, strict=True):
            req.conditioning[PICTURES] = tokens
        return []

    def _tokens(self, image: np.ndarray) -> Tensor:
        """[H, W, 3] -> [S, C]."""
        width, height = size_of(image, self.rules.latents)
        pixels = clip_of([image], height, width).to(self.device, self.dtype)
        return pack(self.vae.to_latents(pixels))[0]


class QwenImageEditPipeline(QwenImagePipeline):
    """Editing of one picture."""

    rules: ClassVar[EditingRules] = ONE_PICTURE
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        **QwenImagePipeline.components,
        "text_encoder": transformers_module("Qwen2_5_VLForConditionalGeneration", part="model"),
        "processor": PictureProcessor(),
    }
    num_dropped: ClassVar[int] = EDITING.num_dropped
    processor: Any

    def limits(self) -> TaskLimits:
        return self.geometry().limits(
            max_sequence_length=self.config.max_sequence_length,
            inputs=InputLimits(min_images=1, max_images=self.rules.max_images),
            size_from_image=self.rules.latents,
        )

    def prompt_encoder(self) -> PromptEncoder:
        return QwenPicturePrompts(
            self.tokenizer,
            self.text_encoder,
            self.processor,
            label=self.rules.label,
            shown=self.rules.shown,
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
            spatial_positions=self.rules.spatial_positions,
        )

    def picture_stages(self) -> list[Stage]:
        memory = self.decoder_memory_of({"vae": self.vae.config}, self.vae.quant_conv.weight.element_size())
        return [PictureEncodingStage(self.vae, rules=self.rules, memory=memory, cache=self.conditioning_cache)]

    def picture_shapes(self, req: Req) -> ImageShapes:
        side = self.geometry().size_multiple
        sizes = (size_of(image, self.rules.latents) for image in req.inputs.images)
        return tuple((1, height // side, width // side) for width, height in sizes)


class QwenImageEditPlusPipeline(QwenImageEditPipeline):
    """Editing with up to three pictures, which the prompt names by their numbers."""

    rules: ClassVar[EditingRules] = SEVERAL_PICTURES
