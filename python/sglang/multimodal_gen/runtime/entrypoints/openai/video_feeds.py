"""Who looks at which video job, and what each of them has not seen yet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine
from sglang.multimodal_gen.runtime.managers.messages import Preview, RequestEvent, Started


class Job(Protocol):
    """What feeds need to know of a job."""

    @property
    def id(self) -> str:
        """Also the id of the engine's request."""

    @property
    def is_final(self) -> bool:
        """No event will change it any more."""


class Follower:
    """One who looks at a job: holds its newest state and preview until they are taken, so a slow one costs nothing."""

    def __init__(self, job: Job, *, previews: bool) -> None:
        self.previews = previews
        self._job: Job | None = job
        self._preview: Preview | None = None
        self._changed = asyncio.Event()
        self._changed.set()

    def put(self, *, job: Job | None = None, preview: Preview | None = None) -> None:
        """Something new; what was not taken yet is forgotten."""
        self._job = job or self._job
        self._preview = preview or self._preview
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Job | Preview]:
        """First the job as it is, then what changes, until it is final."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            job, preview = self._job, self._preview
            self._job = self._preview = None
            if preview is not None and (job is None or not job.is_final):
                yield preview
            if job is not None:
                yield job
                if job.is_final:
                    return


class JobFeeds:
    """All followers by job. While a job has one that wants previews, the engine is asked for them."""

    def __init__(self, engine: Engine, current: Callable[[str], Job]) -> None:
        """`current` gives a job as it is now, and raises VideoNotFound."""
        self._engine = engine
        self._current = current
        self._followers: dict[str, list[Follower]] = {}
        self._asking: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def follow(self, job_id: str, *, previews: bool) -> AsyncIterator[Follower]:
        """Look at a job for the length of the block. Raises VideoNotFound."""
        job = self._current(job_id)  # nothing is published between this and the registration
        follower = Follower(job, previews=previews)
        was_watched = self._is_watched(job.id)
        self._followers.setdefault(job.id, []).append(follower)
        try:
            if previews and not was_watched and not job.is_final:
                await self._engine.watch(job.id, watched=True)
            yield follower
        finally:
            self._followers[job.id].remove(follower)
            if not self._followers[job.id]:
                del self._followers[job.id]
            if previews and not self._is_watched(job.id):
                await self._engine.watch(job.id, watched=False)

    def _is_watched(self, job_id: str) -> bool:
        return any(follower.previews for follower in self._followers.get(job_id, ()))

    def publish(self, job: Job) -> None:
        """The job as it is now."""
        for follower in self._followers.get(job.id, ()):
            follower.put(job=job)

    def saw(self, event: RequestEvent) -> None:
        """What the engine says of a job, beside what changes the job itself."""
        if isinstance(event, Preview):
            for follower in self._followers.get(event.request_id, ()):
                if follower.previews:
                    follower.put(preview=event)
        elif isinstance(event, Started) and self._is_watched(event.request_id):
            # Perhaps by an engine that has not heard of its followers, when the job goes on after one was lost.
            asking = asyncio.create_task(self._engine.watch(event.request_id, watched=True))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
