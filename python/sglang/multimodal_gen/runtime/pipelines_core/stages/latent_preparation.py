"""The noise that a request starts from."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.uploads import sent
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

INITIAL_LATENTS, NOISE, MASK = "initial_latents", "noise", "mask"
"""What of `Req.conditioning` belongs to the start; the noise is kept where a mask needs it again."""


class LatentPreparationStage(Stage):
    """Latents [C, T, H, W] fp32 drawn from the request's own seed: on the CPU, so that every device starts alike."""

    name: str = "latents"
    reads: ClassVar[tuple[str, ...]] = ("params",)
    writes: ClassVar[tuple[str, ...]] = ("latent_shape", "generator", "latents")

    def __init__(self, geometry: VideoGeometry, device: torch.device) -> None:
        self.geometry = geometry
        self.device = device

    def admit(self, req: Req) -> None:
        """Raises SizeNotDivisible, SizeTooLarge or FramesNotSupported."""
        self.geometry.check(req.params)
        req.latent_shape = self.geometry.latent_shape(req.params)

    def begin(self, req: Req) -> None:
        assert req.latent_shape is not None, "planned at admission"
        if req.latents is not None:
            return
        # A stage before this one may have drawn already, such as a sample of what a picture encodes to.
        generator = request_generator(req) if req.generator is None else req.generator
        # With the batch axis, as diffusers draws: the shape is part of what a seed means.
        noise = torch.randn((1, *req.latent_shape), generator=generator, dtype=torch.float32)
        req.generator = generator
        req.latents = self._started(req, sent(noise[0], self.device))

    @staticmethod
    def _started(req: Req, noise: Tensor) -> Tensor:
        """The noise, or what the request starts from with as much of it as its first step expects."""
        initial = req.conditioning.get(INITIAL_LATENTS)
        if initial is None:
            return noise
        assert req.sampler is not None and req.sampler_state is not None, "prepared at admission"
        if MASK in req.conditioning:
            req.conditioning[NOISE] = noise
        return req.sampler.add_noise(initial, noise, req.sampler_state)


def request_generator(req: Req) -> torch.Generator:
    """The request's generator as it is before anything was drawn."""
    assert isinstance(req.params.seed, int), "each output has one seed"
    return torch.Generator("cpu").manual_seed(req.params.seed)
