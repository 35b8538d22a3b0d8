"""From frames to a named file: format, name, encoder and publication of one output."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.postprocess.encoding import open_encoder
from sglang.multimodal_gen.runtime.postprocess.formats import FormatWishes, choose_format, quality_percent
from sglang.multimodal_gen.runtime.postprocess.naming import automatic_stem, check_file_name, numbered
from sglang.multimodal_gen.runtime.postprocess.pending_file import PendingFile

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OutputWishes(FormatWishes, Protocol):
    """What saving reads of a request; complete, with one seed and a frame rate."""

    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> object: ...
    @property
    def fps(self) -> int | None: ...


class OutputWriter:
    """One output on its way to `directory`, fed chunk by chunk.

    Everything that can be wrong with names, formats and the directory is raised on construction, before a frame exists.

    Raises: InvalidRequest for wishes that cannot be honoured, StorageError when the directory cannot be used; `write`
        and `close` raise StorageError when the disk is full. After an error, call `abort`.
    """

    def __init__(self, wishes: OutputWishes, directory: str, *, num_frames: int) -> None:
        self._directory = directory
        self._num_frames = num_frames
        self._written = 0
        chosen = choose_format(wishes, num_frames=num_frames)
        percent = quality_percent(
            chosen, output_quality=wishes.output_quality, output_compression=wishes.output_compression
        )
        self._overwrite = wishes.output_file_name is not None
        if wishes.output_file_name is not None:
            check_file_name(wishes.output_file_name)
            stem, suffix = _split(wishes.output_file_name, default_suffix=chosen.suffix)
        else:
            assert isinstance(wishes.seed, int), "a saved request has exactly one seed"
            stem, suffix = automatic_stem(wishes.prompt, wishes.seed), chosen.suffix
        self._names = numbered(stem, suffix)
        assert wishes.fps is not None, "defaults are merged in before a request is run"
        with self._storage_errors():
            path = Path(directory).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            self._file = PendingFile(path.absolute(), name=stem + suffix)
            try:
                self._encoder = open_encoder(self._file.path, chosen, fps=wishes.fps, percent=percent)
            except OSError:
                self._file.discard()
                raise

    def write(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [T, H, W, 3] RGB; they are copied or encoded before this returns."""
        self._written += len(frames)
        with self._storage_errors():
            self._encoder.write(frames)

    def close(self) -> Path:
        """Finish the file and give it its name; the absolute path."""
        assert self._written == self._num_frames, f"{self._written} of {self._num_frames} frames came"
        with self._storage_errors():
            self._encoder.close()
            for name in self._names:
                try:
                    return self._file.publish(name, overwrite=self._overwrite)
                except FileExistsError:
                    continue
        raise AssertionError("the names ran out")

    def abort(self) -> None:
        """Leave nothing behind. Harmless after `close`."""
        self._encoder.abort()
        self._file.discard()

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """The one place where the operating system's errors become a sentence."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise StorageError(
                    f"output_path: {self._directory} has no space left for this result; free some or choose another",
                    param="output_path",
                ) from error
            raise StorageError(
                f"output_path: {self._directory} cannot be written ({error.strerror}); choose a writable directory",
                param="output_path",
            ) from error


def _split(name: str, *, default_suffix: str) -> tuple[str, str]:
    """`clip.MP4` -> (`clip`, `.MP4`); a name without ending gets the default one."""
    path = Path(name)
    return (path.stem, path.suffix) if path.suffix else (name, default_suffix)
