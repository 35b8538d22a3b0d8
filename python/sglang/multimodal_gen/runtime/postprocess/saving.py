"""From frames to a named file: format, name, encoder and publication of one output."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sglang.multimodal_gen.errors import InsufficientStorage, ServingError, StorageError
from sglang.multimodal_gen.runtime.postprocess.encoding import DEFAULT_X264_PRESET, Encoding, open_encoder
from sglang.multimodal_gen.runtime.postprocess.formats import (
    FormatWishes,
    OutputFormat,
    choose_format,
    quality_percent,
)
from sglang.multimodal_gen.runtime.postprocess.metadata import Metadata
from sglang.multimodal_gen.runtime.postprocess.naming import automatic_stem, check_file_name
from sglang.multimodal_gen.runtime.postprocess.object_store import StoredFile
from sglang.multimodal_gen.runtime.postprocess.pending_file import PendingFile
from sglang.multimodal_gen.runtime.postprocess.stills import CONTACT_SHEET, THUMBNAIL, Still
from sglang.multimodal_gen.runtime.postprocess.storage import LocalStorage, Storage

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OutputWishes(FormatWishes, Protocol):
    """What saving reads of a request; complete, with one seed and a frame rate."""

    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> object: ...
    @property
    def thumbnail(self) -> bool: ...
    @property
    def contact_sheet(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class SavedFiles:
    """One output's files: absolute paths of those that are on this machine, and those in an object store as `output`,
    `thumbnail` and `contact_sheet`."""

    output: Path | None
    thumbnail: Path | None
    contact_sheet: Path | None
    stored: Mapping[str, StoredFile]
    upload_seconds: float


class OutputWriter:
    """One output on its way to `directory`, fed chunk by chunk, with the small images that lie beside it.

    Everything that can be wrong with names, formats and the directory is raised on construction, before a frame exists.
    `metadata` is written into the file; None for none. `storage` gives the finished files their names: in `directory`,
    which is the default, in an object store, or both.

    Raises: InvalidRequest for wishes that cannot be honoured, StorageError when the directory cannot be used; `write`
        and `close` raise StorageError when the disk is full or the object store fails. After an error, call `abort`.
    """

    def __init__(
        self,
        wishes: OutputWishes,
        directory: str,
        *,
        num_frames: int,
        metadata: Metadata | None = None,
        storage: Storage | None = None,
    ) -> None:
        self._directory = directory
        self._storage = storage or LocalStorage()
        self._num_frames = num_frames
        self._written = 0
        chosen = choose_format(wishes, num_frames=num_frames)
        self._overwrite = wishes.output_file_name is not None
        encoding = _encoding(wishes, chosen)
        self._stem, self._ending = _split_name(wishes, default_suffix=chosen.suffix)
        self._stills = {
            kind: Still(kind, num_frames=num_frames)
            for kind, wanted in ((THUMBNAIL, wishes.thumbnail), (CONTACT_SHEET, wishes.contact_sheet))
            if wanted
        }
        self._files: dict[str, PendingFile] = {}  # by ending; the output comes last
        try:
            with self._storage_errors():
                self._open_files()
                self._encoder = open_encoder(self._files[self._ending].path, chosen, encoding, metadata=metadata)
        except ServingError:
            self._discard_files()
            raise

    def write(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [T, H, W, 3] RGB; they are copied or encoded before this returns."""
        first_frame = self._written
        self._written += len(frames)
        with self._storage_errors():
            self._encoder.write(frames)
        for still in self._stills.values():
            still.take(first_frame, frames)

    def close_unnamed(self) -> bytes:
        """Finish the output and give back what is in it; no file stays."""
        with self._storage_errors():
            self._finish()
            content = Path(self._files[self._ending].path).read_bytes()
        self._discard_files()
        return content

    def close(self) -> SavedFiles:
        """Finish the files and give them their names: the output's last, so that who sees it sees the others."""
        with self._storage_errors():
            self._finish()
            for kind, still in self._stills.items():
                still.save(self._files[kind.ending].path)
            published = self._storage.publish(self._files, self._stem, overwrite=self._overwrite)
        self._discard_files()
        names = {self._ending: "output", THUMBNAIL.ending: "thumbnail", CONTACT_SHEET.ending: "contact_sheet"}
        return SavedFiles(
            output=published.paths.get(self._ending),
            thumbnail=published.paths.get(THUMBNAIL.ending),
            contact_sheet=published.paths.get(CONTACT_SHEET.ending),
            stored={names[ending]: file for ending, file in published.stored.items()},
            upload_seconds=published.upload_seconds,
        )

    def _finish(self) -> None:
        assert self._written == self._num_frames, f"{self._written} of {self._num_frames} frames came"
        self._encoder.close()

    def abort(self) -> None:
        """Leave nothing behind. Harmless after `close`."""
        self._encoder.abort()
        self._discard_files()

    def _open_files(self) -> None:
        path = Path(self._directory).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        for ending in (*(kind.ending for kind in self._stills), self._ending):
            self._files[ending] = PendingFile(path.absolute(), name=self._stem + ending)

    def _discard_files(self) -> None:
        for file in self._files.values():
            file.discard()

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """The one place where the operating system's errors become a sentence."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise InsufficientStorage(
                    f"output_path: {self._directory} has no space left for this result; free some or choose another",
                    param="output_path",
                ) from error
            raise StorageError(
                f"output_path: {self._directory} cannot be written ({error.strerror}); choose a writable directory",
                param="output_path",
            ) from error


def _split_name(wishes: OutputWishes, *, default_suffix: str) -> tuple[str, str]:
    """The asked-for name as (`clip`, `.MP4`), with the default ending where it has none; else one made of the prompt.

    Raises: InvalidValue for a name that is not plain.
    """
    if wishes.output_file_name is None:
        assert isinstance(wishes.seed, int), "a saved request has exactly one seed"
        return automatic_stem(wishes.prompt, wishes.seed), default_suffix
    check_file_name(wishes.output_file_name)
    path = Path(wishes.output_file_name)
    return (path.stem, path.suffix) if path.suffix else (path.name, default_suffix)


def _encoding(wishes: OutputWishes, chosen: OutputFormat) -> Encoding:
    assert wishes.fps is not None, "defaults are merged in before a request is run"
    percent = quality_percent(
        chosen, output_quality=wishes.output_quality, output_compression=wishes.output_compression
    )
    return Encoding(fps=wishes.fps, percent=percent, x264_preset=wishes.x264_preset or DEFAULT_X264_PRESET)
