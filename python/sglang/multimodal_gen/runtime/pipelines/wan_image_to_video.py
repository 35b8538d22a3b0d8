"""Wan image to video: a picture, and for some models a last one, become a clip.

Source: arXiv:2503.20314, https://github.com/Wan-Video/Wan2.1, https://github.com/Wan-Video/Wan2.2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.errors import (
    IncompatibleParameters,
    MissingParameter,
    UnsupportedModel,
    UnsupportedParameter,
)
from sglang.multimodal_gen.runtime.loader.component_loader import ComponentLoader, ImagePreprocessor
from sglang.multimodal_gen.runtime.loader.image_processor import ImageProcessor
from sglang.multimodal_gen.runtime.loader.library_module import transformers_module
from sglang.multimodal_gen.runtime.pipelines.wan import WanDenoiser, WanPipeline
from sglang.multimodal_gen.runtime.pipelines.wan_pictures import (
    CONDITION,
    EMBEDS,
    PictureConditionStage,
    PictureEmbeddingStage,
)
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Row
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage


class WanPictureDenoiser(WanDenoiser):
    """The velocity of video latents, steered by text and by a picture beside the noise."""

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        text, lengths = self.stacked_text(rows)
        conditions = torch.stack([row.req.conditioning[CONDITION] for row in rows])
        latents = torch.cat((self.stacked_latents(rows), conditions), dim=1)
        embeds = None
        if self.transformer.config.image_dim is not None:
            embeds = torch.stack([row.req.conditioning[EMBEDS] for row in rows])
        return self.transformer(latents, self.timesteps(rows), text, embeds, text_lengths=lengths)

    def held_bytes(self, req: Req) -> int:
        """See Denoiser: the text's and the picture's."""
        assert req.latent_shape is not None, "planned by the stages before"
        _, frames, height, width = req.latent_shape
        channels = self.transformer.config.in_channels - self.transformer.config.num_output_channels
        return super().held_bytes(req) + channels * frames * height * width * self.dtype.itemsize


class PicturesGiven(Stage):
    """Which pictures the checkpoint takes: one, or for those with an end of the clip two."""

    name = "pictures"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs")

    def __init__(self, *, takes_last: bool, requires_last: bool) -> None:
        self.takes_last = takes_last
        self.requires_last = requires_last

    def admit(self, req: Req) -> None:
        """Raises MissingParameter, UnsupportedParameter or IncompatibleParameters."""
        if not req.inputs.images:
            raise MissingParameter("image_path: got nothing, accepted is one image", param="image_path")
        if len(req.inputs.images) > 1:
            raise UnsupportedParameter("image_path", "the model works from text and one image")
        if req.inputs.last_image is None:
            if self.requires_last:
                raise MissingParameter("last_image_path: got nothing, accepted is one image", param="last_image_path")
            return
        if not self.takes_last:
            raise UnsupportedParameter("last_image_path", "the model works from text and one image")
        if req.params.num_frames == 1:
            raise IncompatibleParameters(
                "last_image_path: a clip of 1 frame has no end, accepted are more frames", param="last_image_path"
            )


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
    denoiser_class: ClassVar[type[WanDenoiser]] = WanPictureDenoiser
    image_encoder: Any
    image_processor: ImageProcessor | None

    def picture_stages(self, geometry: VideoGeometry) -> list[Stage]:
        config = self.transformer.config
        # A transformer with positions for its image tokens wants those of two pictures, one without cannot tell two.
        given = PicturesGiven(
            takes_last=config.image_dim is None or config.pos_embed_seq_len is not None,
            requires_last=config.pos_embed_seq_len is not None,
        )
        condition = PictureConditionStage(
            self.vae, first_frame_only=False, cache=self.conditioning_cache, dtype=self.dtype
        )
        if config.image_dim is None:
            return [given, condition]
        assert self.image_processor is not None, "checked when loaded"
        embedding = PictureEmbeddingStage(
            self.image_processor, self.image_encoder, cache=self.conditioning_cache, dtype=self.dtype
        )
        return [given, embedding, condition]

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
