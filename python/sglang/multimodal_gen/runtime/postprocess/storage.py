"""Where finished files go: a directory of this machine, or an object store. Who saves does not know which."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sglang.multimodal_gen.envs import store_settings
from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.postprocess.naming import numbered
from sglang.multimodal_gen.runtime.postprocess.object_store import ObjectStore, StoredFile
from sglang.multimodal_gen.runtime.postprocess.pending_file import PendingFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Published:
    """The files of one result by their endings: absolute paths of those that are on this machine, and those that are in
    the object store; `upload_seconds` were spent on the latter."""

    paths: Mapping[str, Path] = field(default_factory=dict)
    stored: Mapping[str, StoredFile] = field(default_factory=dict)
    upload_seconds: float = 0.0


class Storage(ABC):
    """Gives finished files their names."""

    @abstractmethod
    def publish(self, files: Mapping[str, PendingFile], stem: str, *, overwrite: bool) -> Published:
        """All of `files`, by ending and the most important last, under the first of stem, stem-1, … that is free for
        each of them; with `overwrite` under `stem`, in place of what is there. All of them, or none.

        Raises: OSError for the disk, StorageError for the object store.
        """

    @abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Take back what was uploaded. A failure is logged."""


class LocalStorage(Storage):
    """The directory that the files were opened in."""

    def publish(self, files: Mapping[str, PendingFile], stem: str, *, overwrite: bool) -> Published:
        """See Storage."""
        for candidate in numbered(stem):
            try:
                return Published(paths=_name_all(files, candidate, overwrite=overwrite))
            except FileExistsError:
                continue
        raise AssertionError("the names ran out")

    def remove(self, keys: Iterable[str]) -> None:
        """See Storage."""
        assert not list(keys), "nothing was uploaded"


class ObjectStorage(Storage):
    """An object store, and with `keep_local` the directory that the files were opened in as well.

    Files are uploaded before they get a name on this machine, so a failed upload leaves an older file as it was.
    """

    def __init__(self, store: ObjectStore, *, keep_local: bool) -> None:
        self._store = store
        self._keep_local = keep_local

    def publish(self, files: Mapping[str, PendingFile], stem: str, *, overwrite: bool) -> Published:
        """See Storage."""
        begin = time.perf_counter()
        for candidate in numbered(stem):
            if not overwrite and self._is_taken(files, candidate):
                continue
            stored = self._upload(files, candidate)
            seconds = time.perf_counter() - begin
            try:
                paths = _name_all(files, candidate, overwrite=overwrite) if self._keep_local else {}
            except OSError as error:
                self.remove(file.key for file in stored.values())
                if isinstance(error, FileExistsError):  # since we looked
                    continue
                raise
            return Published(paths=paths, stored=stored, upload_seconds=seconds)
        raise AssertionError("the names ran out")

    def remove(self, keys: Iterable[str]) -> None:
        """See Storage."""
        try:
            self._store.remove(keys)
        except ServingError as error:
            logger.warning("an object stays in the bucket that nobody knows of: %s", error)

    def _is_taken(self, files: Mapping[str, PendingFile], stem: str) -> bool:
        """Whether a file or an object has one of the names. Two machines that ask at once may both hear no."""
        return any(
            (self._keep_local and (file.directory / (stem + ending)).exists()) or self._store.has(stem + ending)
            for ending, file in files.items()
        )

    def _upload(self, files: Mapping[str, PendingFile], stem: str) -> dict[str, StoredFile]:
        stored: dict[str, StoredFile] = {}
        try:
            for ending, file in files.items():
                stored[ending] = self._store.put(stem + ending, file.path)
        except BaseException:
            if stored:
                self.remove(file.key for file in stored.values())
            raise
        return stored


def _name_all(files: Mapping[str, PendingFile], stem: str, *, overwrite: bool) -> dict[str, Path]:
    """Their names on this machine; none when one is taken. Raises: FileExistsError, OSError."""
    named: dict[str, Path] = {}
    try:
        for ending, file in files.items():
            named[ending] = file.publish(stem + ending, overwrite=overwrite)
    except OSError:
        for ending in named:
            files[ending].withdraw()
        raise
    return named


def open_object_store(environ: Mapping[str, str]) -> ObjectStore | None:
    """The object store that the environment names; None when results stay on this machine.

    Raises: InvalidValue, MissingParameter, MissingPackage.
    """
    settings = store_settings(environ)
    return None if settings is None else ObjectStore(settings)


def open_storage(environ: Mapping[str, str], *, keep_local: bool) -> Storage:
    """Where results go. Raises as `open_object_store` does."""
    store = open_object_store(environ)
    return LocalStorage() if store is None else ObjectStorage(store, keep_local=keep_local)


def check_storage(environ: Mapping[str, str]) -> None:
    """Before anything starts: whether results can be uploaded, if they are to be.

    Raises: as `open_object_store` and `ObjectStore.check` do.
    """
    store = open_object_store(environ)
    if store is not None:
        store.check()
        settings = store.settings
        logger.info("results go to the bucket %s, prefix %r, at %s", settings.bucket, settings.prefix, settings.place)
