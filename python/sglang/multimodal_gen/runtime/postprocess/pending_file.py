"""A file that is whole or absent, even if the process is killed while writing it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from contextlib import suppress
from pathlib import Path

_NO_ANONYMOUS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NAME_PART = 50  # characters, at most 200 bytes: with the rest well below the 255 that file systems allow
_without_links = threading.Lock()


class PendingFile:
    """Bytes on the disk of `directory` that get a name only by `publish`; `discard` it in the end, published or not.

    Where the system can (Linux, most file systems) the file has no name before, so that a killed process leaves nothing
    behind; elsewhere it is called `.NAME.part-RANDOM`, after the beginning of `name`.

    Raises: OSError when the directory cannot be written.
    """

    def __init__(self, directory: Path, *, name: str) -> None:
        self.directory = directory
        self._part = f".{name[:_NAME_PART]}.part-{secrets.token_hex(4)}"
        self._published: str | None = None
        self._directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._fd, self._anonymous = self._open()
        except OSError:
            os.close(self._directory_fd)
            raise
        self._open_still = True

    def _open(self) -> tuple[int, bool]:
        if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
            try:
                return os.open(self.directory, os.O_TMPFILE | os.O_RDWR, 0o666), True
            except OSError as error:
                if error.errno not in _NO_ANONYMOUS_FILES:
                    raise
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        return os.open(self._part, flags, 0o666, dir_fd=self._directory_fd), False

    @property
    def path(self) -> str:
        """Opens the unfinished file for writing or reading; valid in this process until it is published."""
        return f"/proc/self/fd/{self._fd}" if self._anonymous else str(self.directory / self._part)

    def publish(self, name: str, *, overwrite: bool) -> Path:
        """Give the finished file its name, in one step.

        Raises: FileExistsError if the name is taken and `overwrite` is False; then another name may be tried.
        """
        if self._anonymous:
            self._name_part()
        if overwrite:
            os.replace(self._part, name, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
        else:
            self._link_or_rename(name)
            with suppress(FileNotFoundError):
                os.unlink(self._part, dir_fd=self._directory_fd)
        self._published = name
        return self.directory / name

    def withdraw(self) -> None:
        """Take back the name that was published; another may follow."""
        assert self._published is not None, "withdrawn before it was published"
        os.replace(self._published, self._part, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
        self._published = None

    def discard(self) -> None:
        """Let go of the file; nothing stays of what was not published. May be called at any time, more than once."""
        if not self._open_still:
            return
        self._open_still = False
        with suppress(FileNotFoundError):
            os.unlink(self._part, dir_fd=self._directory_fd)
        os.close(self._fd)
        os.close(self._directory_fd)

    def _name_part(self) -> None:
        """From nameless to `.NAME.part-RANDOM`, for the instant before its real name."""
        directory = self._directory_fd
        try:
            # An explicit src_dir_fd makes Python follow the link in /proc.
            os.link(self.path, self._part, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            # Some network file systems give nameless files but cannot name them.
            with Path(self.path).open("rb") as source, (self.directory / self._part).open("xb") as target:
                shutil.copyfileobj(source, target)
        self._anonymous = False

    def _link_or_rename(self, name: str) -> None:
        directory = self._directory_fd
        try:
            os.link(self._part, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            with _without_links:  # a rename overwrites; this lock is what keeps our own threads apart
                if (self.directory / name).exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
                os.replace(self._part, name, src_dir_fd=directory, dst_dir_fd=directory)


def write_whole(path: Path, data: bytes) -> None:
    """Put these bytes in the place of what the file held, or leave that; they are on the disk when this returns.

    Raises: OSError.
    """
    pending = PendingFile(path.parent, name=path.name)
    try:
        with Path(pending.path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        pending.publish(path.name, overwrite=True)
    finally:
        pending.discard()
