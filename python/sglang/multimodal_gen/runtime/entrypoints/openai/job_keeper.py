"""The job store behind an asyncio loop: one thread owns the database, calls reach it in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sglang.multimodal_gen.errors import InsufficientStorage, StorageError
from sglang.multimodal_gen.runtime.managers.job_store import JobStore, KeptReply, VideoJob
from sglang.multimodal_gen.runtime.observability.logging_setup import fields

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class JobKeeper:
    """What has been awaited is on disk; `update` only promises that what comes later is written later."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError when the database cannot be used."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="job-store")
        self._store = self._thread.submit(JobStore, path).result()

    async def load(self) -> tuple[list[VideoJob], list[str], list[KeptReply]]:
        """All jobs, the oldest first, the ids of those that cannot be read, and the replies that told of jobs."""
        return await self._run(lambda: (*self._store.load(), self._store.replies()))

    async def insert(self, job: VideoJob, reply: KeptReply | None) -> None:
        """A new job and the reply that tells of it. Raises InsufficientStorage, StorageError."""
        await self._run(lambda: self._store.insert(job, reply))

    async def delete(self, job_id: str) -> None:
        """Forget a job. Raises InsufficientStorage, StorageError."""
        await self._run(lambda: self._store.delete(job_id))

    def update(self, job: VideoJob, *, synced: bool = True) -> None:
        """What a job has become. A failure is logged: the job goes on, and after a restart it begins again. See
        `JobStore.update` for `synced`."""
        done = self._thread.submit(self._store.update, job, synced=synced)
        done.add_done_callback(lambda done: _log_failure(done, job.id))

    def forget(self, job_id: str) -> None:
        """As `delete`, without waiting; a failure is logged."""
        self._thread.submit(self._store.delete, job_id).add_done_callback(lambda done: _log_failure(done, job_id))

    async def close(self) -> None:
        """Write what is still to be written."""
        await self._run(self._store.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], Answer]) -> Answer:
        try:
            return await asyncio.wrap_future(self._thread.submit(work))
        except InsufficientStorage:
            raise
        except StorageError as error:  # its sentence, which names a path, is for the log
            logger.error("%s", error)
            raise StorageError("the server cannot keep its jobs; its log says why") from error


def _log_failure(done: Future[None], job_id: str) -> None:
    error = done.exception()
    if error is not None:
        logger.error("what became of a job is not stored: %s", error, extra=fields(request_id=job_id))
