"""How long a client waits for a reply or the next piece of one, as OpenAI's library says with every request."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sglang.multimodal_gen.configs.sample.scheduling_params import MAX_DEADLINE_S

_HEADER = "x-stainless-read-timeout"
_LEAST_S = 0.001
_LEAST_HEARTBEAT_S = 0.1


def client_deadline_s(headers: Mapping[str, str]) -> float | None:
    """Seconds until the client gives up; None when it does not say so in a positive number."""
    try:
        seconds = float(headers.get(_HEADER, ""))
    except ValueError:
        return None
    return max(_LEAST_S, min(seconds, MAX_DEADLINE_S)) if math.isfinite(seconds) and seconds > 0 else None


def heartbeat_s(headers: Mapping[str, str], most: float) -> float:
    """Seconds between the signs of life of a stream: three of them in what the client waits for one, up to `most`."""
    patience = client_deadline_s(headers)
    return most if patience is None else min(most, max(_LEAST_HEARTBEAT_S, patience / 3))
