"""The directory that belongs to one server: its jobs, what they start from and make, and requests' saved states.

It outlives the server, which finds its jobs again by it. A lock keeps a second server out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sglang.multimodal_gen.errors import StateDirInUse, StorageError

_PATIENCE_S = 3.0  # the processes of a server that was just killed take a moment to end
_RETRY_S = 0.05


@dataclass(frozen=True)
class StateDir:
    """Paths in it; directories are made when they are asked for."""

    base: Path

    @property
    def files(self) -> Path:
        """Results that wait to be fetched."""
        return self._directory("files")

    @property
    def checkpoints(self) -> Path:
        """Requests' saved states."""
        return self._directory("checkpoints")

    @property
    def inputs(self) -> Path:
        """Decoded pictures and clips that jobs start from."""
        return self._directory("inputs")

    @property
    def jobs(self) -> Path:
        """The database of jobs."""
        return self._directory("") / "jobs.sqlite3"

    @property
    def adapters(self) -> Path:
        """Which adapters are loaded and set."""
        return self._directory("") / "adapters.json"

    def _directory(self, name: str) -> Path:
        path = self.base / name
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        return path


class _Owner(msgspec.Struct, frozen=True):
    """What the lock file says of who holds it."""

    address: str
    pid: int


@contextlib.contextmanager
def claimed(base: Path, *, address: str) -> Iterator[int]:
    """Hold the directory for the server that listens on `address`; yields the lock's descriptor, which children may
    inherit: the lock lasts until the last of them has ended.

    Raises:
        StateDirInUse: another server holds it.
        StorageError: it cannot be made or written.
    """
    path = base / "lock"
    try:
        base.mkdir(parents=True, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=base):
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"state_dir: {base} cannot be written ({error.strerror}); choose another with --state-dir"
        raise StorageError(text, param="state_dir") from None
    try:
        _lock(fd, base)
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(_Owner(address=address, pid=os.getpid())), 0)
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, base: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StateDirInUse(base, _holder(fd)) from None
            time.sleep(_RETRY_S)
        else:
            return


def _holder(fd: int) -> str:
    try:
        owner = msgspec.json.decode(os.pread(fd, 1000, 0), type=_Owner)
    except msgspec.DecodeError:
        return "another server"
    return f"the server on {owner.address} (pid {owner.pid})"
