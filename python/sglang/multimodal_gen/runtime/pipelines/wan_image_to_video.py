"""Wan image to video: a picture, and for some models a last one, become a clip.

Source: arXiv:2503.20314, https://github.com/Wan-Video/Wan2.1, https://github.com/Wan-Video/Wan2.2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import LOCAL_NAMES, InputLimits, TaskLimits
from sglang.multimodal_gen.errors import IncompatibleParameters, UnsupportedModel
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader, ImagePreprocessor
from sglang.multimodal_gen.runtime.loader.image_processor import ImageProcessor
from sglang.multimodal_gen.runtime.loader.library_module import transformers_module
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.pipelines.wan import WanDenoiser, WanPipeline
from sglang.multimodal_gen.runtime.pipelines.wan_pictures import (
    CONDITION,
    EMBEDS,
    PictureConditionStage,
    PictureEmbeddingStage,
    tokens_of_picture,
)
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Row
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import Constraint


class WanPictureDenoiser(WanDenoiser):
    """The velocity of video latents, steered by text and by a picture beside the noise."""

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, lengths = self.stacked_text(rows)
        conditions = torch.stack([row.req.conditioning[CONDITION] for row in rows])
        latents = torch.cat((self.stacked_latents(rows), conditions), dim=1)
        return self.transformer(
            latents,
            self.timesteps(rows),
            text,
            self.image_embeds(rows),
            text_lengths=lengths,
            embedded=self.embedded(rows),
        )

    def image_embeds(self, rows: Sequence[Row]) -> Tensor | None:
        """See WanDenoiser: [B, I, image_dim]."""
        if self.transformer.config.image_dim is None:
            return None
        return torch.stack([row.req.conditioning[EMBEDS] for row in rows])

    def held_bytes(self, req: Req) -> int:
        """See Denoiser: the text's and the picture's."""
        assert req.latent_shape is not None, "planned by the stages before"
        _, frames, height, width = req.latent_shape
        channels = self.transformer.config.in_channels - self.transformer.config.num_output_channels
        return super().held_bytes(req) + channels * frames * height * width * self.dtype.itemsize


class ClipEnds(Stage):
    """A clip that ends with a picture has more than one frame."""

    name = "clip_ends"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs")

    def admit(self, req: Req) -> None:
        """Raises IncompatibleParameters."""
        if req.inputs.last_image is not None and req.params.num_frames == 1:
            name = LOCAL_NAMES.last_image
            raise IncompatibleParameters(f"{name}: one frame has no end, accepted are more frames", param=name)


class WanImageToVideoPipeline(WanPipeline):
    """Image to video with Wan2.1, whose transformers are also told what CLIP sees, and with the experts of Wan2.2."""

    components: ClassVar[Mapping[str, ComponentLoader]] = {
        **WanPipeline.components,
        "image_encoder": transformers_module("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        "image_processor": ImagePreprocessor(),
    }
    optional_components: ClassVar[frozenset[str]] = WanPipeline.optional_components | {
        "image_encoder",
        "image_processor",
    }
    own_parameters: ClassVar[frozenset[str]] = WanPipeline.own_parameters | {"max_area"}
    denoiser_class: ClassVar[type[WanDenoiser]] = WanPictureDenoiser
    image_encoder: Any
    image_processor: ImageProcessor | None

    def starting_stages(self) -> list[Stage]:
        return []

    def picture_stages(self) -> list[Stage]:
        config = self.transformer.config
        condition = PictureConditionStage(
            self.vae, first_frame_only=False, cache=self.conditioning_cache, dtype=self.dtype
        )
        if config.image_dim is None:
            return [ClipEnds(), condition]
        assert self.image_processor is not None, "checked when loaded"
        embedding = PictureEmbeddingStage(
            self.image_processor, self.image_encoder, cache=self.conditioning_cache, dtype=self.dtype
        )
        return [ClipEnds(), embedding, condition]

    def denoiser(self, transformer: WanTransformer3DModel, geometry: VideoGeometry) -> WanDenoiser:
        denoiser, config = super().denoiser(transformer, geometry), transformer.config
        if config.image_dim is not None:
            num_pictures = 1 if config.pos_embed_seq_len is None else 2
            denoiser.num_image_tokens = num_pictures * tokens_of_picture(self.image_encoder.config)
        return denoiser

    def constraint(self) -> Constraint | None:
        return None

    def limits(self) -> TaskLimits:
        config = self.transformer.config
        # One that has positions for its image tokens has them for two pictures; without, it could not tell two apart.
        inputs = InputLimits(
            min_images=1,
            max_images=1,
            takes_last_image=config.image_dim is None,
            requires_last_image=config.image_dim is not None and config.pos_embed_seq_len is not None,
        )
        return msgspec.structs.replace(super().limits(), inputs=inputs, size_from_image=self.size_from_picture())

    def input_channels(self) -> tuple[int, str]:
        vae = self.vae.config
        return 2 * vae.z_dim + vae.temporal_ratio, "twice vae.z_dim and a mask of the frames"

    def check_pictures(self) -> None:
        config, encoder = self.transformer.config, self.image_encoder
        if config.image_dim is None:
            return
        if encoder is None or self.image_processor is None:
            raise UnsupportedModel(
                f"transformer.image_dim is {config.image_dim}, but the checkpoint has no image_encoder or no "
                "image_processor"
            )
        if encoder.config.hidden_size != config.image_dim:
            raise UnsupportedModel(
                f"transformer.image_dim is {config.image_dim}, but image_encoder.hidden_size is "
                f"{encoder.config.hidden_size}; both must be equal"
            )
