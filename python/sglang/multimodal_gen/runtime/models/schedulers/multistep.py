"""What the multistep solvers share: the log-SNR axis on which they extrapolate, and the history they keep.

Their updates are linear in the sample and in the predictions of the clean sample, so each solver only computes the
scalar weights, in float64 on the CPU, and the device does one multiply-add per tensor.
"""

from __future__ import annotations

import math

from torch import Tensor

from sglang.multimodal_gen.runtime.models.schedulers.base import SamplerState


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), half the log signal-to-noise ratio; infinite at sigma = 0."""
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def clean_sample(noise_pred: Tensor, latents: Tensor, state: SamplerState) -> Tensor:
    """What the prediction at the present step says of the clean sample: x0 = x - sigma * v, fp32.

    Inverted schedules: x0 = x + (1 - sigma) * v.
    """
    if state.schedule.is_inverted:
        return latents.float() + noise_pred.float() * (1 - state.sigma())
    return latents.float() - noise_pred.float() * state.sigma()


def remember(state: SamplerState, prediction: Tensor, *, limit: int) -> None:
    """Appends to the history and forgets what no later step of order `limit` reads."""
    state.history = [*state.history, prediction][-limit:]
