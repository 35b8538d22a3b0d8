"""DPM-Solver++: an exponential integrator over the log-SNR that extrapolates from earlier predictions.

Source: arXiv:2211.01095, https://github.com/LuChengTHU/dpm-solver. Here its multistep form on flow-matching levels, for
the ODE and for the SDE, as diffusers' `DPMSolverMultistepScheduler` runs it with `prediction_type` flow_prediction.
"""

from __future__ import annotations

import itertools
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
    drawn_noise,
    weighted_sum,
)
from sglang.multimodal_gen.runtime.models.schedulers.multistep import clean_sample, log_snr, remember
from sglang.multimodal_gen.runtime.models.schedulers.options import OptionRules, check_choice, read_options
from sglang.multimodal_gen.runtime.models.schedulers.shifting import check_shift_request, static_shift

NAME = "DPMSolverMultistepScheduler"
ODE, SDE = "dpmsolver++", "sde-dpmsolver++"
# What the last level is computed from when it is the lowest one of the variance-preserving process.
_PLAIN_BETAS = {"beta_schedule": "linear", "trained_betas": None, "rescale_betas_zero_snr": False}
FEW_STEPS = 15  # below this many, the last but one step is of second order at most


@dataclass(frozen=True, kw_only=True)
class DPMSolverOptions:
    """The options of `DPMSolverMultistepScheduler` that are implemented, with its published defaults."""

    num_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    algorithm_type: str = ODE
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    beta_start: float = 0.0001
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False


class DPMSolverSampler(Sampler):
    """Order 1 to 3; the first steps have the order that the history allows, one to zero noise is of first order."""

    rules: ClassVar[OptionRules] = OptionRules(
        required={"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        fixed={
            "thresholding": False,
            # Spacings of the variance-preserving process: the published class does not bring them to flow levels.
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "use_lu_lambdas": False,
            "time_shift_type": "exponential",
            "shift_terminal": None,
            "invert_sigmas": False,
            "variance_type": None,
        },
        # All of these shape the variance-preserving process, which flow sigmas replace, or belong to thresholding.
        inert=(
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
            "timestep_spacing",
            "steps_offset",
            "dynamic_thresholding_ratio",
            "sample_max_value",
            "lambda_min_clipped",
        ),
    )
    shift_option: ClassVar[str] = "flow_shift"
    takes_sigmas: ClassVar[bool] = False

    def __init__(self, options: DPMSolverOptions) -> None:
        check_choice(NAME, "solver_order", options.solver_order, (1, 2, 3))
        check_choice(NAME, "solver_type", options.solver_type, ("midpoint", "heun"))
        check_choice(NAME, "algorithm_type", options.algorithm_type, (ODE, SDE))
        check_choice(NAME, "final_sigmas_type", options.final_sigmas_type, ("zero", "sigma_min"))
        self.options = options

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        if config.get("final_sigmas_type") == "sigma_min":
            for name, accepted in _PLAIN_BETAS.items():
                if config.get(name, accepted) != accepted:
                    raise InvalidValue(f"{NAME}.{name}", config[name], f"{accepted!r} with final_sigmas_type sigma_min")
        return cls(read_options(config, options=DPMSolverOptions, rules=cls.rules, sampler=NAME))

    @property
    def draws_noise(self) -> bool:
        return self.options.algorithm_type == SDE

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
        levels = np.flip(static_shift(unshifted, shift))[:-1]
        end = 0.0 if options.final_sigmas_type == "zero" else self._lowest_level()
        return checked_schedule(np.trunc(levels * options.num_train_timesteps), np.append(levels, end))

    def _lowest_level(self) -> float:
        """That of the variance-preserving process: the published class takes it as a flow level as it is."""
        alpha = 1 - torch.tensor(self.options.beta_start, dtype=torch.float32)
        return (((1 - alpha) / alpha) ** 0.5).item()

    def step(
        self, noise_pred: Tensor, latents: Tensor, state: SamplerState, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert not state.finished, "a finished request was stepped"
        remember(state, clean_sample(noise_pred, latents, state), limit=self.options.solver_order)
        state.order = min(len(state.history), self._highest_order(state))
        scale, weights = self._weights(state)
        terms = [(scale, latents), *zip(weights, reversed(state.history), strict=False)]
        if self.draws_noise:
            terms.append((_noise_weight(state), drawn_noise(latents, generator)))
        stepped = weighted_sum(terms)
        state.step_index += 1
        return stepped

    def _highest_order(self, state: SamplerState) -> int:
        options, num_steps = self.options, state.schedule.num_inference_steps
        remaining = num_steps - state.step_index
        lower_order_final = options.lower_order_final and num_steps < FEW_STEPS
        if remaining == 1 and (options.final_sigmas_type == "zero" or options.euler_at_final or lower_order_final):
            return 1
        if remaining == 2 and lower_order_final:
            return min(2, options.solver_order)
        return options.solver_order

    def _weights(self, state: SamplerState) -> tuple[float, tuple[float, ...]]:
        """Weights of the next step: of the sample, and of the predictions of the clean sample, newest first.

        The SDE's are the ODE's over twice the distance on the log-SNR axis, but for the sample's own.
        """
        lambdas = [log_snr(state.sigma(offset)) for offset in range(1, -state.order, -1)]
        h, *earlier = [newer - older for newer, older in itertools.pairwise(lambdas)]
        ratios = [step / h for step in earlier]
        is_sde = self.draws_noise
        distance = 2 * h if is_sde else h
        alpha = 1 - state.sigma(1)
        phi_1 = math.expm1(-distance)
        scale = state.sigma(1) / state.sigma() * (math.exp(-h) if is_sde else 1.0)
        if state.order == 1:
            return scale, (-alpha * phi_1,)
        if state.order == 2:
            slope = -0.5 * phi_1 if self.options.solver_type == "midpoint" else phi_1 / distance + 1
            weight = alpha * slope / ratios[0]
            return scale, (weight - alpha * phi_1, -weight)
        # The published SDE solver has this term's sign the other way round; equal results matter more here.
        half = -0.5 if is_sde else 0.5
        return scale, _third_order_weights(distance, ratios, alpha=alpha, half=half)


def _noise_weight(state: SamplerState) -> float:
    h = log_snr(state.sigma(1)) - log_snr(state.sigma())
    return state.sigma(1) * math.sqrt(-math.expm1(-2 * h))


def _third_order_weights(
    distance: float, ratios: Sequence[float], *, alpha: float, half: float
) -> tuple[float, float, float]:
    """The update with first and second divided differences, spelled out in the three predictions, newest first."""
    r0, r1 = ratios
    phi_1 = math.expm1(-distance)
    first = alpha * (phi_1 / distance + 1)
    second = -alpha * ((phi_1 + distance) / distance**2 - half)
    newer = (first * (1 + r0 / (r0 + r1)) + second / (r0 + r1)) / r0
    older = -(first * r0 + second) / (r0 + r1) / r1
    return newer - alpha * phi_1, older - newer, -older
