"""A picture or clip to start from, and a mask of what stays of it. Source: arXiv:2108.01073, arXiv:2201.09865"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.errors import IncompatibleParameters, InvalidValue
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import clip_of, latent_mask, mask_of
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import (
    INITIAL_LATENTS,
    MASK,
    NOISE,
    request_generator,
)


class LatentEncoder(Protocol):
    """An autoencoder's way from pixels to the transformer's latents."""

    strips: StripSharding
    """How the picture is dealt to ranks."""

    def to_latents(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> [B, C, t, h, w]: the most likely ones, or with a generator a sample."""
        ...


class InitialImageStage(Stage):
    """Latents of the picture or clip that a request starts from, for models that are trained on text alone.

    It comes before the stages that plan the steps and draw the noise: they begin
    where `strength` says.
    """

    name: str = "image_encode"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs", "latent_shape")
    writes: ClassVar[tuple[str, ...]] = ("strength", "conditioning", "generator")

    def __init__(
        self,
        encoder: LatentEncoder,
        *,
        memory: DecoderMemory,
        device: torch.device,
        dtype: torch.dtype,
        samples: bool,
        default_strength: float = 0.6,
    ) -> None:
        """`samples`: the picture's latents are drawn from what the encoder gives, with the request's generator."""
        self.encoder = encoder
        self.memory = memory
        self.device = device
        self.dtype = dtype
        self.samples = samples
        self.default_strength = default_strength

    def admit(self, req: Req) -> None:
        """Raises InvalidValue for a clip that is shorter than what is to be made, IncompatibleParameters for a picture
        where a clip is to be made, which models of text alone cannot set in motion."""
        frames = starting_frames(req)
        if frames is None:
            return
        num_frames = req.params.num_frames or 1
        if req.inputs.video is None and num_frames > 1:
            raise IncompatibleParameters(
                f"image_path: this model makes videos of a text or a video, accepted is an image with num_frames 1 "
                f"(got {num_frames})",
                param="image_path",
            )
        if len(frames) < num_frames:
            raise InvalidValue("num_frames", num_frames, f"at most the {len(frames)} frames of the video")
        req.strength = self.default_strength if req.params.strength is None else req.params.strength

    def phase(self, req: Req) -> Phase | None:
        frames = starting_frames(req)
        if frames is None:
            return None
        params, shape = req.params, req.latent_shape
        assert params.width and params.height and shape is not None, "checked by the stages before"
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(math.prod(shape)),
            peak_bytes=self.memory.encoding_bytes(
                self.encoder.strips,
                params.num_frames or 1,
                params.height,
                params.width,
                ratio=params.height // shape[2],
            ),
        )

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        encoded = [self._encoded(req) for req in requests]
        for req, (latents, generator) in zip(requests, encoded, strict=True):
            req.conditioning[INITIAL_LATENTS] = latents
            req.generator = generator
            if req.inputs.mask is not None:
                req.conditioning[MASK] = self._mask(req)
        return []

    def _encoded(self, req: Req) -> tuple[Tensor, torch.Generator | None]:
        params, frames = req.params, starting_frames(req)
        assert frames is not None and params.height and params.width, "checked at admission"
        generator = request_generator(req) if self.samples else None
        video = clip_of(frames[: params.num_frames or 1], params.height, params.width)
        latents = self.encoder.to_latents(video.to(self.device, self.dtype), generator=generator)
        return latents[0].float(), generator

    def _mask(self, req: Req) -> Tensor:
        """[1, 1, h, w] of the latents."""
        params, shape = req.params, req.latent_shape
        assert req.inputs.mask is not None and shape is not None and params.height and params.width
        return latent_mask(mask_of(req.inputs.mask, params.height, params.width), *shape[2:]).to(self.device)


def starting_frames(req: Req) -> Sequence[np.ndarray] | None:
    """The clip's frames, or the picture; None for a request that starts from noise alone."""
    if req.inputs.video is not None:
        return list(req.inputs.video)
    return req.inputs.images[:1] or None


def hold_outside_mask(req: Req, latents: Tensor) -> Tensor:
    """After a step: what the mask leaves alone is the starting picture at the noise level that is reached now."""
    if MASK not in req.conditioning:
        return latents
    assert req.sampler is not None and req.sampler_state is not None, "prepared at admission"
    kept = req.sampler.add_noise(req.conditioning[INITIAL_LATENTS], req.conditioning[NOISE], req.sampler_state)
    mask = req.conditioning[MASK]
    return (1 - mask) * kept + mask * latents
