"""Prometheus metrics of the scheduler and of the HTTP server, each in a registry of its own.

Names begin with `sglang_diffusion_`, units are seconds and bytes, and every label has few values: an outcome, an error
code, a stage, a lane, a route. `docs/reference/metrics.md` is written from these declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as open_metrics_exposition
from prometheus_client.registry import Collector

PREFIX = "sglang_diffusion"
TEXT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
OPEN_METRICS_TYPE = open_metrics_exposition.CONTENT_TYPE_LATEST
_END = "# EOF\n"

_LATENCY = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0)
_STEP = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64)
_HTTP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
MODEL_FACTS = ("pipeline_class", "precision", "device")
_MODEL_LABELS = ("model", *MODEL_FACTS)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

RequeueReason = Literal["worker_lost", "preempted"]
Outcome = Literal["finished", "failed", "cancelled", "refused"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "failed", "cancelled", "refused")


@dataclass(frozen=True, kw_only=True)
class EngineSnapshot:
    """What the scheduler is at the moment of a scrape. `model` labels the served model, empty before it is loaded."""

    ready: bool
    num_queued: int
    num_running: int
    num_workers: int
    num_worker_restarts: int
    budget_bytes: int
    reserved_bytes: int
    allocated_bytes: int | None
    queued_by_priority: Mapping[int, int] = field(default_factory=dict)
    queued_cost: int = 0
    model: Mapping[str, str] = field(default_factory=dict)


class _SnapshotCollector(Collector):
    """Gauges that are computed when somebody asks."""

    def __init__(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[Metric]:
        """Names alone, so that registering takes no snapshot."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """The gauges of one snapshot."""
        now = self._snapshot()
        yield _gauge("ready", "1 while requests are run; 0 at start, in recovery, at the end and after it.", now.ready)
        yield _gauge("num_queue_reqs", "Requests that wait for a worker.", now.num_queued)
        by_priority = GaugeMetricFamily(
            f"{PREFIX}_queue_reqs",
            "Requests that wait for a worker, by `priority`, without warm-ups.",
            labels=["priority"],
        )
        for priority, number in now.queued_by_priority.items():
            by_priority.add_metric([str(priority)], float(number))
        yield by_priority
        yield _gauge("queue_cost", "Work that waits for a worker: pixels x frames x steps.", now.queued_cost)
        yield _gauge("num_running_reqs", "Requests in a worker, or whose output is being written.", now.num_running)
        yield _gauge("workers", "Worker processes.", now.num_workers)
        yield CounterMetricFamily(
            f"{PREFIX}_worker_restarts", "Times that a lost worker was replaced.", value=now.num_worker_restarts
        )
        yield _gauge("memory_budget_bytes", "Memory that requests may take above the weights.", now.budget_bytes)
        yield _gauge("memory_reserved_bytes", "Of the budget, what running requests have reserved.", now.reserved_bytes)
        if now.allocated_bytes is not None:
            yield _gauge("memory_allocated_bytes", "What weights and requests hold on the device.", now.allocated_bytes)
        info = GaugeMetricFamily(
            f"{PREFIX}_model_info",
            "1; the labels `model`, `pipeline_class`, `precision` and `device` say what is served.",
            labels=_MODEL_LABELS,
        )
        if now.model:
            info.add_metric([now.model[label] for label in _MODEL_LABELS], 1.0)
        yield info


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=float(value))


class _Registry(CollectorRegistry):
    """Makes metrics under our prefix."""

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self)

    def gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, namespace=PREFIX, registry=self)

    def histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, namespace=PREFIX, registry=self, buckets=buckets)


class EngineMetrics:
    """What the scheduler counts, one method per transition."""

    def __init__(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        self.registry = made = _new_registry()
        self._received = made.counter("requests_received", "Requests that arrived, refused ones included.")
        self._ended = made.counter(
            "requests", "Requests that ended, by `outcome`: finished, failed, cancelled or refused.", "outcome"
        )
        self._errors = made.counter("request_errors", "Requests that failed or were refused, by error `code`.", "code")
        self._requeued = made.counter(
            "requests_requeued", "Requests queued again, by `reason`: worker_lost or preempted.", "reason"
        )
        self._latency = made.histogram(
            "request_latency_seconds", "From arrival to end, by `outcome`.", "outcome", buckets=_LATENCY
        )
        self._queue_time = made.histogram(
            "queue_time_seconds",
            "From a request's arrival to its first worker, by `priority`.",
            "priority",
            buckets=_LATENCY,
        )
        self._batch_size = made.histogram(
            "generation_batch_size",
            "Requests that shared a forward, by `lane`: encode, denoise or decode.",
            "lane",
            buckets=_BATCH,
        )
        self._step_time = made.histogram(
            "step_seconds",
            "One unit of a `stage` for its whole batch: a denoising step, a decoded chunk, encoded texts.",
            "stage",
            buckets=_STEP,
        )
        self._stage_time = made.histogram(
            "stage_seconds",
            "All that a finished request spent in a `stage`; `encode_file` and `upload` are the output process's.",
            "stage",
            buckets=_LATENCY,
        )
        self._steps = made.counter("steps", "Units done, by `stage`, one for each request of a batch.", "stage")
        self._pixels = made.counter("pixels", "Pixels of all frames of finished requests.")
        self._frames = made.counter("frames", "Frames of finished requests.")
        self._peak = made.gauge(
            "memory_peak_bytes",
            "Most memory that the present worker used: of the device's allocator, or of the process on a CPU.",
        )
        self._peak_bytes = 0
        for outcome in OUTCOMES:
            self._ended.labels(outcome)  # a rate needs the zero before the first event
        self.registry.register(_SnapshotCollector(snapshot))

    def request_received(self) -> None:
        """A request arrived."""
        self._received.inc()

    def request_refused(self, code: str) -> None:
        """It was not taken."""
        self._ended.labels("refused").inc()
        self._errors.labels(code).inc()

    def request_started(self, queue_seconds: float, *, priority: int) -> None:
        """A worker holds it for the first time."""
        self._queue_time.labels(str(priority)).observe(queue_seconds)

    def request_requeued(self, reason: RequeueReason) -> None:
        """It left its worker and waits again."""
        self._requeued.labels(reason).inc()

    def request_stopped(self, outcome: Literal["failed", "cancelled"], seconds: float, *, code: str = "") -> None:
        """It ended without a result; `code` of a failure."""
        self._ended.labels(outcome).inc()
        self._latency.labels(outcome).observe(seconds)
        if outcome == "failed":
            self._errors.labels(code).inc()

    def request_finished(self, seconds: float, *, stage_seconds: Mapping[str, float], pixels: int, frames: int) -> None:
        """Its output is complete. `pixels` of all `frames`; both 0 when it stopped at the latents."""
        self._ended.labels("finished").inc()
        self._latency.labels("finished").observe(seconds)
        for stage, stage_time in stage_seconds.items():
            self._stage_time.labels(stage).observe(stage_time)
        self._pixels.inc(pixels)
        self._frames.inc(frames)

    def lane_done(self, lane: str, *, stage: str, batch_size: int, seconds: float) -> None:
        """One lane of a tick ran one unit of `stage` for `batch_size` requests."""
        self._batch_size.labels(lane).observe(batch_size)
        self._step_time.labels(stage).observe(seconds)
        self._steps.labels(stage).inc(batch_size)

    def memory_used(self, peak_bytes: int) -> None:
        """A tick's highest use."""
        if peak_bytes > self._peak_bytes:
            self._peak_bytes = peak_bytes
            self._peak.set(peak_bytes)

    def worker_lost(self) -> None:
        """What it used says nothing of the next one."""
        self._peak_bytes = 0
        self._peak.set(0)

    def text(self, *, open_metrics: bool = False) -> str:
        """Everything, in Prometheus' text format 0.0.4 or as OpenMetrics 1.0."""
        return _exposition(self.registry, open_metrics=open_metrics)


class HttpMetrics:
    """What the HTTP server counts. Bytes that are no HTTP request are not counted."""

    def __init__(self) -> None:
        self.registry = made = _new_registry()
        self._requests = made.counter(
            "http_requests",
            "HTTP requests answered, by `method`, `route` (its template, `none` for unknown paths) and `status`.",
            *("method", "route", "status"),
        )
        self._seconds = made.histogram(
            "http_request_duration_seconds",
            "From a request's head to the end of its reply, by `method` and `route`.",
            *("method", "route"),
            buckets=_HTTP,
        )
        self.in_flight = made.gauge("http_requests_in_flight", "HTTP requests that are being answered.")
        self._scheduler_up = made.gauge(
            "scheduler_up", "1 when the scheduler answered this scrape; else its metrics are missing."
        )

    def answered(self, method: str, *, route: str | None, status: int, seconds: float) -> None:
        """A reply ended. Status 499: the client had gone."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route or "none", str(status)).inc()
        self._seconds.labels(method, route or "none").observe(seconds)

    def text(self, engine_text: str | None, *, open_metrics: bool = False) -> str:
        """The scheduler's metrics, None when it did not answer, and those of this server."""
        self._scheduler_up.set(engine_text is not None)
        return (engine_text or "").removesuffix(_END) + _exposition(self.registry, open_metrics=open_metrics)


def wants_open_metrics(accept: str) -> bool:
    """Whether a scraper with this Accept header gets OpenMetrics instead of the text format."""
    return choose_encoder(accept)[1].startswith("application/openmetrics-text")


def _new_registry() -> _Registry:
    # In the text format, `_created` would be a second series beside each counter.
    prometheus_client.disable_created_metrics()
    return _Registry()


def _exposition(registry: CollectorRegistry, *, open_metrics: bool) -> str:
    encode = open_metrics_exposition.generate_latest if open_metrics else prometheus_client.generate_latest
    return encode(registry).decode("utf-8")
