"""DPM-Solver++: an exponential integrator over the log-SNR that extrapolates from earlier predictions.

Source: arXiv:2211.01095, https://github.com/LuChengTHU/dpm-solver. Here its deterministic multistep form on
flow-matching levels, as diffusers' `DPMSolverMultistepScheduler` runs it with `prediction_type` flow_prediction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from sglang.multimodal_gen.errors import InvalidRequest
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
from sglang.multimodal_gen.runtime.models.schedulers.shifting import check_shift_request, static_shift

NAME = "DPMSolverMultistepScheduler"
RULES = OptionRules(
    required={"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    fixed={
        "algorithm_type": "dpmsolver++",
        "thresholding": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "final_sigmas_type": "zero",
        "time_shift_type": "exponential",
        "variance_type": None,
    },
    # All of these shape the variance-preserving process, which flow sigmas replace, or belong to thresholding.
    # euler_at_final asks for a first-order last step, which a schedule that ends at zero has anyway.
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
        "lambda_min_clipped",
        "euler_at_final",
    ),
)
FEW_STEPS = 15  # below this many, the last but one step is of second order at most


@dataclass(frozen=True, kw_only=True)
class DPMSolverOptions:
    """The options of `DPMSolverMultistepScheduler` that are implemented, with its published defaults."""

    num_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False


class DPMSolverSampler(Sampler):
    """Order 1 to 3; the first steps have the order that the history allows, the last one is of first order."""

    short_name: ClassVar[str] = "dpmpp_2m"

    def __init__(self, options: DPMSolverOptions) -> None:
        check_choice(NAME, "solver_order", options.solver_order, (1, 2, 3))
        check_choice(NAME, "solver_type", options.solver_type, ("midpoint", "heun"))
        self.options = options

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(read_options(config, options=DPMSolverOptions, rules=RULES, sampler=NAME))

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
        if sigmas is not None:
            raise InvalidRequest(f"sigmas: {NAME} takes no custom noise levels; use another sampler", param="sigmas")
        if mu is not None:
            shift = np.exp(mu)
        elif shift is None:
            shift = options.flow_shift
        unshifted = 1.0 - np.linspace(1, 1 / options.num_train_timesteps, num_inference_steps + 1)
        levels = np.flip(static_shift(unshifted, shift))  # down to exactly 0
        return checked_schedule(np.trunc(levels[:-1] * options.num_train_timesteps), levels)

    def step(self, noise_pred: Tensor, latents: Tensor, state: SamplerState) -> Tensor:
        assert not state.finished, "a finished request was stepped"
        remember(state, clean_sample(noise_pred, latents, state), limit=self.options.solver_order)
        state.order = min(len(state.history), self._highest_order(state))
        scale, weights = self._weights(state)
        predictions = reversed(state.history)
        stepped = weighted_sum([(scale, latents), *zip(weights, predictions, strict=False)])
        state.step_index += 1
        return stepped

    def _highest_order(self, state: SamplerState) -> int:
        num_steps = state.schedule.num_inference_steps
        remaining = num_steps - state.step_index
        if remaining == 1:
            return 1
        if remaining == 2 and self.options.lower_order_final and num_steps < FEW_STEPS:
            return min(2, self.options.solver_order)
        return self.options.solver_order

    def _weights(self, state: SamplerState) -> tuple[float, tuple[float, ...]]:
        """Weights of the next step: of the sample, and of the predictions of the clean sample, newest first."""
        lambdas = [log_snr(state.sigma(offset)) for offset in range(1, -state.order, -1)]
        h, *earlier = [newer - older for newer, older in itertools.pairwise(lambdas)]
        ratios = [step / h for step in earlier]
        alpha = 1 - state.sigma(1)
        phi_1 = math.expm1(-h)
        scale = state.sigma(1) / state.sigma()
        if state.order == 1:
            return scale, (-alpha * phi_1,)
        if state.order == 2:
            slope = -0.5 * phi_1 if self.options.solver_type == "midpoint" else phi_1 / h + 1
            weight = alpha * slope / ratios[0]
            return scale, (weight - alpha * phi_1, -weight)
        return scale, _third_order_weights(h, ratios, alpha=alpha)


def _third_order_weights(h: float, ratios: Sequence[float], *, alpha: float) -> tuple[float, float, float]:
    """The update with first and second divided differences, spelled out in the three predictions, newest first."""
    r0, r1 = ratios
    phi_1 = math.expm1(-h)
    first = alpha * (phi_1 / h + 1)
    second = -alpha * ((phi_1 + h) / h**2 - 0.5)
    newer = (first * (1 + r0 / (r0 + r1)) + second / (r0 + r1)) / r0
    older = -(first * r0 + second) / (r0 + r1) / r1
    return newer - alpha * phi_1, older - newer, -older
