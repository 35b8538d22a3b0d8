"""On what a benchmark ran, without torch: processor, memory, GPUs, versions, and how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import msgspec

import sglang

_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy")
_GPU_FACTS = Path("/proc/driver/nvidia/gpus")


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`num_cores` are those this process may use; `load_average` is of the minute before the benchmark."""

    processor: str
    num_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    load_average: float
    platform: str
    python: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    """The facts of this machine."""
    return Machine(
        processor=_proc_value("/proc/cpuinfo", "model name") or platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=int(_proc_value("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        gpus=tuple(_proc_value(str(path / "information"), "Model") for path in sorted(_GPU_FACTS.glob("*"))),
        load_average=os.getloadavg()[0],
        platform=platform.platform(),
        python=platform.python_version(),
        packages={"sglang": sglang.__version__} | {name: version for name in _PACKAGES if (version := _version(name))},
    )


def _proc_value(path: str, field: str) -> str:
    """The first `field: value` of a file of /proc; empty without one."""
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
