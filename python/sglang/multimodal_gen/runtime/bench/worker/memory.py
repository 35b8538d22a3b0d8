"""What a run takes above what is already there."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch

from sglang.multimodal_gen.runtime.layers.device_timing import Run
from sglang.multimodal_gen.runtime.layers.forward_graphs import cuda_capture
from sglang.multimodal_gen.runtime.pipelines_core.memory_meter import meter_for

# Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3
_SMALLEST_RETURNED_BYTES = 256 << 10


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Peak of one run above the memory in use before it: the allocator's on a GPU, with what graphs keep for their
    forwards, and resident memory on the CPU.

    None where the system does not let a process reset its peak.
    """
    gc.collect()
    if device.type == "cpu":
        _return_what_is_freed()
    meter = meter_for(device)
    meter.begin("run")
    run()
    peak = meter.peak_bytes()
    return None if peak is None else peak + cuda_capture.held_bytes


def _return_what_is_freed() -> None:
    """Give memory back to the system as soon as it is freed, from now on.

    Otherwise what a run frees early counts as if it were held to its end. It costs time, so runs are timed before.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _SMALLEST_RETURNED_BYTES)
