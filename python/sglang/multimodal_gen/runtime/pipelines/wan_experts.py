"""Two transformers that share a request's steps, one for high and one for low noise.

Source: https://github.com/Wan-Video/Wan2.2
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.pipelines_core.guidance import ClassifierFreeGuidance, guidance_scale
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req


def low_noise_scale(params: SamplingParams) -> float:
    """The guidance scale of the second expert: the first one's unless the request or the model says another."""
    return guidance_scale(params) if params.guidance_scale_2 is None else params.guidance_scale_2


class LowNoiseGuidance(ClassifierFreeGuidance):
    """The second expert's guidance: on where the first one's is, with a scale of its own."""

    def __init__(self) -> None:
        super().__init__(low_noise_scale)

    def uses_negative(self, params: SamplingParams) -> bool:
        return guidance_scale(params) > 1

    def is_on(self, req: Req) -> bool:
        # At 1 the unconditional prediction would be computed to cancel out.
        return super().is_on(req) and self.scale(req.params) != 1


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The timestep from which on the first expert denoises; below it is the second one's turn."""

    ratio: float
    num_train_timesteps: int

    def high_noise_steps(self, req: Req) -> int:
        """How many of the request's steps are the first expert's."""
        state = req.sampler_state
        assert state is not None, "planned by the stage before"
        ratio = self.ratio if req.params.boundary_ratio is None else req.params.boundary_ratio
        timesteps = state.schedule.timesteps[state.first_step :]
        return int((timesteps >= ratio * self.num_train_timesteps).sum())

    def low_noise_steps(self, req: Req) -> int:
        """How many are the second one's."""
        assert req.sampler_state is not None, "planned by the stage before"
        return req.sampler_state.num_steps - self.high_noise_steps(req)
