"""Spacings: how noise levels lie between the highest and the lowest, in place of where an even spacing put them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sglang.multimodal_gen.errors import IncompatibleParameters

SPACING_OPTIONS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
"""Spacing to the option of `scheduler_config.json` that asks for it."""

_KARRAS_RHO = 7.0
_BETA_SHAPE = 0.6
_SERIES_TERMS = 60  # the series is read up to 1/2, so the first term left out is below 2^-60
_BISECTIONS = 64


def options_of(spacing: str) -> dict[str, bool]:
    """The options that ask for this spacing and no other."""
    return {option: name == spacing for name, option in SPACING_OPTIONS.items()}


def chosen_spacing(options: Mapping[str, bool], *, sampler: str) -> str | None:
    """The spacing that these options ask for. Raises IncompatibleParameters when there are several."""
    chosen = [name for name, option in SPACING_OPTIONS.items() if options.get(option)]
    if len(chosen) > 1:
        names = ", ".join(SPACING_OPTIONS[name] for name in chosen)
        raise IncompatibleParameters(f"{sampler}: {names} are all true, accepted is one of them", param=sampler)
    return chosen[0] if chosen else None


def spaced(
    levels: np.ndarray, spacing: str, *, lowest: float | None = None, highest: float | None = None
) -> np.ndarray:
    """[N] levels in any float type -> [N] float64 between the same ends, or between those given."""
    low = levels[-1].item() if lowest is None else lowest
    high = levels[0].item() if highest is None else highest
    if spacing == "karras":
        return karras(len(levels), low, high)
    if spacing == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), len(levels)))
    assert spacing == "beta", f"no such spacing: {spacing}"
    return low + beta_quantiles(1 - np.linspace(0, 1, len(levels)), shape=_BETA_SHAPE) * (high - low)


def karras(num_levels: int, low: float, high: float) -> np.ndarray:
    """[N] float64, even in the seventh root. Source: arXiv:2206.00364, equation 5."""
    first, last = high ** (1 / _KARRAS_RHO), low ** (1 / _KARRAS_RHO)
    return (first + np.linspace(0, 1, num_levels) * (last - first)) ** _KARRAS_RHO


def beta_quantiles(probabilities: np.ndarray, *, shape: float) -> np.ndarray:
    """Where Beta(shape, shape) reaches these probabilities, within 1e-15. Source: arXiv:2407.12173 for its use.

    The distribution is symmetric, so only the half below 1/2 is inverted, by bisection: there its CDF has a power
    series that converges fast.
    """
    wanted = np.minimum(probabilities, 1 - probabilities)
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_below = _beta_cdf(middle, shape) < wanted
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return np.where(probabilities <= 0.5, high, 1 - high)


def _beta_cdf(x: np.ndarray, shape: float) -> np.ndarray:
    """The regularised incomplete beta function of equal shapes for 0 <= x <= 1/2, by its power series at 0."""
    counts = np.arange(_SERIES_TERMS)
    rising = np.cumprod(np.concatenate([[1.0], (counts[1:] - shape) / counts[1:]]))
    normaliser = math.exp(2 * math.lgamma(shape) - math.lgamma(2 * shape))
    return x**shape * np.polynomial.polynomial.polyval(x, rising / (shape + counts)) / normaliser
