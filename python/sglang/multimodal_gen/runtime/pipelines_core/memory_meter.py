"""How much memory work really took: measured on the device's allocator, or on the process on CPU."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Protocol

import torch

from sglang.multimodal_gen.runtime.layers.forward_graphs import cuda_capture

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the present resident size
_CPU_MEASUREMENTS = 2


class MemoryMeter(Protocol):
    """Measures one stretch of work at a time."""

    def begin(self, what: Hashable) -> None:
        """Work of this kind begins."""
        ...

    def peak_bytes(self) -> int | None:
        """The most that was held since `begin`, above what was held then; None where this time was not measured."""
        ...

    def total_peak_bytes(self) -> int:
        """The most that was held since `begin`, all in all."""
        ...

    def allocated_bytes(self) -> int:
        """What is held now, the weights included."""
        ...

    def give_back(self) -> None:
        """Return what is cached for later allocations to the device or the system."""
        ...


class CudaMeter:
    """The caching allocator's own counts, which are exact."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._base = 0

    def begin(self, what: Hashable) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._base = torch.cuda.memory_allocated(self.device)

    def peak_bytes(self) -> int | None:
        return max(0, torch.cuda.max_memory_allocated(self.device) - self._base)

    def total_peak_bytes(self) -> int:
        # What graphs keep counts as free where nothing of it is in use at the moment.
        return torch.cuda.max_memory_allocated(self.device) + cuda_capture.held_bytes

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def give_back(self) -> None:
        torch.cuda.empty_cache()


class ProcessMeter:
    """Resident memory of this process, from Linux's high-water mark.

    The C library keeps freed memory and hands it out again, unseen by the system. So it is told to give it back before
    each measurement; since that costs milliseconds, each kind of work is measured only the first times.
    """

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}
        self._base: int | None = None
        self._trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._can_measure = self._trim is not None

    def begin(self, what: Hashable) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1
        measured = self._counts[what] <= _CPU_MEASUREMENTS and self._reset_peak()
        self._base = _status_bytes("VmRSS") if measured else None

    def _reset_peak(self) -> bool:
        if not self._can_measure:
            return False
        self.give_back()
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:  # a sandbox without this file, or where it cannot be written
            self._can_measure = False
        return self._can_measure

    def peak_bytes(self) -> int | None:
        if self._base is None:
            return None
        return max(0, _status_bytes("VmHWM") - self._base)

    def total_peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def allocated_bytes(self) -> int:
        return _status_bytes("RssAnon")

    def give_back(self) -> None:
        if self._trim is not None:
            self._trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{_STATUS} has no {field}")


def meter_for(device: torch.device) -> MemoryMeter:
    """The meter of a device."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter()
