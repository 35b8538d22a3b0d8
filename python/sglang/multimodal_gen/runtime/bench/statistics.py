"""Samples and what they say together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples in the order in which they were taken. `spread` is (p90 - p10) / median."""

    median: float
    minimum: float
    maximum: float
    p10: float
    p90: float
    spread: float
    samples: tuple[float, ...]


class Distribution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `count` samples say, those in the tail first of all."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    maximum: float


class Ratio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many times as long the other took: `value` is the quotient of the medians, p10 and p90 are of the pairs."""

    value: float
    p10: float
    p90: float


def summarise(samples: Sequence[float]) -> Summary:
    """Of at least one sample."""
    p10, median, p90 = (percentile(samples, share) for share in (0.1, 0.5, 0.9))
    return Summary(
        median=median,
        minimum=min(samples),
        maximum=max(samples),
        p10=p10,
        p90=p90,
        spread=(p90 - p10) / median if median else 0.0,
        samples=tuple(samples),
    )


def distribution(samples: Sequence[float]) -> Distribution | None:
    """None of no samples."""
    if not samples:
        return None
    p50, p90, p95, p99 = (percentile(samples, share) for share in (0.5, 0.9, 0.95, 0.99))
    mean = sum(samples) / len(samples)
    return Distribution(count=len(samples), mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, maximum=max(samples))


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lie, between neighbours where none is exact."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def compare(ours: Summary, other: Summary) -> Ratio:
    """Of samples that were taken in turns."""
    pairs = [theirs / mine for mine, theirs in zip(ours.samples, other.samples, strict=True)]
    return Ratio(value=other.median / ours.median, p10=percentile(pairs, 0.1), p90=percentile(pairs, 0.9))
