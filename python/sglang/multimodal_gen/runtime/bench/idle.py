"""How long a device had nothing to do during the steps of a recorded request."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sglang.multimodal_gen.runtime.bench.messages import LONGEST_KERNEL_NAME

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op",)
_NUM_GAPS = 5


# From the end of one kernel to the begin of the next that was given before, a GPU takes one to three microseconds.
_WAIT_S = 10e-6


class Gap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing ran for `seconds`, after the kernel or operation `after` and before the one `before`."""

    seconds: float
    after: str
    before: str


class IdleTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between the first and the last kernel of a recorded part of a request; on the CPU, between torch's operations.
    `waiting_seconds` are of gaps that are longer than the device takes to begin the next kernel of those that it has.
    `gaps`: the longest ones. `trace`: the recording, which stays."""

    trace: str
    seconds: float
    idle_seconds: float
    waiting_seconds: float
    gaps: tuple[Gap, ...]

    @property
    def share(self) -> float:
        """Of the time, in which nothing ran."""
        return self.idle_seconds / self.seconds

    @property
    def waiting_share(self) -> float:
        """Of the time, in which the device had nothing to run."""
        return self.waiting_seconds / self.seconds


class _Work(NamedTuple):
    begin: float
    end: float
    name: str


def idle_time(trace: Path) -> IdleTime | None:
    """Of a Chrome trace that the engine wrote, compressed; None where it holds no work."""
    with gzip.open(trace, "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    works = _works(events, _ON_DEVICE) or _works(events, _ON_HOST)
    if not works:
        return None
    gaps, last = [], works[0]
    for work in works:
        if work.begin > last.end:
            seconds = (work.begin - last.end) / 1e6
            gaps.append(
                Gap(seconds=seconds, after=last.name[:LONGEST_KERNEL_NAME], before=work.name[:LONGEST_KERNEL_NAME])
            )
        last = max(last, work, key=lambda each: each.end)
    return IdleTime(
        trace=str(trace),
        seconds=(last.end - works[0].begin) / 1e6,
        idle_seconds=sum(gap.seconds for gap in gaps),
        waiting_seconds=sum(gap.seconds for gap in gaps if gap.seconds >= _WAIT_S),
        gaps=tuple(sorted(gaps, key=lambda gap: -gap.seconds)[:_NUM_GAPS]),
    )


def _works(events: Iterable[dict[str, Any]], kinds: tuple[str, ...]) -> list[_Work]:
    """By when they begin, in microseconds."""
    found = [event for event in events if event.get("cat") in kinds and event.get("dur", 0) > 0]
    return sorted(_Work(event["ts"], event["ts"] + event["dur"], event["name"]) for event in found)
