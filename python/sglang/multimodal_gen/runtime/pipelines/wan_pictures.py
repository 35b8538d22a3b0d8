"""What Wan's image-to-video transformers are told of a picture, and the stages that make it.

Source: https://github.com/Wan-Video/Wan2.1, https://github.com/Wan-Video/Wan2.2

Shapes: Z latent channels, k video frames per latent frame, t, h, w latent frames, height, width; I tokens of the image
encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.loader.image_processor import ImageProcessor
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import TemporalState
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan
from sglang.multimodal_gen.runtime.pipelines_core.conditioning_cache import ConditioningCache
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import clip_of
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import encoder_memory
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

CONDITION, EMBEDS = "picture_condition", "picture_embeds"
"""Names in `Req.conditioning`."""


class PictureConditionStage(Stage):
    """Latents of a clip that shows the picture first, perhaps another one last, and grey between.

    `condition`: [k + Z, t, h, w], a mask of the frames that are given before the latents. With `first_frame_only` the
    picture's own latents [Z, 1, h, w] alone. The most likely latents, normalised, in the transformer's dtype.
    """

    name = "picture_encode"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "latent_shape")
    writes: ClassVar[tuple[str, ...]] = ("conditioning",)

    def __init__(
        self, vae: AutoencoderKLWan, *, first_frame_only: bool, cache: ConditioningCache, dtype: torch.dtype
    ) -> None:
        self.vae = vae
        self.first_frame_only = first_frame_only
        self.cache = cache
        self.dtype = dtype
        self.vae_dtype, self.device = vae.quant_conv.weight.dtype, compute_device(vae)
        config = vae.config
        # As decoding in reverse: at full size there are two causal convolutions for each block, and the first one.
        self.memory = DecoderMemory(
            channels=config.base_dim * config.dim_mult[0],
            carried_channels=2 * 2 * (2 * config.num_res_blocks + 1) * config.base_dim,
            patch_size=config.patch_size or 1,
            element_size=self.vae_dtype.itemsize,
        )

    def phase(self, req: Req) -> Phase | None:
        if not req.inputs.images:
            return None
        height, width = _size(req)
        num_frames = 1 if self.first_frame_only else self.vae.config.temporal_ratio
        strips, ratio = self.vae.strips, self.vae.config.spatial_ratio
        peak_bytes = self.memory.encoding_bytes(strips, num_frames, height, width, ratio=ratio)
        peak_bytes += self.memory.carried_bytes(*strips.largest(height, width, ratio=ratio))
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=f"{self.name}:{height}x{width}x{req.params.num_frames}",
            cost=1.0,
            peak_bytes=peak_bytes,
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        found = [self._condition(req) for req in requests]
        for req, condition in zip(requests, found, strict=True):
            req.conditioning[CONDITION] = condition
        return []

    def _condition(self, req: Req) -> Tensor:
        key = (self.name, req.inputs.digest(), *_size(req), req.params.num_frames)
        found: Tensor | None = self.cache.get(key)
        if found is None:
            latents = self._latents(req)
            if not self.first_frame_only:
                mask = frame_mask(latents, self.vae.config.temporal_ratio, ends=req.inputs.last_image is not None)
                latents = torch.cat((mask, latents))
            found = latents.to(self.dtype)
            self.cache.put(key, found)
        return found

    def _latents(self, req: Req) -> Tensor:
        """[Z, t, h, w] fp32, a few frames at a time: the clip itself never lies in memory."""
        state = TemporalState(carry=not self.first_frame_only)
        chunks = [self.vae.encode_next(frames, state).mean for frames in self._clip(req)]
        return self.vae.normalise(torch.cat(chunks, dim=2).float())[0]

    def _clip(self, req: Req) -> Iterator[Tensor]:
        """The first frame [1, 3, 1, H, W], then k frames at a time."""
        height, width = _size(req)
        picture, last = req.inputs.images[0], req.inputs.last_image
        yield self._frame(picture, height, width)
        num_frames, ratio = req.params.num_frames or 1, self.vae.config.temporal_ratio
        if self.first_frame_only or num_frames == 1:
            return
        grey = torch.zeros(1, 3, ratio, height, width, dtype=self.vae_dtype, device=self.device)
        for _ in range((num_frames - 1) // ratio - 1):
            yield grey
        yield grey if last is None else torch.cat((grey[:, :, 1:], self._frame(last, height, width)), dim=2)

    def _frame(self, picture: np.ndarray, height: int, width: int) -> Tensor:
        return clip_of([picture], height, width).to(self.device, self.vae_dtype)


class PictureEmbeddingStage(Stage):
    """What an image encoder sees in the picture, or in the first and the last: [I, D] or [2·I, D].

    Its last layer but one counts, as trained. Source: arXiv:2103.00020 (CLIP).
    """

    name = "picture_embed"
    reads: ClassVar[tuple[str, ...]] = ("inputs",)
    writes: ClassVar[tuple[str, ...]] = ("conditioning",)

    def __init__(
        self, image_processor: ImageProcessor, image_encoder: Any, *, cache: ConditioningCache, dtype: torch.dtype
    ) -> None:
        """`image_encoder` is transformers' CLIPVisionModel."""
        self.image_processor = image_processor
        self.image_encoder = image_encoder
        self.cache = cache
        self.dtype = dtype
        parameter = next(image_encoder.parameters())
        self.encoder_dtype, self.device = parameter.dtype, compute_device(image_encoder)
        self.memory = encoder_memory(image_encoder.config, parameter.element_size())
        self.num_tokens = tokens_of_picture(image_encoder.config)

    def phase(self, req: Req) -> Phase:
        count = len(_pictures(req.inputs))
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(count * self.num_tokens),
            peak_bytes=count * self.memory.row_bytes(self.num_tokens),
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        found = [self._embeds(req) for req in requests]
        for req, embeds in zip(requests, found, strict=True):
            req.conditioning[EMBEDS] = embeds
        return []

    def _embeds(self, req: Req) -> Tensor:
        key = (self.name, req.inputs.digest())
        found: Tensor | None = self.cache.get(key)
        if found is None:
            images = [Image.fromarray(picture) for picture in _pictures(req.inputs)]
            pixels = self.image_processor(images).to(self.device, self.encoder_dtype)
            states = self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
            found = states.flatten(0, 1).to(self.dtype, copy=True)
            self.cache.put(key, found)
        return found


def tokens_of_picture(config: Any) -> int:
    """How many CLIP makes of one, by its vision model's config."""
    return (config.image_size // config.patch_size) ** 2 + 1


def frame_mask(latents: Tensor, temporal_ratio: int, *, ends: bool) -> Tensor:
    """For latents [Z, t, h, w] a mask [k, t, h, w] of ones at the frames that are given, the first and with `ends` the
    last; a channel for each video frame of a latent one, of which the first holds one frame only."""
    mask = latents.new_zeros(temporal_ratio, *latents.shape[1:])
    mask[:, 0] = 1
    if ends:
        mask[-1, -1] = 1
    return mask


def _pictures(inputs: RequestInputs) -> tuple[np.ndarray, ...]:
    return inputs.images[:1] if inputs.last_image is None else (inputs.images[0], inputs.last_image)


def _size(req: Req) -> tuple[int, int]:
    assert req.params.height and req.params.width, "checked by the stage before"
    return req.params.height, req.params.width
