"""Learned times: how long a unit takes, for ETAs and for telling a slow worker from a silent one."""

from __future__ import annotations

from dataclasses import dataclass, field

# Before anything is learned a unit may include compilation or a first read of the weights from a slow disk.
UNLEARNED_DEADLINE_S = 600.0
_SLACK_S = 5.0
_SLOWEST_FACTOR = 2.0
_SMOOTHING = 0.3


@dataclass
class UnitTime:
    """Seconds of one unit: the slowest per request of the batch, and a running mean."""

    slowest_s: float
    mean_s: float


@dataclass
class LearnedTimes:
    """By batch key, which holds shape, expert, precision and backend."""

    _by_key: dict[str, UnitTime] = field(default_factory=dict)

    def record(self, batch_key: str, seconds: float, batch_size: int) -> None:
        """One lane of one tick took `seconds` for `batch_size` requests."""
        each = seconds / batch_size
        known = self._by_key.get(batch_key)
        if known is None:
            self._by_key[batch_key] = UnitTime(slowest_s=seconds, mean_s=each)
        else:
            known.slowest_s = max(known.slowest_s, seconds)
            known.mean_s += _SMOOTHING * (each - known.mean_s)

    def unit_seconds(self, batch_key: str) -> float | None:
        """Mean seconds per request and unit, None before the first."""
        known = self._by_key.get(batch_key)
        return None if known is None else known.mean_s

    def deadline_s(self, batches: dict[str, int]) -> float:
        """How long a tick with these (batch key -> size) may take before its worker counts as stuck."""
        total = 0.0
        for batch_key, batch_size in batches.items():
            known = self._by_key.get(batch_key)
            if known is None:
                return UNLEARNED_DEADLINE_S
            total += max(known.slowest_s, known.mean_s * batch_size)
        return _SLOWEST_FACTOR * total + _SLACK_S
