"""Flow-match Euler: one straight step along the predicted velocity, or to the clean sample and back by fresh noise.

Source: arXiv:2403.03206; arXiv:2310.04378 for the latent consistency model, whose steps are of the second kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.errors import IncompatibleParameters
from sglang.multimodal_gen.runtime.models.schedulers.base import (
    Sampler,
    SamplerState,
    Schedule,
    check_steps,
    checked_schedule,
    drawn_noise,
)
from sglang.multimodal_gen.runtime.models.schedulers.multistep import clean_sample
from sglang.multimodal_gen.runtime.models.schedulers.options import OptionRules, check_choice, read_options
from sglang.multimodal_gen.runtime.models.schedulers.shifting import (
    TIME_SHIFT_TYPES,
    check_shift_request,
    shifted,
    static_shift,
)
from sglang.multimodal_gen.runtime.models.schedulers.spacing import chosen_spacing, spaced

NAME = "FlowMatchEulerDiscreteScheduler"
LCM_NAME = "FlowMatchLCMScheduler"
# The pipeline reads these to compute mu; the sampler gets only the result.
_FOR_THE_PIPELINE = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


@dataclass(frozen=True, kw_only=True)
class FlowMatchOptions:
    """The options that both classes have, with their published defaults.

    `sigma_min` and `sigma_max` are no options of theirs, but a config may carry them: the ends of the other spacings.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    invert_sigmas: bool = False


@dataclass(frozen=True, kw_only=True)
class FlowMatchEulerOptions(FlowMatchOptions):
    """The options of `FlowMatchEulerDiscreteScheduler`."""

    stochastic_sampling: bool = False


class FlowMatchEulerSampler(Sampler):
    """First order; equal to diffusers' `FlowMatchEulerDiscreteScheduler` to the bit."""

    rules: ClassVar[OptionRules] = OptionRules(required={}, fixed={}, inert=_FOR_THE_PIPELINE)
    published_name: ClassVar[str] = NAME

    def __init__(self, options: FlowMatchEulerOptions) -> None:
        check_choice(self.published_name, "time_shift_type", options.time_shift_type, TIME_SHIFT_TYPES)
        self.spacing = chosen_spacing(asdict(options), sampler=self.published_name)
        if options.invert_sigmas and options.stochastic_sampling:
            raise IncompatibleParameters(
                f"{self.published_name}.invert_sigmas: True, accepted is False for a sampler that draws noise",
                param=f"{self.published_name}.invert_sigmas",
            )
        self.options = options

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(read_options(config, options=FlowMatchEulerOptions, rules=cls.rules, sampler=cls.published_name))

    @property
    def draws_noise(self) -> bool:
        return self.options.stochastic_sampling

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
        )
        if self.spacing is not None:
            levels = spaced(levels, self.spacing, lowest=options.sigma_min, highest=options.sigma_max)
        levels = levels.astype(np.float32)
        if options.invert_sigmas:
            levels = 1 - levels
        end = np.float32(1 if options.invert_sigmas else 0)
        return checked_schedule(levels * np.float32(options.num_train_timesteps), np.append(levels, end))

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

    def step(
        self, noise_pred: Tensor, latents: Tensor, state: SamplerState, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert not state.finished, "a finished request was stepped"
        if self.draws_noise:
            noise, level = drawn_noise(latents, generator), state.sigma(1)
            stepped = (1 - level) * clean_sample(noise_pred, latents, state) + level * noise
        else:
            stepped = latents.float() + noise_pred.float() * (state.sigma(1) - state.sigma())
        state.step_index += 1
        state.order = 1
        return stepped


class FlowMatchLCMSampler(FlowMatchEulerSampler):
    """Steps of a latent consistency model, each to the clean sample; equal to diffusers' `FlowMatchLCMScheduler`."""

    rules: ClassVar[OptionRules] = OptionRules(
        required={},
        # Between scales the latents would change their size in the middle of a request.
        fixed={"scale_factors": None},
        inert=(*_FOR_THE_PIPELINE, "upscale_mode"),
    )
    published_name: ClassVar[str] = LCM_NAME

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        options = read_options(config, options=FlowMatchOptions, rules=cls.rules, sampler=cls.published_name)
        return cls(FlowMatchEulerOptions(**asdict(options), stochastic_sampling=True))
