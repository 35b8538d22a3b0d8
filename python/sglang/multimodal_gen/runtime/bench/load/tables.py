"""The result of a load test as tables."""

from __future__ import annotations

from collections.abc import Iterator

from sglang.multimodal_gen.runtime.bench.load.result import LoadResult
from sglang.multimodal_gen.runtime.bench.statistics import Distribution
from sglang.multimodal_gen.runtime.bench.tables import Row, Section, as_size, as_time

_TIMES_HEADER = ("", "mean", "p50", "p90", "p95", "p99", "most", "of")
_WORDS_SHOWN = 100


def load_sections(result: LoadResult) -> Iterator[Section]:
    """Rates first, then times, sizes, failures, and what is not known."""
    yield Section(f"serve: {result.target.endpoint} of {result.target.api}", [*_overview(result)])
    times = {
        "latency": result.latency_s,
        "  in the queue": result.queue_s,
        "  execution": result.execution_s,
        "  download": result.download_s,
        "to the first preview": result.first_preview_s,
    }
    rows = [_times(name, found) for name, found in times.items() if found is not None]
    if rows:
        yield Section("times of requests with a result", rows, _TIMES_HEADER)
    if len(result.latency_s_by_size) > 1:
        by_size = [_times(size, found) for size, found in result.latency_s_by_size.items()]
        yield Section("latency by size", by_size, _TIMES_HEADER)
    if result.server is not None:
        yield Section("the server's own numbers", [*_server(result)])
    if result.errors:
        words = {sample.outcome: sample.detail for sample in reversed(result.samples)}
        failures = [(name, str(count), words[name][:_WORDS_SHOWN]) for name, count in result.errors.items()]
        yield Section("failures", failures, ("", "requests", "the first of them"))
    if result.unknown:
        yield Section("not known", list(result.unknown.items()))


def _overview(result: LoadResult) -> Iterator[Row]:
    if result.target.model is not None:
        yield "model", result.target.model
    yield "arrivals", arrivals_in_words(result.arrivals.request_rate, result.arrivals.max_concurrency)
    interrupted = f", {result.num_interrupted} interrupted" if result.was_interrupted else ""
    num_failed = sum(result.errors.values())
    yield "requests", f"{result.num_sent} sent, {result.num_ok} done, {num_failed} failed{interrupted}"
    yield "duration", as_time(result.duration_s)
    outputs = f", {result.outputs_per_second:.3g} outputs/s"
    pixels = "" if result.pixels_per_second is None else f", {result.pixels_per_second / 1e6:.3g} megapixels/s"
    yield "throughput", f"{result.requests_per_second:.3g} requests/s{outputs}{pixels}"
    yield "received", as_size(result.bytes_received)
    good = result.goodput
    if good is not None:
        share = f"{good.share:.1%} within {good.slo_s:g} s"
        yield "goodput", f"{share}, {good.requests_per_second:.3g} requests/s"
    yield "generator", _generator(result)
    if result.target.follows_events:
        yield "status", "from the server's events"
    elif result.target.poll_interval_s is not None:
        yield "status", f"asked for every {as_time(result.target.poll_interval_s)}, by which latencies may be too long"


def arrivals_in_words(request_rate: float | None, max_concurrency: int | None) -> str:
    """How requests come."""
    if request_rate is not None:
        return f"{request_rate:g} a second at random moments (open loop)"
    return f"{max_concurrency} at a time (closed loop)"


def _generator(result: LoadResult) -> str:
    """Whether the load was what was asked for, and how far off its clock may be."""
    came, said = result.arrivals, []
    if came.lateness is not None:
        said.append("kept up" if came.kept_up else "COULD NOT KEEP UP, the load was not what was asked for")
        rate = "" if came.sent_rate is None else f" at {came.sent_rate:.3g}/s"
        said.append(f"sent{rate}, p99 {as_time(came.lateness.p99)} late")
    if came.loop_delay is not None:
        said.append(f"p99 of its timers {as_time(came.loop_delay.p99)} late")
    return "; ".join(said) or "too short to say"


def _times(name: str, found: Distribution) -> Row:
    values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.maximum)
    return (name, *map(as_time, values), str(found.count))


def _server(result: LoadResult) -> Iterator[Row]:
    assert result.server is not None, "there is something to show"
    for lane, mean in result.server.requests_per_forward.items():
        yield f"requests per forward, {lane}", f"{mean:.2f}"
    sizes = result.server.steps_by_batch_size
    if sizes:
        yield "denoising forwards by requests", ", ".join(f"{name}: {count}" for name, count in sizes.items())
    if result.server.mean_queue_s is not None:
        yield "mean time in the queue", as_time(result.server.mean_queue_s)
