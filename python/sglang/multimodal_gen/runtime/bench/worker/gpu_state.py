"""Clocks, power and temperature of a GPU while something runs there, by one nvidia-smi that goes on saying them."""

from __future__ import annotations

import contextlib
import math
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from sglang.multimodal_gen.runtime.bench.messages import GpuState
from sglang.multimodal_gen.runtime.bench.statistics import percentile

_PROGRAM = "nvidia-smi"
_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
_INTERVAL_MS = 200
_FIRST_LINE_S = 5.0
"""It looks for all GPUs of the machine before it says anything."""
_END_S = 1.0
# Bits of NVML's nvmlClocksEventReasons.
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}


@dataclass(frozen=True)
class _Sample:
    sm_clock: float
    memory_clock: float | None
    power: float | None
    temperature: float | None
    reasons: int


def gpu_uuid(device: torch.device) -> str | None:
    """By which nvidia-smi knows a device, whatever CUDA_VISIBLE_DEVICES hides of the machine; None of a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


class GpuWatch:
    """Watches a GPU inside a `with` block; without a uuid, or an nvidia-smi that knows it, sees nothing.

    Before the block it waits until the first line comes, for at most `patience_s`, so that short blocks are seen too.
    """

    def __init__(self, uuid: str | None, *, patience_s: float = _FIRST_LINE_S) -> None:
        self._uuid, self._patience_s = uuid, patience_s
        self._samples: list[_Sample] = []
        self._speaks = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, name="nvidia-smi", daemon=True)

    def __enter__(self) -> Self:
        if self._uuid is None:
            return self
        query = (f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", f"--loop-ms={_INTERVAL_MS}")
        with contextlib.suppress(OSError):  # there is none, or none that can be started
            self._child = subprocess.Popen(
                [_PROGRAM, *query, "-i", self._uuid],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            self._reader.start()
            self._speaks.wait(self._patience_s)
            self._samples.clear()  # they are of before the block
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is None:
            return
        self._child.kill()
        # Neither wait is for ever: a process may hang in its driver, and one that it started may hold the pipe.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_END_S)
        self._reader.join(_END_S)

    def state(self) -> GpuState | None:
        """What was seen in the block; None when nothing was."""
        samples = tuple(self._samples)
        if not samples:
            return None
        clocks = [sample.sm_clock for sample in samples]
        powers = [sample.power for sample in samples if sample.power is not None]
        temperatures = [sample.temperature for sample in samples if sample.temperature is not None]
        return GpuState(
            num_samples=len(samples),
            sm_clock_mhz=percentile(clocks, 0.5),
            lowest_sm_clock_mhz=min(clocks),
            highest_sm_clock_mhz=max(clocks),
            memory_clock_mhz=_median([each.memory_clock for each in samples if each.memory_clock is not None]),
            power_w=_median(powers),
            highest_power_w=max(powers, default=None),
            highest_temperature_c=max(temperatures, default=None),
            clock_reasons=_reasons(samples),
        )

    def _read(self) -> None:
        """Everything to the end, so that the pipe never fills up."""
        assert self._child is not None and self._child.stdout is not None, "it was started with a pipe"
        with self._child.stdout as lines:
            for line in lines:
                if (sample := _parsed(line)) is not None:
                    self._samples.append(sample)
                self._speaks.set()
        self._speaks.set()


def _parsed(line: str) -> _Sample | None:
    """None of a line that does not say the clock."""
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(_FIELDS) or (sm_clock := _number(values[0])) is None:
        return None
    memory_clock, power, temperature = map(_number, values[1:4])
    return _Sample(sm_clock, memory_clock, power, temperature, _bits(values[4]))


def _number(text: str) -> float | None:
    """None of `[N/A]` and the like."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _bits(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text, 16)
    return 0


def _median(values: Sequence[float]) -> float | None:
    return percentile(values, 0.5) if values else None


def _reasons(samples: Sequence[_Sample]) -> tuple[str, ...]:
    """Of any sample, by bit; those that have no name here by number."""
    seen = 0
    for sample in samples:
        seen |= sample.reasons
    bits = [1 << place for place in range(seen.bit_length()) if seen >> place & 1]
    return tuple(_REASONS.get(bit, hex(bit)) for bit in bits)
