"""What an LTX-Video clip starts from and ends in: given frames that stay, and a decoder that removes the last noise.

Source: arXiv:2501.00103, https://github.com/Lightricks/LTX-Video

A picture that the clip ends with stands before all others as a frame of its own while the transformer works, with the
position of the last; so what is given always comes first.

Shapes: C latent channels, T, h, w latent frames, height, width, t given latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.errors import IncompatibleParameters
from sglang.multimodal_gen.runtime.models.vaes.library_vae import LibraryAutoencoder, WholeClip
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import clip_of
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import request_generator

GIVEN = "given_frames"
"""Latents [C, t, h, w] fp32 of a last picture, if there is one, and of what the clip begins with."""
HELD = "held_frames"
"""The same as the present step has them, with noise in them."""
_HELD_AT = "held_at"
_DECODE_NOISE = "decode_noise"


@dataclass(frozen=True)
class LTXClip(WholeClip):
    """Knows its request's seed as well, for decoders that draw random numbers."""

    seed: int = 0


class LTXAutoencoder(LibraryAutoencoder):
    """AutoencoderKLLTXVideo; the files hold mean and std of each latent channel."""

    def __init__(self, vae: nn.Module) -> None:
        values: Any = vae
        super().__init__(
            vae,
            mean=values.latents_mean,
            std=values.latents_std,
            spatial_ratio=values.spatial_compression_ratio,
            is_video=True,
        )

        self.injects_noise = any(values.config.decoder_inject_noise)

    def normalise(self, latents: Tensor) -> Tensor:
        """In fp32, as the transformer's latents are."""
        return super().normalise(latents.float())

    def denormalise(self, latents: Tensor) -> Tensor:
        """What `decoder_latents` gives is what the decoder takes."""
        return latents

    def decoder_latents(self, latents: Tensor) -> Tensor:
        """Latents [C, T, h, w] fp32 of the transformer -> of the decoder, before noise is mixed in."""
        return super().denormalise(latents)

    def decode_next(self, latents: Tensor, state: WholeClip) -> Tensor:
        """See LibraryAutoencoder."""
        if not self.injects_noise:
            return super().decode_next(latents, state)
        # The 0.9.1 decoder draws from torch's global generator; a request's seed should decide all the same.
        assert isinstance(state, LTXClip), "made by the pipeline"
        with torch.random.fork_rng():
            torch.manual_seed(state.seed)
            return super().decode_next(latents, state)


class GivenFramesStage(Stage):
    """Encodes the picture, or the beginning of a video, that a clip begins with, and the picture that it ends with.

    What counts is a sample of what they encode to.

    Whether the noise or this sample is drawn first is the stages' order, which is a part of what a seed means.
    """

    name: str = "image_encode"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs", "generator")
    writes: ClassVar[tuple[str, ...]] = ("conditioning", "generator")

    def __init__(
        self,
        autoencoder: LTXAutoencoder,
        *,
        geometry: VideoGeometry,
        memory: DecoderMemory,
    ) -> None:
        self.autoencoder = autoencoder
        self.geometry = geometry
        self.memory = memory

    def admit(self, req: Req) -> None:
        """Raises IncompatibleParameters for a picture and a video."""
        if req.inputs.images and req.inputs.video is not None:
            raise IncompatibleParameters(
                "image, video: got both, accepted is one of them, which the clip begins with", param="video"
            )

    def phase(self, req: Req) -> Phase | None:
        """One unit; None for a clip from a text alone."""
        num_frames = max(self.num_frames(req), num_leading_frames(req))
        if num_frames == 0:
            return None
        height, width = req.params.height, req.params.width
        assert height is not None and width is not None, "checked by the stages before"
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,  # each is encoded for itself
            cost=float(num_frames * height * width) / self.geometry.spatial_ratio**2,
            peak_bytes=self.memory.chunk_bytes(num_frames, height, width),
        )

    def num_frames(self, req: Req) -> int:
        """Frames that the clip begins with: of a video as many as fit and make whole latent frames."""
        if req.inputs.video is None:
            return len(req.inputs.images)
        assert req.params.num_frames is not None, "checked by the stages before"
        usable = min(len(req.inputs.video), req.params.num_frames)
        return (usable - 1) // self.geometry.temporal_ratio * self.geometry.temporal_ratio + 1

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        encoded = [self._encoded(req) for req in requests]
        for req, (latents, generator) in zip(requests, encoded, strict=True):
            req.conditioning[GIVEN] = latents
            req.generator = generator
        return []

    def _encoded(self, req: Req) -> tuple[Tensor, torch.Generator]:
        """Latents [C, t, h, w], and the generator after the draws; the request's own stays as it is."""
        generator = torch.Generator("cpu")
        generator.set_state((req.generator or request_generator(req)).get_state())
        parts: list[Tensor] = []
        if self.num_frames(req):
            frames = req.inputs.images if req.inputs.video is None else req.inputs.video[: self.num_frames(req)]
            parts.append(self._sample(list(frames), req, generator))
        if req.inputs.last_image is not None:
            parts.insert(0, self._sample([req.inputs.last_image], req, generator))
            # Noise that a weaker last picture would be mixed with; at full strength only the draw is left of it.
            torch.randn((1, *parts[0].shape), generator=generator)
        return torch.cat(parts, dim=1), generator

    def _sample(self, frames: list[np.ndarray], req: Req, generator: torch.Generator) -> Tensor:
        """T pictures uint8 [H, W, 3] -> latents [C, t, h, w]."""
        width, height = req.params.width, req.params.height
        assert width is not None and height is not None, "checked by the stages before"
        return self.autoencoder.to_latents(clip_of(frames, height, width), generator=generator)[0]


class FirstFramesStage(Stage):
    """Puts the given frames in the place of their noise, and a last picture before all."""

    name: str = "first_frames"
    reads: ClassVar[tuple[str, ...]] = ("conditioning", "latents")
    writes: ClassVar[tuple[str, ...]] = ("latents",)

    def begin(self, req: Req) -> None:
        assert req.latents is not None and req.latent_shape is not None, "drawn by the stages before"
        if req.latents.shape[1] == req.latent_shape[1]:
            leading = req.latents[:, : num_leading_frames(req)]  # replaced right away
            req.latents = torch.cat((leading, req.latents), dim=1)
        req.latents = with_given_frames(req, req.latents)


class DecodeNoiseStage(Stage):
    """Draws, after denoising, the noise that is mixed into the latents of a decoder which is told a timestep."""

    name: str = "decode_noise"
    reads: ClassVar[tuple[str, ...]] = ("generator", "latents")
    writes: ClassVar[tuple[str, ...]] = ("conditioning",)

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: that of the random numbers, which are others in another one."""
        self.dtype = dtype

    def begin(self, req: Req) -> None:
        if _DECODE_NOISE in req.conditioning:
            return
        assert req.generator is not None and req.latents is not None, "the starting noise was drawn"
        noise = torch.randn((1, *req.latents.shape), generator=req.generator, dtype=self.dtype)
        req.conditioning[_DECODE_NOISE] = noise[0].to(req.latents.device)


def with_decode_noise(req: Req, latents: Tensor) -> Tensor:
    """The decoder's latents [C, T, h, w] with as much of the request's noise mixed in as it says."""
    params = req.params
    scale = decode_timestep(req) if params.decode_noise_scale is None else params.decode_noise_scale
    return (1 - scale) * latents + scale * req.conditioning[_DECODE_NOISE].float()


def decode_timestep(req: Req) -> float:
    """What a decoder that takes a timestep is told."""
    return req.params.decode_timestep or 0.0


def num_given_frames(req: Req) -> int:
    """Latent frames at the beginning that are no noise."""
    return req.conditioning[GIVEN].shape[1] if GIVEN in req.conditioning else 0


def num_leading_frames(req: Req) -> int:
    """Latent frames that stand before the clip's own: one where a last picture is given."""
    return int(req.inputs.last_image is not None)


def with_given_frames(req: Req, latents: Tensor) -> Tensor:
    """Latents [C, T, h, w] whose first frames are the given ones."""
    given = req.conditioning.get(HELD, req.conditioning.get(GIVEN))
    return latents if given is None else torch.cat((given, latents[:, given.shape[1] :]), dim=1)


def after_step(req: Req, latents: Tensor) -> Tensor:
    """The same after a step; after the last one without what stands before the clip."""
    assert req.sampler_state is not None, "prepared at admission"
    latents = with_given_frames(req, latents)
    return latents[:, num_leading_frames(req) :] if req.sampler_state.finished else latents


def add_noise_to_given_frames(req: Req) -> None:
    """Before a step: give the given frames fresh noise, less and less of it, so that what follows may move.

    Once for each step, whatever is called again. The noise has the size of the whole clip, in the order of its tokens.
    """
    state = req.sampler_state
    assert req.latents is not None and req.generator is not None and state is not None, "prepared before"
    scale = req.params.image_cond_noise_scale or 0.0
    if GIVEN not in req.conditioning or scale == 0:
        return
    if _HELD_AT in req.conditioning and int(req.conditioning[_HELD_AT]) == state.step_index:
        return
    given = req.conditioning[GIVEN]
    channels, num_frames, height, width = given.shape
    clip = torch.randn((1, req.latents[0].numel(), channels), generator=req.generator, dtype=torch.float32)
    noise = clip[0, : num_frames * height * width].T.reshape(given.shape).to(given.device)
    req.conditioning[HELD] = given + scale * noise * (state.timestep / 1000.0) ** 2
    req.conditioning[_HELD_AT] = torch.tensor(state.step_index)
    req.latents = with_given_frames(req, req.latents)
