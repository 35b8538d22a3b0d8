"""UniPC: a multistep predictor, and a corrector that reuses the next step's network evaluation.

Source: arXiv:2302.04867, https://github.com/wl-zhao/UniPC. Here in its data-prediction form on flow-matching levels,
as diffusers' `UniPCMultistepScheduler` runs it for video models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue
from sglang.multimodal_gen.runtime.models.schedulers.base import (
    Sampler,
    SamplerState,
    Schedule,
    check_steps,
    checked_schedule,
    weighted_sum,
)
from sglang.multimodal_gen.runtime.models.schedulers.multistep import clean_sample, log_snr, remember
from sglang.multimodal_gen.runtime.models.schedulers.options import OptionRules, check_choice, read_options
from sglang.multimodal_gen.runtime.models.schedulers.shifting import (
    TIME_SHIFT_TYPES,
    check_shift_request,
    shifted,
)
from sglang.multimodal_gen.runtime.models.schedulers.spacing import karras

NAME = "UniPCMultistepScheduler"
FIRST_SIGMA_MARGIN = 1e-6  # at sigma = 1 the log-SNR is infinite


@dataclass(frozen=True, kw_only=True)
class UniPCOptions:
    """The options of `UniPCMultistepScheduler` that are implemented, with its published defaults."""

    num_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    final_sigmas_type: str = "zero"
    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None


class UniPCSampler(Sampler):
    """Order 1 to 3; the first steps and, with `lower_order_final`, the last ones fall back to the order they can do."""

    rules: ClassVar[OptionRules] = OptionRules(
        required={"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        fixed={
            "predict_x0": True,
            "thresholding": False,
            "solver_p": None,
            # Spacings of the variance-preserving process: the published class brings only Karras' to flow levels.
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "invert_sigmas": False,
        },
        # All of these shape the variance-preserving process, which flow sigmas replace; the two sample_* ones belong to
        # thresholding, refused above.
        inert=(
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
            "timestep_spacing",
            "steps_offset",
            "dynamic_thresholding_ratio",
            "sample_max_value",
        ),
    )
    shift_option: ClassVar[str] = "flow_shift"
    takes_sigmas: ClassVar[bool] = False

    def __init__(self, options: UniPCOptions) -> None:
        check_choice(NAME, "solver_order", options.solver_order, (1, 2, 3))
        check_choice(NAME, "solver_type", options.solver_type, ("bh1", "bh2"))
        check_choice(NAME, "time_shift_type", options.time_shift_type, TIME_SHIFT_TYPES)
        check_choice(NAME, "final_sigmas_type", options.final_sigmas_type, ("zero", "sigma_min"))
        if options.solver_order > 1 and not options.lower_order_final and options.final_sigmas_type == "zero":
            # The last step ends at sigma = 0, at an infinite distance on the log-SNR axis.
            raise InvalidValue(f"{NAME}.lower_order_final", False, "True, unless solver_order is 1")
        for name in ("sigma_min", "sigma_max") if options.use_karras_sigmas else ():
            if not getattr(options, name):
                accepted = "a number above 0 with use_karras_sigmas"
                raise InvalidValue(f"{NAME}.{name}", getattr(options, name), accepted)
        self.options = options

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(read_options(config, options=UniPCOptions, rules=cls.rules, sampler=NAME))

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
        if options.use_karras_sigmas:
            levels = self._karras_levels(num_inference_steps, shift, sigmas)
        else:
            levels = self._shifted_levels(num_inference_steps, shift, mu, sigmas)
        holds_last = options.final_sigmas_type == "sigma_min"
        end = levels[-1] if holds_last else 0
        timesteps = np.trunc(levels * options.num_train_timesteps)
        return checked_schedule(timesteps, np.append(levels, end), holds_last=holds_last)

    def _shifted_levels(
        self, num_inference_steps: int, shift: float | None, mu: float | None, sigmas: Sequence[float] | None
    ) -> np.ndarray:
        options = self.options
        if sigmas is None:
            levels = np.linspace(1, 1 / options.num_train_timesteps, num_inference_steps + 1)[:-1]
        else:
            levels = np.asarray(sigmas, dtype=np.float64)
        levels = shifted(
            levels,
            shift=options.flow_shift if shift is None else shift,
            mu=mu,
            time_shift_type=options.time_shift_type,
            shift_terminal=options.shift_terminal,
        )
        if abs(levels[0] - 1) < FIRST_SIGMA_MARGIN:
            levels[0] -= FIRST_SIGMA_MARGIN
        return levels

    def _karras_levels(
        self, num_inference_steps: int, shift: float | None, sigmas: Sequence[float] | None
    ) -> np.ndarray:
        """[N]: noise-to-signal ratios from `sigma_max` to `sigma_min`, brought to flow levels; no shift moves them."""
        for param, value in (("flow_shift", shift), ("sigmas", sigmas)):
            if value is not None:
                raise InvalidRequest(
                    f"{param}: the checkpoint's Karras noise levels leave no room for it, accepted is none", param=param
                )
        low, high = self.options.sigma_min, self.options.sigma_max
        assert low is not None and high is not None, "checked with the options"
        ratios = karras(num_inference_steps, low, high)
        return ratios / (ratios + 1)

    def step(
        self, noise_pred: Tensor, latents: Tensor, state: SamplerState, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert not state.finished, "a finished request was stepped"
        prediction = clean_sample(noise_pred, latents, state)
        sample = self._corrected(prediction, latents, state)
        remember(state, prediction, limit=self.options.solver_order)
        highest = self.options.solver_order
        if self.options.lower_order_final:
            highest = min(highest, state.schedule.num_inference_steps - state.step_index)
        state.order = min(highest, len(state.history))
        state.last_sample = sample
        stepped = sample
        if state.sigma(1) != state.sigma():  # final_sigmas_type sigma_min only corrects in its last step
            scale, weights = self._weights(state, start=0, order=state.order, corrector=False)
            stepped = weighted_sum([(scale, sample), *zip(weights, reversed(state.history), strict=False)])
        state.step_index += 1
        return stepped

    def _corrected(self, prediction: Tensor, latents: Tensor, state: SamplerState) -> Tensor:
        """The present sample, recomputed from the previous one now that its own `prediction` is known; fp32."""
        if state.last_sample is None or state.step_index - 1 in self.options.disable_corrector:
            return latents.float()
        scale, weights = self._weights(state, start=-1, order=state.order, corrector=True)
        predictions = [*list(reversed(state.history))[: state.order], prediction]
        return weighted_sum([(scale, state.last_sample), *zip(weights, predictions, strict=True)])

    def _weights(
        self, state: SamplerState, *, start: int, order: int, corrector: bool
    ) -> tuple[float, tuple[float, ...]]:
        """Weights of one step from level `start` to the next: of the sample, and of the predictions, newest first.

        The corrector's weights have one more at the end, of the prediction at the level that the step arrives at.
        """
        sigma_from, sigma_to = state.sigma(start), state.sigma(start + 1)
        lambda_from = log_snr(sigma_from)
        h = log_snr(sigma_to) - lambda_from
        ratios = [(log_snr(state.sigma(start - i)) - lambda_from) / h for i in range(1, order)]
        rho = bh_coefficients(h, ratios, solver_type=self.options.solver_type, corrector=corrector)
        alpha = 1 - sigma_to
        gain = -alpha * (-h if self.options.solver_type == "bh1" else math.expm1(-h)) if rho else 0.0
        # The differences (m_i - m_0) / r_i, spelled out in the m_i; the arrival point has r = 1.
        others = [gain * weight / ratio for weight, ratio in zip(rho, [*ratios, 1.0], strict=False)]
        newest = -alpha * math.expm1(-h) - sum(others)
        return sigma_to / sigma_from, (newest, *others)


def bh_coefficients(h: float, ratios: Sequence[float], *, solver_type: str, corrector: bool) -> list[float]:
    """The weights rho of the scaled differences, one per ratio, and for the corrector one more.

    `h`: step on the log-SNR axis. `ratios`: where the earlier levels lie, in units of `h`; negative. A first-order
    predictor and corrector, and a second-order predictor, use the paper's simplification of 1/2.
    """
    order = len(ratios) + 1
    unknowns = order if corrector else order - 1
    if unknowns <= 1:
        return [0.5] * unknowns
    denominator = -h if solver_type == "bh1" else math.expm1(-h)
    nodes = np.array([*ratios, 1.0])[:unknowns]
    phi = math.expm1(-h) / -h - 1
    factorial = 1
    right_side = []
    for power in range(1, unknowns + 1):
        right_side.append(phi * factorial / denominator)
        factorial *= power + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve(np.vander(nodes, unknowns, increasing=True).T, np.array(right_side)).tolist()
