"""What a run takes above what is already there."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

from sglang.multimodal_gen.runtime.bench.worker.timing import Run

_CLEAR_PEAK = "5"
# Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3
_SMALLEST_RETURNED_BYTES = 256 << 10


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Peak of one run above the memory in use before it: the allocator's on a GPU, resident memory on the CPU.

    None where the system does not let a process reset its peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    _return_what_is_freed()
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _return_what_is_freed() -> None:
    """Give memory back to the system as soon as it is freed, from now on.

    Otherwise what earlier runs freed stays with the process and is used again unseen, and what a run frees early counts
    as if it were held to its end. It costs time, so runs are timed before.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _SMALLEST_RETURNED_BYTES)
        library.malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")
