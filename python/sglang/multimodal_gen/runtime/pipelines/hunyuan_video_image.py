"""HunyuanVideo image to video, and its fine-tune SkyReels-V1, whose text encoder does not see the picture.

Source: https://github.com/Tencent/HunyuanVideo-I2V, https://github.com/SkyworkAI/SkyReels-V1
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import InputLimits, SizeFromImage, TaskLimits
from sglang.multimodal_gen.configs.models.dits.hunyuan_video import (
    LATENT_CONCAT,
    TOKEN_REPLACE,
    HunyuanVideoTransformerConfig,
)
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader, LoadContext
from sglang.multimodal_gen.runtime.loader.image_processor import ImageProcessor, load_image_processor
from sglang.multimodal_gen.runtime.loader.library_module import transformers_module
from sglang.multimodal_gen.runtime.models.vaes.distribution import LatentDistribution
from sglang.multimodal_gen.runtime.models.vaes.hunyuan_video_vae import AutoencoderKLHunyuanVideo
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video import HunyuanVideoDenoiser, HunyuanVideoPipeline
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video_prompts import (
    IMAGE_TOKENS,
    NEGATIVE_INTERLEAVE,
    HunyuanVideoImagePrompts,
)
from sglang.multimodal_gen.runtime.pipelines_core.conditioning_cache import ConditioningCache
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Row
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import DistilledGuidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import clip_of
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import (
    LatentPreparationStage,
    request_generator,
)
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage
from sglang.multimodal_gen.runtime.pipelines_core.text_encoders import PooledCLIP

IMAGE_LATENTS = "image_latents"
"""Name of the picture's latents [C, 1, H, W] in a request's conditioning."""
NOISE_SHARE = 0.999
"""Of the latents that a clip starts from; the rest is the picture, in every frame."""
INTERLEAVE = {LATENT_CONCAT: 2, TOKEN_REPLACE: 4}
"""Every how many-th of the picture's states in the text encoder is kept."""
SKIPPED_FRAMES = 4
"""Frames at the start of what models with `latent_concat` make, which are no part of the clip."""


def load_picture_settings(directory: Path, class_name: str, context: LoadContext) -> ImageProcessor:
    """The component `image_processor`, whatever library class saved it."""
    return load_image_processor(directory)


class PictureEncodingStage(Stage):
    """Latents of the picture that the clip starts from; equal pictures are encoded once."""

    name: str = "image_encode"
    reads: ClassVar[tuple[str, ...]] = ("inputs",)
    writes: ClassVar[tuple[str, ...]] = ("conditioning", "generator")

    def __init__(
        self, vae: AutoencoderKLHunyuanVideo, *, memory: DecoderMemory, cache: ConditioningCache, samples: bool
    ) -> None:
        """`samples`: the latents are drawn, before the noise, and not the most likely ones."""
        self.vae = vae
        self.memory = memory
        self.cache = cache
        self.samples = samples
        self.dtype, self.device = vae.post_quant_conv.weight.dtype, compute_device(vae)

    def phase(self, req: Req) -> Phase:
        width, height = _size(req.params)
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(width * height),
            peak_bytes=self.memory.encoding_bytes(
                self.vae.strips, 1, height, width, ratio=self.vae.config.spatial_compression_ratio
            ),
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        encoded = [self._distribution(req) for req in requests]
        for req, distribution in zip(requests, encoded, strict=True):
            if self.samples:
                req.generator = request_generator(req)
            latents = distribution.sample(req.generator) if self.samples else distribution.mean
            req.conditioning[IMAGE_LATENTS] = self.vae.normalise(latents.float())[0]
        return []

    def _distribution(self, req: Req) -> LatentDistribution:
        width, height = _size(req.params)
        key = (self.name, req.inputs.digest(), width, height)
        found: LatentDistribution | None = self.cache.get(key)
        if found is None:
            picture = clip_of(req.inputs.images, height, width)
            found = self.vae.encode(picture.to(self.device, self.dtype))
            self.cache.put(key, found)
        return found


def picture_encoding(pipeline: HunyuanVideoPipeline, *, samples: bool) -> PictureEncodingStage:
    """The stage with a pipeline's autoencoder."""
    vae = pipeline.vae
    memory = pipeline.decoder_memory_of({"vae": vae.config}, vae.post_quant_conv.weight.element_size())
    return PictureEncodingStage(vae, memory=memory, cache=pipeline.conditioning_cache, samples=samples)


def picture_limits(pipeline: HunyuanVideoPipeline) -> TaskLimits:
    """Those of a model that takes one picture. The clip has its shape where no size is asked for."""
    geometry = pipeline.geometry()
    area = math.prod(_size(pipeline.config.defaults))
    return geometry.limits(
        max_sequence_length=pipeline.config.max_sequence_length,
        inputs=InputLimits(min_images=1, max_images=1),
        size_from_image=SizeFromImage(area=area, multiple=geometry.size_multiple, source="first"),
    )


def _size(params: SamplingParams) -> tuple[int, int]:
    assert params.width and params.height, "checked by the stages before"
    return params.width, params.height


class BesidePictureStage(TextEncodingStage):
    """The prompt is read beside the picture, the negative prompt beside none."""

    def negative_inputs(self, req: Req) -> RequestInputs:
        """See TextEncodingStage."""
        return EMPTY

    def admit(self, req: Req) -> None:
        """See TextEncodingStage."""
        super().admit(req)
        if req.params.image_embed_interleave is not None:
            assert req.prompt is not None, "prepared just now"
            req.prompt = dataclasses.replace(req.prompt, options=(req.params.image_embed_interleave,))


class PictureAndNoiseStage(LatentPreparationStage):
    """Noise with a trace of the picture in every frame."""

    @staticmethod
    def _started(req: Req, noise: Tensor) -> Tensor:
        share = torch.tensor(NOISE_SHARE)
        return noise * share.to(noise) + req.conditioning[IMAGE_LATENTS] * (1 - share).to(noise)


class ConcatGeometry(VideoGeometry):
    """One latent frame more than the clip has: the frames that are skipped."""

    def latent_shape(self, params: SamplingParams) -> tuple[int, int, int, int]:
        """See VideoGeometry."""
        channels, frames, height, width = super().latent_shape(params)
        return channels, frames + SKIPPED_FRAMES // self.temporal_ratio, height, width


class PictureDenoiser(HunyuanVideoDenoiser):
    """With the picture's states in the text."""

    def num_text_tokens(self, req: Req) -> int:
        """See Denoiser."""
        kept = min(NEGATIVE_INTERLEAVE, *INTERLEAVE.values(), req.params.image_embed_interleave or NEGATIVE_INTERLEAVE)
        return super().num_text_tokens(req) + IMAGE_TOKENS // kept

    @staticmethod
    def pictures(rows: Sequence[Row]) -> Tensor:
        """[B, C, 1, H, W] fp32."""
        return torch.stack([row.req.conditioning[IMAGE_LATENTS] for row in rows])


class ConcatDenoiser(PictureDenoiser):
    """The picture as further channels of the first frame, and a channel that says where it is."""

    def model_input(self, rows: Sequence[Row]) -> Tensor:
        """See HunyuanVideoDenoiser."""
        latents, pictures = self.stacked_latents(rows), self.pictures(rows).to(self.dtype)
        given = torch.cat((pictures, torch.ones_like(pictures[:, :1])), dim=1)
        return torch.cat((latents, F.pad(given, (0, 0, 0, 0, 0, latents.shape[2] - 1))), dim=1)


class ReplaceDenoiser(PictureDenoiser):
    """The picture as the first frame."""

    def model_input(self, rows: Sequence[Row]) -> Tensor:
        """See HunyuanVideoDenoiser."""
        return torch.cat((self.pictures(rows).to(self.dtype), self.stacked_latents(rows)[:, :, 1:]), dim=2)


def with_first_frame(req: Req, latents: Tensor) -> Tensor:
    """The latents [C, T, H, W] with the picture as their first frame."""
    return torch.cat((req.conditioning[IMAGE_LATENTS], latents[:, 1:]), dim=1)


class HunyuanVideoImageToVideoPipeline(HunyuanVideoPipeline):
    """Image to video with HunyuanVideo-I2V, of which there are two kinds of transformer."""

    own_parameters: ClassVar[frozenset[str]] = HunyuanVideoPipeline.own_parameters | {"image_embed_interleave"}
    components: ClassVar[Mapping[str, ComponentLoader]] = {
        **HunyuanVideoPipeline.components,
        "text_encoder": transformers_module("LlavaForConditionalGeneration", part="base_model"),
        "image_processor": load_picture_settings,
    }
    condition_types: ClassVar[Mapping[str | None, Any]] = {
        LATENT_CONCAT: ConcatDenoiser,
        TOKEN_REPLACE: ReplaceDenoiser,
    }
    image_processor: ImageProcessor

    def create_pipeline_stages(self) -> list[Stage]:
        guidance, geometry = DistilledGuidance(), self.geometry()
        replaces = self.transformer.config.image_condition_type == TOKEN_REPLACE
        return [
            picture_encoding(self, samples=False),
            BesidePictureStage(self.prompt_encoder(), guidance=guidance, cache=self.conditioning_cache),
            PictureAndNoiseStage(geometry, self.device),
            self.timesteps(),
            DenoisingStage(
                self.denoiser(geometry),
                guidance=guidance,
                free_bytes=self.free_bytes,
                constraint=with_first_frame if replaces else None,
            ),
            self.decoding(geometry, skipped_frames=0 if replaces else SKIPPED_FRAMES),
        ]

    def prompt_encoder(self) -> HunyuanVideoImagePrompts:
        kind = self.transformer.config.image_condition_type
        assert kind is not None, "checked with the components"
        return HunyuanVideoImagePrompts(
            self.tokenizer,
            self.text_encoder,
            PooledCLIP(self.tokenizer_2, self.text_encoder_2),
            image_processor=self.image_processor,
            interleave=INTERLEAVE[kind],
            max_sequence_length=self.config.max_sequence_length,
            dtype=self.dtype,
        )

    def limits(self) -> TaskLimits:
        return picture_limits(self)

    @classmethod
    def model_channels(cls, transformer: HunyuanVideoTransformerConfig, latent_channels: int) -> int:
        return 2 * latent_channels + 1 if transformer.image_condition_type == LATENT_CONCAT else latent_channels

    @classmethod
    def geometry_class(cls, transformer: HunyuanVideoTransformerConfig) -> type[VideoGeometry]:
        return ConcatGeometry if transformer.image_condition_type == LATENT_CONCAT else VideoGeometry


class ChannelDenoiser(HunyuanVideoDenoiser):
    """The picture as further channels of the first frame."""

    def model_input(self, rows: Sequence[Row]) -> Tensor:
        """See HunyuanVideoDenoiser."""
        latents, pictures = self.stacked_latents(rows), PictureDenoiser.pictures(rows).to(self.dtype)
        return torch.cat((latents, F.pad(pictures, (0, 0, 0, 0, 0, latents.shape[2] - 1))), dim=1)


class HunyuanSkyreelsImageToVideoPipeline(HunyuanVideoPipeline):
    """Image to video with SkyReels-V1: the text encoder does not see the picture."""

    condition_types: ClassVar[Mapping[str | None, Any]] = {None: ChannelDenoiser}

    def create_pipeline_stages(self) -> list[Stage]:
        return [picture_encoding(self, samples=True), *super().create_pipeline_stages()]

    def starting_stages(self) -> list[Stage]:
        return []

    def limits(self) -> TaskLimits:
        return picture_limits(self)

    @classmethod
    def model_channels(cls, transformer: HunyuanVideoTransformerConfig, latent_channels: int) -> int:
        return 2 * latent_channels
