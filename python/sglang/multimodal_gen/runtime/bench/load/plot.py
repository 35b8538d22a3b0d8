"""A load test as one picture: how latencies are distributed, and when each request ran.

Drawn with Pillow, which the package has anyway: two panels of lines and bars are no reason for a plotting library.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from sglang.multimodal_gen.runtime.bench.load.result import LoadResult
from sglang.multimodal_gen.runtime.bench.load.samples import INTERRUPTED, Sample
from sglang.multimodal_gen.runtime.bench.load.tables import arrivals_in_words
from sglang.multimodal_gen.runtime.bench.tables import as_time

_WIDTH, _HEIGHT = 1500, 720
_FINER = 2  # drawn so many times as large and then made smaller, for smooth edges
_PAPER, _INK, _FAINT, _PALE = "#ffffff", "#24292f", "#6e7781", "#e6e8eb"
_RUNNING, _WAITING, _FAILED, _CUT, _BOUND = "#2f6fb0", "#f0b35a", "#c73a34", "#9aa1a9", "#c73a34"
_LABEL, _TITLE = 15, 19
_TICKS = 6


@dataclass(frozen=True)
class _Panel:
    """A rectangle of the picture, and how its axes map to it. `y` grows upwards from 0 unless it is upside down."""

    left: int
    top: int
    right: int
    bottom: int
    x_most: float
    y_most: float
    is_upside_down: bool = False

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.x_most

    def y(self, value: float) -> float:
        share = value / self.y_most
        return self.top + (self.bottom - self.top) * (share if self.is_upside_down else 1 - share)


class _Pen:
    """Draws in the picture's own coordinates."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, width: float = 1) -> None:
        scaled = [(x * _FINER, y * _FINER) for x, y in points]
        self._draw.line(scaled, fill=colour, width=max(1, round(width * _FINER)), joint="curve")

    def dashes(self, x: float, top: float, bottom: float, colour: str) -> None:
        for begin in range(int(top), int(bottom), 9):
            self.line([(x, begin), (x, min(begin + 5, bottom))], colour)

    def bar(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        scaled = [round(value * _FINER) for value in (left, top, right, bottom)]
        scaled[2], scaled[3] = max(scaled[2], scaled[0] + 1), max(scaled[3], scaled[1] + 1)
        self._draw.rectangle(scaled, fill=colour)

    def text(
        self, x: float, y: float, text: str, *, colour: str = _INK, anchor: str = "la", size: int = _LABEL
    ) -> None:
        self._draw.text((x * _FINER, y * _FINER), text, fill=colour, font=self._font(size), anchor=anchor)

    def width_of(self, text: str) -> float:
        return self._draw.textlength(text, font=self._font(_LABEL)) / _FINER

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size * _FINER)
        return self._fonts[size]


def draw(result: LoadResult) -> bytes:
    """The picture as PNG."""
    image = Image.new("RGB", (_WIDTH * _FINER, _HEIGHT * _FINER), _PAPER)
    pen = _Pen(image)
    model = "" if result.target.model is None else f", {result.target.model}"
    arrivals = arrivals_in_words(result.arrivals.request_rate, result.arrivals.max_concurrency)
    pen.text(40, 24, f"{result.target.endpoint} of {result.target.api}{model}", size=_TITLE)
    done = f"{result.num_ok} of {result.num_sent} requests done, {result.requests_per_second:.3g} a second"
    pen.text(40, 54, f"{arrivals}; {done}", colour=_FAINT)
    _draw_latencies(pen, result)
    _draw_timeline(pen, result)
    buffer = io.BytesIO()
    image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _draw_latencies(pen: _Pen, result: LoadResult) -> None:
    """The share of requests that were done within a time: it ends below 100 % when some failed."""
    latencies = sorted(sample.latency_s for sample in result.samples if sample.latency_s is not None)
    num_ended = result.num_sent - result.num_interrupted
    slo_s = None if result.goodput is None else result.goodput.slo_s
    most = max([*latencies, slo_s or 0.0, 1e-3]) * 1.05
    panel = _Panel(100, 140, 640, _HEIGHT - 70, most, 100)
    _draw_axes(pen, panel, "latency", "requests done within it, %")
    for share in range(0, 101, 20):
        _draw_y_tick(pen, panel, share, str(share))
    if slo_s is not None:
        pen.dashes(panel.x(slo_s), panel.top, panel.bottom, _BOUND)
        pen.text(panel.x(slo_s) - 6, panel.top + 4, f"{slo_s:g} s", colour=_BOUND, anchor="ra")
    points = [(panel.x(0), panel.y(0))]
    for number, latency in enumerate(latencies, start=1):
        points.append((panel.x(latency), points[-1][1]))
        points.append((panel.x(latency), panel.y(100 * number / num_ended)))
    if not latencies or result.latency_s is None:
        pen.text((panel.left + panel.right) / 2, (panel.top + panel.bottom) / 2, "no request was done", anchor="mm")
        return
    found, row = result.latency_s, panel.bottom - 100
    pen.bar(panel.right - 140, row - 6, panel.right, panel.bottom - 4, _PAPER)  # no grid behind the numbers
    for name, value in (("p50", found.p50), ("p90", found.p90), ("p95", found.p95), ("p99", found.p99)):
        pen.text(panel.right - 130, row, name, colour=_FAINT)
        pen.text(panel.right - 10, row, as_time(value), anchor="ra")
        row += 22
    pen.line([*points, (panel.right, points[-1][1])], _RUNNING, width=2)


def _draw_timeline(pen: _Pen, result: LoadResult) -> None:
    """A bar for each request, in the order of sending."""
    samples = sorted(result.samples, key=lambda sample: sample.sent_s)
    most = max([sample.end_s for sample in samples], default=1.0) * 1.01
    panel = _Panel(750, 140, _WIDTH - 40, _HEIGHT - 70, most, max(1, len(samples)), is_upside_down=True)
    _draw_axes(pen, panel, "time since the start", "requests as they were sent")
    step = _nice(len(samples) / _TICKS, whole=True)
    for number in range(0, len(samples) + 1, int(step)):
        _draw_y_tick(pen, panel, number, str(number))
    row = (panel.bottom - panel.top) / max(1, len(samples))
    gap = min(2.0, row / 5)
    for place, sample in enumerate(samples):
        for begin, end, colour in _parts(sample):
            top = panel.y(place)
            pen.bar(panel.x(begin), top + gap / 2, panel.x(end), top + max(row - gap, 0.5), colour)
    _draw_legend(pen, samples, right=panel.right)


def _parts(sample: Sample) -> Iterator[tuple[float, float, str]]:
    """(begin, end, colour) of what a request's time was."""
    if sample.is_ok:
        # What is neither waiting nor execution, such as sending and fetching, comes after them.
        waited = sample.sent_s + min(sample.queue_s or 0.0, sample.end_s - sample.sent_s)
        if waited > sample.sent_s:
            yield sample.sent_s, waited, _WAITING
        yield waited, sample.end_s, _RUNNING
    else:
        yield sample.sent_s, sample.end_s, _CUT if sample.outcome == INTERRUPTED else _FAILED


def _draw_legend(pen: _Pen, samples: Sequence[Sample], *, right: float) -> None:
    entries = [(_RUNNING, "done")]
    if any(sample.queue_s for sample in samples):
        entries = [(_WAITING, "in the queue"), (_RUNNING, "executed and fetched")]
    if any(not sample.is_ok and sample.outcome != INTERRUPTED for sample in samples):
        entries.append((_FAILED, "failed"))
    if any(sample.outcome == INTERRUPTED for sample in samples):
        entries.append((_CUT, "interrupted"))
    for colour, name in reversed(entries):
        x = right - pen.width_of(name) - 21
        pen.bar(x, 110, x + 14, 124, colour)
        pen.text(x + 21, 117, name, anchor="lm", colour=_FAINT)
        right = x - 24


def _draw_axes(pen: _Pen, panel: _Panel, x_name: str, y_name: str) -> None:
    """The frame, the marks of the time below it, and what the axes are."""
    step = _nice(panel.x_most / _TICKS)
    for index in range(int(panel.x_most / step) + 1):
        x = panel.x(index * step)
        pen.line([(x, panel.top), (x, panel.bottom)], _PALE)
        pen.text(x, panel.bottom + 8, _seconds(index * step), colour=_FAINT, anchor="ma")
    pen.line([(panel.left, panel.top), (panel.left, panel.bottom), (panel.right, panel.bottom)], _FAINT)
    pen.text(panel.right, panel.bottom + 34, x_name, anchor="ra")
    pen.text(panel.left - 50, panel.top - 18, y_name, anchor="ls")


def _draw_y_tick(pen: _Pen, panel: _Panel, value: float, text: str) -> None:
    y = panel.y(value)
    pen.line([(panel.left - 4, y), (panel.left, y)], _FAINT)
    pen.text(panel.left - 9, y, text, colour=_FAINT, anchor="rm")


def _nice(step: float, *, whole: bool = False) -> float:
    """The next of 1, 2, 5, 10, 20, … and their tenths."""
    scale = 10 ** math.floor(math.log10(step)) if step > 0 else 1.0
    found = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= step * 0.999)
    return max(1, round(found)) if whole else found


def _seconds(value: float) -> str:
    return f"{value:.6g} s" if value else "0"
