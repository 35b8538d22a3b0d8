"""Timing runs of one or several sides in turns, on the CPU or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]
Timer = Callable[[Run], float]


def timer_for(device: torch.device) -> Timer:
    """What takes the seconds of a run on the device."""
    return _time_on_gpu if device.type == "cuda" else _time_on_cpu


def _time_on_cpu(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _time_on_gpu(run: Run) -> float:
    """Between two events of the stream, so that neither the launch before nor the wait after counts."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def time_in_turns(
    sides: Sequence[Run],
    timer: Timer,
    *,
    warmup_runs: int,
    repeats: int,
    min_seconds: float = 0.0,
    pause_seconds: float = 0.0,
) -> list[list[float]]:
    """The samples of each side, run A B A B …: at least `repeats`, and on until the first side's took `min_seconds`;
    before each of them there is a pause."""
    for _ in range(warmup_runs):
        for side in sides:
            side()
    samples: list[list[float]] = [[] for _ in sides]
    while len(samples[0]) < repeats or sum(samples[0]) < min_seconds:
        for side, own in zip(sides, samples, strict=True):
            if pause_seconds:
                time.sleep(pause_seconds)
            own.append(timer(side))
    return samples
