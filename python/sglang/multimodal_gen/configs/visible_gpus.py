"""The GPUs of this machine as the NVIDIA driver's library tells of them, for processes that do without torch."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

_LIBRARY = "libnvidia-ml.so.1"
_OK = 0
_NAME_BYTES = 96


class Gpu(NamedTuple):
    """Its product name and all of its memory."""

    name: str
    memory_bytes: int


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpus_of_this_machine() -> tuple[Gpu, ...]:
    """All of them, whichever a process may use; none where there is no driver, or it does not answer.

    Source: https://docs.nvidia.com/deploy/nvml-api
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        if library.nvmlInit_v2() != _OK:
            return ()
        try:
            return _gpus(library)
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError):  # no such library, or one without these functions
        return ()


def _gpus(library: ctypes.CDLL) -> tuple[Gpu, ...]:
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _OK:
        return ()
    found = []
    for index in range(count.value):
        device, memory, name = ctypes.c_void_p(), _Memory(), ctypes.create_string_buffer(_NAME_BYTES)
        answers = (
            library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)),
            library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)),
            library.nvmlDeviceGetName(device, name, _NAME_BYTES),
        )
        if all(answer == _OK for answer in answers):
            found.append(Gpu(name.value.decode(errors="replace"), memory.total))
    return tuple(found)
