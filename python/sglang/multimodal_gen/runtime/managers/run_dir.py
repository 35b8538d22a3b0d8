"""The server's private run directory, and arrays that travel through it as mapped files.

One directory under the temp directory holds sockets, the lock and private state; a twin in /dev/shm holds the arrays
when there is room. Both are mode 0700 and go with the server; what a killed server left behind is swept by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import mmap
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from sglang.multimodal_gen.errors import InsufficientStorage, StorageError
from sglang.multimodal_gen.runtime.managers.messages import MappedArray

if TYPE_CHECKING:
    import numpy as np

_PREFIX = "sglang-run-"
_LOCK = "lock"
_SHARED_MEMORY = Path("/dev/shm")
_MAX_CONTENT_BYTES = 64 * 2**10  # up to here a copy through a socket is faster than a file
_YOUNG_SECONDS = 30.0  # a server may be between creating a directory and its lock file
_LOCK_SECONDS = 2.0  # or between creating the lock file and locking it


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. `fast` is the directory in shared memory, None where there is none."""

    base: Path
    fast: Path | None

    @classmethod
    def at(cls, base: str) -> RunDir:
        """The run directory that another process of this server created."""
        twin = _SHARED_MEMORY / Path(base).name
        return cls(Path(base), twin if twin.is_dir() else None)

    @property
    def scheduler_address(self) -> str:
        """Where entry points reach the scheduler."""
        return f"ipc://{self.base / 'scheduler.sock'}"

    @property
    def output_address(self) -> str:
        """Where the output process reaches the scheduler."""
        return f"ipc://{self.base / 'output.sock'}"

    @property
    def private_state(self) -> Path:
        """For files that live as long as the server when it has no --state-dir."""
        path = self.base / "state"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def remove(self) -> None:
        """Delete everything; whatever is already gone is fine."""
        for path in (self.fast, self.base):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)

    def put(self, array: np.ndarray) -> MappedArray:
        """`array` (any dtype, made contiguous) as a file for one receiver.

        Raises:
            StorageError: neither shared memory nor the temp directory has room.
        """
        file, view = self._create(array.nbytes)
        if array.nbytes:
            import numpy as np  # not needed by processes that only pass names on

            np.frombuffer(view, dtype=array.dtype).reshape(array.shape)[...] = array
        return MappedArray(file=file, shape=tuple(int(n) for n in array.shape), dtype=array.dtype.str)

    def send(self, array: np.ndarray) -> MappedArray:
        """`array` for one receiver, which calls `take`: in the message itself where it is small. Raises as `put`."""
        if array.nbytes > _MAX_CONTENT_BYTES:
            return self.put(array)
        return MappedArray(shape=array.shape, dtype=array.dtype.str, content=array.tobytes())

    def allocate(self, shape: tuple[int, ...], dtype: str) -> tuple[MappedArray, np.ndarray]:
        """A file to be filled in place, and the array over it."""
        import numpy as np

        kind = np.dtype(dtype)
        file, view = self._create(int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
        return MappedArray(file=file, shape=shape, dtype=kind.str), np.frombuffer(view, dtype=kind).reshape(shape)

    def blank(self, shape: tuple[int, ...]) -> MappedArray:
        """A file of zeros, uint8 [shape]. Raises StorageError as `put` does."""
        file, _ = self._create(math.prod(shape))
        return MappedArray(file=file, shape=shape, dtype="|u1")

    def link(self, ref: MappedArray) -> MappedArray:
        """The same content under a name of its own, which takes no room; either may be discarded before the other."""
        path, name = self._find(ref.file), _new_name()
        try:
            path.with_name(name).hardlink_to(path)
        except OSError as error:
            raise StorageError(f"an array between two processes cannot be shared: {error.strerror}") from error
        return msgspec.structs.replace(ref, file=name)

    def take(self, ref: MappedArray) -> np.ndarray:
        """Map the file and unlink it; the memory lives as long as the array. Raises StorageError when it is gone."""
        if ref.content is not None:
            return self._as_array(ref, bytearray(ref.content))
        array = self._map(ref, mmap.ACCESS_WRITE)
        self.discard(ref)
        return array

    def map(self, ref: MappedArray) -> np.ndarray:
        """Map the file and leave it; what is written into the array stays in this process."""
        return self._map(ref, mmap.ACCESS_COPY)

    def _map(self, ref: MappedArray, access: int) -> np.ndarray:
        with self._find(ref.file).open("r+b") as stream:
            size = os.fstat(stream.fileno()).st_size
            return self._as_array(ref, mmap.mmap(stream.fileno(), size, access=access) if size else b"")

    @staticmethod
    def _as_array(ref: MappedArray, content: mmap.mmap | bytearray | bytes) -> np.ndarray:
        import numpy as np

        kind = np.dtype(ref.dtype)
        count = math.prod(ref.shape)
        if len(content) < count * kind.itemsize:
            raise StorageError("an array between two processes was cut short")
        return np.frombuffer(content, dtype=kind, count=count).reshape(ref.shape)

    def discard(self, ref: MappedArray) -> None:
        """Unlink a file that nobody will map; it may be gone already. Raises StorageError for what is no such name."""
        if ref.content is not None:
            return
        _check_name(ref.file)
        for directory in (self.fast, self.base):
            if directory is not None:
                (directory / ref.file).unlink(missing_ok=True)

    def exists(self, file: str) -> bool:
        """Whether nobody has mapped the file yet."""
        return any(d is not None and (d / file).exists() for d in (self.fast, self.base))

    def _find(self, file: str) -> Path:
        _check_name(file)
        for directory in (self.fast, self.base):
            if directory is not None and (directory / file).exists():
                return directory / file
        raise StorageError("an array between two processes is gone")

    def _create(self, size: int) -> tuple[str, mmap.mmap | bytes]:
        file = _new_name()
        for directory in (self.fast, self.base):
            if directory is None:
                continue
            try:
                return file, _allocate(directory / file, size)
            except OSError as error:
                (directory / file).unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                    raise
        raise InsufficientStorage(f"no room for {size / 2**20:.0f} MiB in shared memory or the temp directory")


def _new_name() -> str:
    return f"m-{secrets.token_hex(12)}"


def _check_name(file: str) -> None:
    if "/" in file or "\0" in file or not file.startswith("m-"):
        raise StorageError("a message named a file outside the run directory")


def _allocate(path: Path, size: int) -> mmap.mmap | bytes:
    """Create and map a file of `size` bytes whose blocks are really there, so that writing cannot hit SIGBUS."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        if not size:
            return b""
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


class OwnedRunDir:
    """A run directory that this process created and locks; `close` removes it."""

    def __init__(self) -> None:
        sweep()
        base = Path(tempfile.mkdtemp(prefix=_PREFIX))
        twin = self._make_twin(base.name)
        # One in each: a server with another temp directory sees the twin alone.
        self._locks = [_lock_file(directory / _LOCK) for directory in (base, twin) if directory is not None]
        self.paths = RunDir(base, twin)

    @staticmethod
    def _make_twin(name: str) -> Path | None:
        twin = _SHARED_MEMORY / name
        try:
            twin.mkdir(mode=0o700)
        except OSError:
            return None
        return twin

    def close(self) -> None:
        """Remove the directory, then let go of the lock."""
        self.paths.remove()
        for lock in self._locks:
            os.close(lock)


def _lock_file(path: Path) -> int:
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def sweep() -> None:
    """Remove run directories of this user whose server is gone."""
    for base in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if base.stat().st_uid == os.getuid() and _is_orphan(base):
                RunDir(base, _SHARED_MEMORY / base.name).remove()
    if _SHARED_MEMORY.is_dir():
        for twin in _SHARED_MEMORY.glob(_PREFIX + "*"):
            with contextlib.suppress(OSError):
                ours = twin.stat().st_uid == os.getuid() and not (Path(tempfile.gettempdir()) / twin.name).exists()
                if ours and _is_orphan(twin):
                    shutil.rmtree(twin, ignore_errors=True)


def _is_orphan(base: Path) -> bool:
    """Whether nobody holds the lock. A directory without one may be a server that is just starting."""
    try:
        fd = os.open(base / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - base.stat().st_mtime > _YOUNG_SECONDS
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return time.time() - base.stat().st_mtime > _LOCK_SECONDS
