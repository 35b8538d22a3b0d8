"""What an LTX-Video clip starts from and ends in: given frames that stay, and a decoder that removes the last noise.

Source: arXiv:2501.00103, https://github.com/Lightricks/LTX-Video

What is given for another frame than the first stands before the clip as frames of its own while the transformer works,
with the positions that it is meant for: a picture, or the first two latent frames of a video, whose others are in the
clip.

Shapes: C latent channels, T, h, w latent frames, height, width, t given latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.errors import IncompatibleParameters, InvalidValue
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.layers.uploads import sent, uploaded
from sglang.multimodal_gen.runtime.models.vaes.ltx_vae import AutoencoderKLLTXVideo
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import clip_of
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import request_generator

GIVEN = "given_latents"
"""Latents [C, t, h, w] fp32 of what is given, ordered as `given_frames`; with noise where `strength` is below 1."""
HELD = "held_latents"
"""The same as the present step has them, with noise in them."""
_HELD_AT = "held_at"
_LEADING = "leading_frames"
_GIVEN_AT = "given_frames_at"
_DECODE_NOISE = "decode_noise"
_FULL_STRENGTH = 1.0 - 1e-6
_LEADING_VIDEO_FRAMES = 2


class GivenFramesStage(Stage):
    """Encodes the picture or video that a clip begins with or comes to, and the picture that it ends with.

    What counts is a sample of what they encode to.

    Whether the noise or this sample is drawn first is the stages' order, which is a part of what a seed means.
    """

    name: str = "image_encode"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs", "generator", "latents")
    writes: ClassVar[tuple[str, ...]] = ("strength", "conditioning", "generator")

    def __init__(
        self,
        vae: AutoencoderKLLTXVideo,
        *,
        geometry: VideoGeometry,
        memory: DecoderMemory,
    ) -> None:
        self.vae = vae
        self.dtype, self.device = vae.dtype, compute_device(vae)
        self.geometry = geometry
        self.memory = memory

    def admit(self, req: Req) -> None:
        """Raises IncompatibleParameters for a picture and a video, or the frame of neither, InvalidValue for a frame
        that the clip does not have."""
        params, inputs = req.params, req.inputs
        if inputs.images and inputs.video is not None:
            raise IncompatibleParameters(
                "image, video: got both, accepted is one of them, which the clip begins with", param="video"
            )
        if params.frame_index is not None and not inputs.images and inputs.video is None:
            raise IncompatibleParameters(
                f"frame_index: got {params.frame_index}, accepted is frame_index with an image or a video",
                param="frame_index",
            )
        assert params.num_frames is not None, "the family has a default"
        if not 0 <= frame_index(req) < params.num_frames:
            raise InvalidValue("frame_index", frame_index(req), f"a frame from 0 to {params.num_frames - 1}")
        if params.denoise_strength is not None:
            if params.denoise_strength * (params.num_inference_steps or 0) < 1:
                raise InvalidValue(
                    "denoise_strength",
                    params.denoise_strength,
                    f"one that leaves a step of num_inference_steps {params.num_inference_steps}",
                )
            req.strength = params.denoise_strength
        leading, own = self._places(req)
        held = [*range(len(leading)), *(len(leading) + frame for frame in own)]
        if held:
            req.conditioning |= {_LEADING: torch.tensor(leading, dtype=torch.long), _GIVEN_AT: torch.tensor(held)}

    def phase(self, req: Req) -> Phase | None:
        """One unit; None for a clip from a text alone."""
        num_frames = max(self.num_frames(req), int(req.inputs.last_image is not None))
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
            peak_bytes=self.memory.encoding_bytes(
                self.vae.strips, num_frames, height, width, ratio=self.geometry.spatial_ratio
            ),
        )

    def num_frames(self, req: Req) -> int:
        """Frames of the picture or video: of a video as many as fit and make whole latent frames."""
        if req.inputs.video is None:
            return len(req.inputs.images)
        assert req.params.num_frames is not None, "checked by the stages before"
        usable = min(len(req.inputs.video), req.params.num_frames - frame_index(req))
        return (usable - 1) // self.geometry.temporal_ratio * self.geometry.temporal_ratio + 1

    def _places(self, req: Req) -> tuple[list[int], list[int]]:
        """Frame numbers of the latent frames that stand before the clip, and those of the clip that are given."""
        assert req.params.num_frames is not None, "checked at admission"
        ratio, first = self.geometry.temporal_ratio, frame_index(req)
        num_frames = self.num_frames(req)
        num_latent = (num_frames - 1) // ratio + 1 if num_frames else 0
        leading: list[int] = []
        own = list(range(num_latent))
        if first:
            num_leading = min(num_latent, _LEADING_VIDEO_FRAMES)
            leading = [first + max(0, (frame - 1) * ratio + 1) for frame in range(num_leading)]
            own = [first // ratio + frame for frame in range(num_leading, num_latent)]
        if req.inputs.last_image is not None:
            leading.append(req.params.num_frames - 1)
        return leading, own

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
        _, own = self._places(req)
        before: list[Tensor] = []
        within: list[Tensor] = []
        if self.num_frames(req):
            frames = req.inputs.images if req.inputs.video is None else req.inputs.video[: self.num_frames(req)]
            latents = self._sample(list(frames), req, generator)
            split = latents.shape[1] - len(own)
            if split:
                before.append(_weakened(latents[:, :split], req, generator))
            if own:
                within.append(_weakened(latents[:, split:], req, self._noise_at(own, req)))
        if req.inputs.last_image is not None:
            before.append(_weakened(self._sample([req.inputs.last_image], req, generator), req, generator))
        return torch.cat([*before, *within], dim=1), generator

    @staticmethod
    def _noise_at(frames: list[int], req: Req) -> Tensor | None:
        """The clip's noise at these frames, where it was drawn already: no other requests have a strength."""
        return None if req.latents is None else req.latents[:, frames]

    def _sample(self, frames: list[np.ndarray], req: Req, generator: torch.Generator) -> Tensor:
        """T pictures uint8 [H, W, 3] -> latents [C, t, h, w]."""
        width, height = req.params.width, req.params.height
        assert width is not None and height is not None, "checked by the stages before"
        video = clip_of(frames, height, width).to(self.device, self.dtype)
        return self.vae.to_latents(video, generator=generator)[0]


def _weakened(latents: Tensor, req: Req, noise: Tensor | torch.Generator | None) -> Tensor:
    """Latents [C, t, h, w] of what is given -> with as much noise as `strength` leaves out; a generator draws it."""
    if isinstance(noise, torch.Generator):
        noise = torch.randn((1, *latents.shape), generator=noise)[0].to(latents.device)
    weight = strength(req)
    if weight > _FULL_STRENGTH:
        return latents
    assert noise is not None, "pipelines that take a strength draw the noise first"
    return torch.lerp(noise, latents.float(), weight)


class FirstFramesStage(Stage):
    """Puts the given frames in the place of their noise, and a last picture before all."""

    name: str = "first_frames"
    reads: ClassVar[tuple[str, ...]] = ("conditioning", "latents")
    writes: ClassVar[tuple[str, ...]] = ("latents",)

    def begin(self, req: Req) -> None:
        assert req.latents is not None and req.latent_shape is not None, "drawn by the stages before"
        num_leading = len(leading_frames(req))
        if num_leading and req.latents.shape[1] == req.latent_shape[1]:
            req.latents = torch.cat((req.conditioning[GIVEN][:, :num_leading], req.latents), dim=1)
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
    """The decoder's latents [1, C, T, h, w] with as much of the request's noise mixed in as it says."""
    params = req.params
    scale = decode_timestep(req) if params.decode_noise_scale is None else params.decode_noise_scale
    return (1 - scale) * latents + scale * req.conditioning[_DECODE_NOISE].float()


def decode_timestep(req: Req) -> float:
    """What a decoder that takes a timestep is told."""
    return req.params.decode_timestep or 0.0


def strength(req: Req) -> float:
    """How much of what is given counts; below 1 it is let go when the noise has fallen to what it has itself."""
    return 1.0 if req.params.strength is None else req.params.strength


def frame_index(req: Req) -> int:
    """The frame of the clip that the picture or the video is given for."""
    return req.params.frame_index or 0


def leading_frames(req: Req) -> list[int]:
    """The frame numbers of the latent frames that stand before the clip's own."""
    return req.conditioning[_LEADING].tolist() if _LEADING in req.conditioning else []


def given_frames(req: Req) -> list[int]:
    """Which of all latent frames, the leading ones first, are given."""
    return req.conditioning[_GIVEN_AT].tolist() if _GIVEN_AT in req.conditioning else []


def given_timestep(req: Req, timestep: float) -> float:
    """What the transformer is told of given frames where others are at `timestep`."""
    return min(timestep, (1.0 - strength(req)) * 1000.0)


def with_given_frames(req: Req, latents: Tensor) -> Tensor:
    """Latents [C, T, h, w] with the given frames in their places."""
    given = req.conditioning.get(HELD, req.conditioning.get(GIVEN))
    if given is None:
        return latents
    places = uploaded(given_frames(req), latents.device, dtype=torch.long)
    return latents.index_copy(1, places, given.to(latents.dtype))


def after_step(req: Req, latents: Tensor) -> Tensor:
    """The same after a step that holds them; after the last one without what stands before the clip."""
    state = req.sampler_state
    assert state is not None, "prepared at admission"
    taken = state.schedule.timesteps[state.step_index - 1].item()
    if taken / 1000.0 - 1e-6 >= 1.0 - strength(req):
        latents = with_given_frames(req, latents)
    return latents[:, len(leading_frames(req)) :] if state.finished else latents


def add_noise_to_given_frames(req: Req) -> None:
    """Before a step: give the given frames fresh noise, less and less of it, so that what follows may move.

    Once for each step, whatever is called again. The noise has the size of the whole clip, in the order of its tokens.
    Frames that have noise of their own get none of it.
    """
    state = req.sampler_state
    assert req.latents is not None and req.generator is not None and state is not None, "prepared before"
    scale = req.params.image_cond_noise_scale or 0.0
    if GIVEN not in req.conditioning or scale == 0:
        return
    if _HELD_AT in req.conditioning and int(req.conditioning[_HELD_AT]) == state.step_index:
        return
    given, shape = req.conditioning[GIVEN], req.latents.shape
    clip = torch.randn((1, req.latents[0].numel(), shape[0]), generator=req.generator, dtype=torch.float32)
    req.conditioning[_HELD_AT] = torch.tensor(state.step_index)
    if strength(req) > _FULL_STRENGTH:
        noise = sent(clip[0].T.reshape(shape)[:, given_frames(req)], given.device)
        req.conditioning[HELD] = given + scale * noise * (state.timestep / 1000.0) ** 2
        req.latents = with_given_frames(req, req.latents)
