"""Learned times: how long a unit takes, for ETAs, for fair shares, for how many requests pay in one forward, and for
telling a slow worker from a silent one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# Before anything is learned a unit may include compilation or a first read of the weights from a slow disk.
UNLEARNED_DEADLINE_S = 600.0
_SLACK_S = 5.0
_SLOWEST_FACTOR = 2.0
_SMOOTHING = 0.3
# The first time of a kind may hold what happens once, so one time alone says nothing; after so many it is forgotten.
_MIN_TIMES, _REMEMBERED = 2, 8
# A batch twice as large delays each of its requests by up to twice as much: it must save at least this share for each.
_MIN_GAIN = 0.1
# What a tick costs besides its forward, about: planning and messages, which those who share it share as well.
_TICK_S = 0.001
_HALF_LIFE_S = 60.0


@dataclass
class UnitTime:
    """Seconds of one unit: the slowest per request of the batch, a running mean, and the newest times per request by
    size of the batch, which is rounded up to a power of two."""

    slowest_s: float
    mean_s: float
    newest_s: dict[int, deque[float]] = field(default_factory=dict)


@dataclass
class LearnedTimes:
    """By batch key, which holds shape, expert, precision and backend."""

    _by_key: dict[str, UnitTime] = field(default_factory=dict)
    _slowest_preview_s: float | None = None

    def record_preview(self, seconds: float) -> None:
        """The previews of one tick took `seconds` besides its lanes."""
        self._slowest_preview_s = max(seconds, self._slowest_preview_s or 0.0)

    def record(self, batch_key: str, seconds: float, batch_size: int) -> None:
        """One lane of one tick took `seconds` for `batch_size` requests."""
        each = seconds / batch_size
        known = self._by_key.get(batch_key)
        if known is None:
            known = self._by_key[batch_key] = UnitTime(slowest_s=seconds, mean_s=each)
        else:
            known.slowest_s = max(known.slowest_s, seconds)
            known.mean_s += _SMOOTHING * (each - known.mean_s)
        known.newest_s.setdefault(_power_of_two(batch_size), deque(maxlen=_REMEMBERED)).append(each)

    def unit_seconds(self, batch_key: str) -> float | None:
        """Mean seconds per request and unit, None before the first."""
        known = self._by_key.get(batch_key)
        return None if known is None else known.mean_s

    def steady_seconds(self, batch_key: str, batch_size: int) -> float | None:
        """Seconds per request and unit in a batch of this size, without what happens only at first or by chance; None
        until it was measured twice."""
        known = self._by_key.get(batch_key)
        times = None if known is None else known.newest_s.get(_power_of_two(batch_size))
        return None if times is None or len(times) < _MIN_TIMES else min(times)

    def fastest_seconds(self, batch_key: str) -> float | None:
        """The least that a unit cost a request at any size of batch; None until one size was measured twice."""
        known = self._by_key.get(batch_key)
        sizes = () if known is None else known.newest_s
        found = [each for size in sizes if (each := self.steady_seconds(batch_key, size)) is not None]
        return min(found, default=None)

    def best_batch(self, batch_key: str, most: int) -> int:
        """How many requests should share a forward, up to `most`: doubled for as long as each saves time by it.

        A size that nobody measured yet is tried before a larger one.
        """
        size = 1
        while size < most:
            own, twice = (self._whole_seconds(batch_key, each) for each in (size, 2 * size))
            if own is None or (twice is not None and twice > own * (1 - _MIN_GAIN)):
                return size
            if twice is None:
                return min(2 * size, most)
            size *= 2
        return most

    def _whole_seconds(self, batch_key: str, batch_size: int) -> float | None:
        """As `steady_seconds`, with a request's part of what a tick costs besides."""
        each = self.steady_seconds(batch_key, batch_size)
        return None if each is None else each + _TICK_S / batch_size

    def deadline_s(self, batches: dict[str, int], *, has_previews: bool = False) -> float:
        """How long a tick with these (batch key -> size) may take before its worker counts as stuck."""
        total = 0.0
        if has_previews:
            if self._slowest_preview_s is None:
                return UNLEARNED_DEADLINE_S
            total = self._slowest_preview_s
        for batch_key, batch_size in batches.items():
            known = self._by_key.get(batch_key)
            if known is None:
                return UNLEARNED_DEADLINE_S
            total += max(known.slowest_s, known.mean_s * batch_size)
        return _SLOWEST_FACTOR * total + _SLACK_S


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@dataclass
class WorkRate:
    """Work (pixels x frames x steps) done in a second of computing; what is long ago counts less."""

    _work: float = 0.0
    _seconds: float = 0.0

    def record(self, work: float, seconds: float) -> None:
        """A tick did this much in this time."""
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        self._work, self._seconds = self._work * kept + work, self._seconds * kept + seconds

    def seconds_for(self, work: float) -> float | None:
        """How long so much work takes; None before any was done."""
        return work * self._seconds / self._work if self._work > 0 else None
