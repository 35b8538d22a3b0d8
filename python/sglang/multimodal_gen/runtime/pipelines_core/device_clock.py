"""How far a device is in the work that it was given: a GPU goes on while the host prepares what comes next."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Mark(Protocol):
    """A place between two works of the device."""

    def is_reached(self) -> bool:
        """Whether all before it is done."""
        ...

    def wait(self) -> None:
        """Until it is. Raises: torch.AcceleratorError when the device failed before it."""
        ...

    def ms_since(self, earlier: Mark) -> float:
        """Of the device, from one reached mark to this one, which is reached too."""
        ...


class DeviceClock:
    """Gives marks of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        """Behind everything that was given to the device so far."""
        return _EventMark(self._device) if self._device.type == "cuda" else _TimeMark()


class _TimeMark:
    """Of a device whose work is done when the call returns."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def is_reached(self) -> bool:
        return True

    def wait(self) -> None:
        """It is."""

    def ms_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _TimeMark), "marks of one device"
        return (self._time - earlier._time) * 1000


class _EventMark:
    """Of a GPU's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def is_reached(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()

    def ms_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _EventMark), "marks of one device"
        return earlier._event.elapsed_time(self._event)
