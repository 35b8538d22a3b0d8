"""What servers leave on disk, told apart from what servers of other tests are using at the same moment."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_NAMES = "sglang-run-*"
_SHARED_MEMORY = Path("/dev/shm")


def _is_held(directory: Path) -> bool:
    """Whether a living server has this directory's lock; also while it is being made or removed."""
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@dataclass(frozen=True)
class RunDirectories:
    """Run directories of servers that start with `private` as their temp directory."""

    private: Path
    others: Path
    before: frozenset[Path]

    def left(self) -> list[Path]:
        """Those there are. In shared memory a twin is a test's own if no server elsewhere has it."""
        twins = set(_SHARED_MEMORY.glob(_NAMES)) - self.before if _SHARED_MEMORY.is_dir() else set()
        ours = [twin for twin in twins if not (self.others / twin.name).exists() and not _is_held(twin)]
        return [*self.private.glob(_NAMES), *ours]


@contextmanager
def private_run_directories() -> Iterator[RunDirectories]:
    """A temp directory of its own for every process started meanwhile; its path is short, for sockets' sake."""
    others = Path(tempfile.gettempdir())
    before = frozenset(_SHARED_MEMORY.glob(_NAMES)) if _SHARED_MEMORY.is_dir() else frozenset()
    with tempfile.TemporaryDirectory() as private, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", private)
        yield RunDirectories(Path(private), others, before)
