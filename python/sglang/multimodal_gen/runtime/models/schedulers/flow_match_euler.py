"""Flow-match Euler: one straight step along the predicted velocity. Source: arXiv:2403.03206."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from sglang.multimodal_gen.runtime.models.schedulers.base import (
    Sampler,
    SamplerState,
    Schedule,
    check_steps,
    checked_schedule,
)
from sglang.multimodal_gen.runtime.models.schedulers.options import OptionRules, check_choice, read_options
from sglang.multimodal_gen.runtime.models.schedulers.shifting import (
    TIME_SHIFT_TYPES,
    check_shift_request,
    shifted,
    static_shift,
)

RULES = OptionRules(
    required={},
    fixed={
        "invert_sigmas": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "stochastic_sampling": False,
    },
    # The pipeline reads these to compute mu; the sampler gets only the result.
    inert=("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
)


@dataclass(frozen=True, kw_only=True)
class FlowMatchEulerOptions:
    """The options of `FlowMatchEulerDiscreteScheduler` that are implemented, with its published defaults."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None


class FlowMatchEulerSampler(Sampler):
    """First order; equal to diffusers' `FlowMatchEulerDiscreteScheduler` to the bit."""

    short_name: ClassVar[str] = "euler"
    takes_spacing: ClassVar[bool] = True

    def __init__(self, options: FlowMatchEulerOptions) -> None:
        check_choice("FlowMatchEulerDiscreteScheduler", "time_shift_type", options.time_shift_type, TIME_SHIFT_TYPES)
        self.options = options

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(
            read_options(config, options=FlowMatchEulerOptions, rules=RULES, sampler="FlowMatchEulerDiscreteScheduler")
        )

    def schedule(
        self,
        num_inference_steps: int,
        *,
        shift: float | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        options = self.options
        check_steps(num_inference_steps, sigmas, shift)
        check_shift_request(use_dynamic_shifting=options.use_dynamic_shifting, shift=shift, mu=mu)
        shift = options.shift if shift is None else shift
        if sigmas is None:
            levels = self._default_sigmas(num_inference_steps, shift)
        else:
            levels = np.asarray(sigmas, dtype=np.float32)
        levels = shifted(
            levels,
            shift=shift,
            mu=mu,
            time_shift_type=options.time_shift_type,
            shift_terminal=options.shift_terminal,
        ).astype(np.float32)
        return checked_schedule(levels * np.float32(options.num_train_timesteps), np.append(levels, np.float32(0)))

    def _default_sigmas(self, num_inference_steps: int, shift: float) -> np.ndarray:
        """[N] float64, evenly spaced between the ends of the training range, before the shift of this schedule.

        The published scheduler shifts the ends of that range once already (so its lower end is shifted twice).
        """
        num_train = self.options.num_train_timesteps
        ends = np.array([num_train, 1], dtype=np.float32) / np.float32(num_train)
        if not self.options.use_dynamic_shifting:
            ends = static_shift(ends, shift)
        first, last = ends.tolist()
        return np.linspace(first * num_train, last * num_train, num_inference_steps) / num_train

    def step(self, noise_pred: Tensor, latents: Tensor, state: SamplerState) -> Tensor:
        assert not state.finished, "a finished request was stepped"
        stepped = latents.float() + noise_pred.float() * (state.sigma(1) - state.sigma())
        state.step_index += 1
        state.order = 1
        return stepped
