"""What the samples of a load test say together."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import msgspec

from sglang.multimodal_gen.runtime.bench.load.samples import INTERRUPTED, Sample
from sglang.multimodal_gen.runtime.bench.load.server_metrics import ServerSide
from sglang.multimodal_gen.runtime.bench.statistics import Distribution, distribution

# A request that is sent this late, or by this share of the mean gap or of what a request takes, meets the same queue.
_ON_TIME_S, _ON_TIME_SHARE = 0.01, 0.1


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured. A video's status comes with the server's events (`follows_events`), or is asked for every
    `poll_interval_s`; both are None of images."""

    api: str
    endpoint: str
    model: str | None
    follows_events: bool | None
    poll_interval_s: float | None


class Arrivals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests came: at `request_rate`, or `max_concurrency` at a time.

    `sent_rate` is what they really came at. `lateness` is how long after its moment a request was sent; None where it
    has none. `loop_delay` is how late the generator's own timers fired. `kept_up`: lateness made no difference.
    """

    request_rate: float | None
    max_concurrency: int | None
    sent_rate: float | None
    lateness: Distribution | None
    loop_delay: Distribution | None
    kept_up: bool


class Goodput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests with a result within `slo_s`; `share` is of all that ended, failures included."""

    slo_s: float
    num_within: int
    share: float
    requests_per_second: float


class LoadResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="serve"):
    """A distribution or rate that is None is not known; `unknown` says of each why. `errors` counts failures by what
    they are. `duration_s` is from the first request's sending to the last end."""

    target: Target
    arrivals: Arrivals
    was_interrupted: bool
    duration_s: float
    num_sent: int
    num_ok: int
    num_interrupted: int
    errors: dict[str, int]
    requests_per_second: float
    outputs_per_second: float
    pixels_per_second: float | None
    bytes_received: int
    goodput: Goodput | None
    latency_s: Distribution | None
    latency_s_by_size: dict[str, Distribution]
    queue_s: Distribution | None
    execution_s: Distribution | None
    download_s: Distribution | None
    first_preview_s: Distribution | None
    server: ServerSide | None
    unknown: dict[str, str]
    samples: tuple[Sample, ...]


def load_result(
    samples: Sequence[Sample],
    *,
    target: Target,
    request_rate: float | None,
    max_concurrency: int | None,
    delays: Sequence[float],
    slo_s: float | None,
    server: ServerSide | None,
    was_interrupted: bool,
) -> LoadResult:
    """Of all samples of a run, in any order."""
    ordered = sorted(samples, key=lambda sample: sample.number)
    ok = [sample for sample in ordered if sample.is_ok]
    ended = [sample for sample in ordered if sample.outcome != INTERRUPTED]
    duration_s = max((s.end_s for s in ordered), default=0.0) - min((s.sent_s for s in ordered), default=0.0)
    sizes = sorted({sample.size for sample in ok if sample.size is not None})
    pixels = [sample.pixels for sample in ok if sample.pixels is not None]

    def known(value: Callable[[Sample], float | None], of: Sequence[Sample] = ok) -> Distribution | None:
        return distribution([number for sample in of if (number := value(sample)) is not None])

    by_size = {size: known(lambda s: s.latency_s, [s for s in ok if s.size == size]) for size in sizes}
    result = LoadResult(
        target=target,
        arrivals=_arrivals(ordered, request_rate, max_concurrency, delays),
        was_interrupted=was_interrupted,
        duration_s=duration_s,
        num_sent=len(ordered),
        num_ok=len(ok),
        num_interrupted=len(ordered) - len(ended),
        errors=dict(collections.Counter(sample.outcome for sample in ended if not sample.is_ok).most_common()),
        requests_per_second=_rate(len(ok), duration_s),
        outputs_per_second=_rate(sum(sample.num_outputs for sample in ok), duration_s),
        pixels_per_second=_rate(sum(pixels), duration_s) if pixels and len(pixels) == len(ok) else None,
        bytes_received=sum(sample.bytes_received for sample in ordered),
        goodput=None if slo_s is None else _goodput(ended, slo_s, duration_s),
        latency_s=known(lambda sample: sample.latency_s),
        latency_s_by_size={size: found for size, found in by_size.items() if found is not None},
        queue_s=known(lambda sample: sample.queue_s),
        execution_s=known(lambda sample: sample.execution_s),
        download_s=known(lambda sample: sample.download_s),
        first_preview_s=known(lambda sample: sample.first_preview_s),
        server=server,
        unknown={},
        samples=tuple(ordered),
    )
    return msgspec.structs.replace(result, unknown=_unknown(result) if ok else {})


def _rate(number: float, seconds: float) -> float:
    return number / seconds if seconds > 0 else 0.0


def _arrivals(
    samples: Sequence[Sample], request_rate: float | None, max_concurrency: int | None, delays: Sequence[float]
) -> Arrivals:
    latency = distribution([sample.latency_s for sample in samples if sample.latency_s is not None])
    lateness = distribution([sample.sent_s - sample.due_s for sample in samples if sample.due_s is not None])
    sent = sorted(sample.sent_s for sample in samples)
    gap_s, takes_s = 0.0 if request_rate is None else 1 / request_rate, 0.0 if latency is None else latency.p50
    allowed = max(_ON_TIME_S, _ON_TIME_SHARE * gap_s, _ON_TIME_SHARE * takes_s)
    return Arrivals(
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        sent_rate=_rate(len(sent) - 1, sent[-1] - sent[0]) if len(sent) > 1 else None,
        lateness=lateness,
        loop_delay=distribution(delays),
        kept_up=lateness is None or lateness.p99 <= allowed,
    )


def _goodput(ended: Sequence[Sample], slo_s: float, duration_s: float) -> Goodput:
    num_within = sum(sample.latency_s is not None and sample.latency_s <= slo_s for sample in ended)
    return Goodput(
        slo_s=slo_s,
        num_within=num_within,
        share=num_within / len(ended) if ended else 0.0,
        requests_per_second=_rate(num_within, duration_s),
    )


def _unknown(result: LoadResult) -> dict[str, str]:
    """Why each thing that is not known is not."""
    is_video = result.target.endpoint == "videos"
    silent = "no video was seen to begin" if is_video else "the replies do not tell it"
    reasons: list[tuple[str, object, str]] = [
        ("time in the queue", result.queue_s, silent),
        ("time of execution", result.execution_s, silent),
        ("time to the first preview", result.first_preview_s, "no preview came; see docs/bench.md"),
        ("requests per forward", result.server, "the server has no /metrics of ours"),
        ("pixels a second", result.pixels_per_second, "some outputs' size or frames are not known"),
    ]
    return {name: reason for name, value, reason in reasons if value is None}
