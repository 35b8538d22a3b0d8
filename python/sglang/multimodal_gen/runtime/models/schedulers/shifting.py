"""Timestep shift: the one home of every map that moves noise levels towards 1 for large pictures.

Arrays are float64 unless the caller's are not; nothing here casts, so that the results agree with diffusers to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue

TIME_SHIFT_TYPES = ("exponential", "linear")


def static_shift(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """shift * s / (1 + (shift - 1) * s). Source: arXiv:2403.03206, section 5.3.2."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(sigmas: np.ndarray, mu: float, kind: str) -> np.ndarray:
    """The same map as a function of `mu`, which a pipeline derives from the number of image tokens.

    Source: https://github.com/black-forest-labs/flux (exponential: shift = e^mu; linear: shift = mu).

    Raises: InvalidValue when that shift is 0 or less.
    """
    if kind == "linear" and mu <= 0:
        raise InvalidValue("mu", mu, "a number above 0 for this model, whose shift it is itself")
    strength = math.exp(mu) if kind == "exponential" else mu
    return strength / (strength + (1 / sigmas - 1))


def stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Stretched away from 1 so that the last level is `terminal`. Source: https://github.com/Lightricks/LTX-Video"""
    complement = 1 - sigmas
    if complement[-1] == 0 and len(sigmas) > 1:
        raise InvalidRequest(
            "width, height, num_frames: the shift that this model takes for so many tokens leaves nothing but noise at "
            f"all {len(sigmas)} steps; accepted are fewer",
            param="num_frames",
        )
    if complement[-1] == 0:
        raise InvalidRequest(
            f"num_inference_steps: {len(sigmas)} is too few for shift_terminal={terminal}, accepted is 2 or more",
            param="num_inference_steps",
        )
    scale = complement[-1] / (1 - terminal)
    return 1 - complement / scale


def shifted(
    sigmas: np.ndarray, *, shift: float, mu: float | None, time_shift_type: str, shift_terminal: float | None
) -> np.ndarray:
    """All shifts of one schedule in order; `mu` None means the static one."""
    moved = static_shift(sigmas, shift) if mu is None else dynamic_shift(sigmas, mu, time_shift_type)
    return stretch_to_terminal(moved, shift_terminal) if shift_terminal else moved


def check_shift_request(*, use_dynamic_shifting: bool, shift: float | None, mu: float | None) -> None:
    """Raises InvalidRequest unless the kind of shift asked for is the kind that the checkpoint's config uses."""
    if use_dynamic_shifting and shift is not None:
        raise InvalidRequest(
            f"flow_shift: got {shift}, but this model derives its shift from the size; leave flow_shift unset",
            param="flow_shift",
        )
    if use_dynamic_shifting and mu is None:
        raise InvalidRequest("mu: missing; the scheduler config says use_dynamic_shifting", param="mu")
    if not use_dynamic_shifting and mu is not None:
        raise InvalidRequest(
            f"mu: got {mu}, but this model's shift is flow_shift, since the scheduler config does not say "
            "use_dynamic_shifting; leave mu unset",
            param="mu",
        )


def resolution_mu(num_tokens: int, config: Mapping[str, Any]) -> float:
    """The dynamic shift's `mu` for a picture of so many tokens: a line through two points of the scheduler's config.

    Source: https://github.com/black-forest-labs/flux
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return num_tokens * slope + (low - slope * few)


def spaced_to_last(num_steps: int) -> np.ndarray:
    """1, …, 1/N: N noise levels, of which the last is one step away from the end."""
    return np.linspace(1.0, 1 / num_steps, num_steps)


def spaced_to_end(num_steps: int) -> np.ndarray:
    """1, …, 1/N: the first N of N + 1 noise levels that are evenly spaced down to 0."""
    return np.linspace(1.0, 0.0, num_steps + 1)[:-1]


def linear_then_quadratic(num_steps: int, *, threshold: float = 0.025) -> np.ndarray:
    """N noise levels from 1: the first half of the steps covers `threshold` evenly, the others grow larger and larger.

    Source: arXiv:2410.13720, https://github.com/Lightricks/LTX-Video
    """
    if num_steps < 2:
        return np.ones(1)
    linear = num_steps // 2
    quadratic = num_steps - linear
    steps = np.arange(num_steps, dtype=np.float64)
    # Both parts have the same value and slope where they meet, and the second would reach 1 at step N.
    slope = threshold / linear
    beyond = np.clip(steps - linear, 0, None)
    curvature = (1 - threshold - slope * quadratic) / quadratic**2
    return 1 - (slope * steps + curvature * beyond**2)
