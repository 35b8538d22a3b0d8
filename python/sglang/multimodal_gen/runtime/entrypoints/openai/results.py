"""Finished files behind the HTTP server: how they answer and how they go, wherever they are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.entrypoints.openai.content import content_response, stored_response
from sglang.multimodal_gen.runtime.postprocess.object_store import ObjectStore

logger = logging.getLogger(__name__)

_CLOSE_S = 2.0


class Results:
    """Results by the path that they were to be saved at. A file that is there is the result; else it is the object of
    the same name, if there is a store. So a server that is given one goes on serving what it saved before."""

    def __init__(self, store: ObjectStore | None) -> None:
        self._store = store
        self._removals: set[asyncio.Task[None]] = set()

    @property
    def are_uploaded(self) -> bool:
        """Whether new results go to an object store."""
        return self._store is not None

    async def respond(self, request: Request, path: Path, *, file_format: str) -> Response:
        """The bytes, or the range of them that the request names.

        Raises:
            FileNotFoundError: it is nowhere.
            StorageUnavailable: the store does not answer.
        """
        if self._store is None or path.exists():
            return content_response(request, path, file_format=file_format)
        return await stored_response(request, self._store, path.name, file_format=file_format)

    @contextlib.asynccontextmanager
    async def opened(self, path: Path) -> AsyncIterator[BinaryIO]:
        """The bytes as a file that can be read at any place.

        Raises:
            FileNotFoundError: it is nowhere.
            StorageUnavailable: the store does not answer.
        """
        if self._store is None or path.exists():
            with path.open("rb") as stream:
                yield stream
            return
        facts = await self._store.facts(path.name)
        with tempfile.TemporaryFile() as copy:
            async for piece in self._store.read(path.name, 0, facts.size, etag=facts.etag):
                copy.write(piece)
            copy.seek(0)
            yield copy

    async def remove(self, paths: Sequence[Path]) -> None:
        """Remove files and objects, as far as they are there.

        Raises: StorageUnavailable; objects may be left then.
        """
        for path in paths:
            path.unlink(missing_ok=True)
        if self._store is not None:
            await asyncio.to_thread(self._store.remove, [self._store.key(path.name) for path in paths])

    def discard(self, paths: Sequence[Path]) -> None:
        """Remove what nobody can ask for any more: files at once, objects soon. Failures are logged."""
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if self._store is not None and paths:
            task = asyncio.create_task(self._remove_logged(paths))
            self._removals.add(task)  # the loop alone does not keep a task alive
            task.add_done_callback(self._removals.discard)

    async def close(self) -> None:
        """Give what `discard` began a moment to end."""
        if self._removals:
            await asyncio.wait(self._removals, timeout=_CLOSE_S)

    async def _remove_logged(self, paths: Sequence[Path]) -> None:
        try:
            await self.remove(paths)
        except (ServingError, OSError) as error:
            logger.warning("%s stays where it is: %s", paths[0].stem, error)
