"""Results of checks: printed as they come, kept for the JSON file."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass
class Result:
    """One check: what was measured, and whether it is as it should be."""

    name: str
    ok: bool = False
    detail: str = ""
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)

    def expect(self, ok: bool, detail: str, **figures: float) -> None:
        """Record the outcome."""
        self.ok, self.detail = ok, detail
        self.figures.update(figures)


class Report:
    """All results of a run."""

    def __init__(self, machine: dict[str, Any]) -> None:
        self.machine = machine
        self.results: list[Result] = []
        print("machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)

    @property
    def ok(self) -> bool:
        """Whether there were checks and all of them passed."""
        return bool(self.results) and all(result.ok for result in self.results)

    @contextmanager
    def check(self, name: str) -> Iterator[Result]:
        """Time a check; an exception is its failure, and the others still run."""
        result, begin = Result(name), time.perf_counter()
        try:
            yield result
        except Exception as error:
            result.expect(False, f"{type(error).__name__}: {error}".splitlines()[0])
        result.seconds = round(time.perf_counter() - begin, 3)
        self.results.append(result)
        print(f"{'ok  ' if result.ok else 'FAIL'} {name} ({result.seconds:.1f} s): {result.detail}", flush=True)

    def note(self, line: str) -> None:
        """Something to know that is no check."""
        print(f"     {line}", flush=True)

    def summary(self) -> str:
        """The last line."""
        failed = [result.name for result in self.results if not result.ok]
        return f"{len(self.results)} checks, " + (f"failed: {', '.join(failed)}" if failed else "all passed")

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {"machine": self.machine, "ok": self.ok, "results": [asdict(result) for result in self.results]}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    machine: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    else:
        machine |= {"device": "cpu", "threads": torch.get_num_threads()}
    return machine
