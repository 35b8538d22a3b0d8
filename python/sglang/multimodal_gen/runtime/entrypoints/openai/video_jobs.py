"""Video jobs: created, watched to their one end, listed, deleted. In memory; files in a private directory."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import ErrorInfo, InternalError, InvalidValue, QueueFull, VideoNotFound
from sglang.multimodal_gen.runtime.entrypoints.engine_client import raise_if_terminal
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import NO_INPUTS, DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine
from sglang.multimodal_gen.runtime.managers.messages import (
    Cancelled,
    Failed,
    Finished,
    Progress,
    Queued,
    RequestEvent,
    Started,
)
from sglang.multimodal_gen.runtime.postprocess.naming import CONTACT_SHEET_ENDING, THUMBNAIL_ENDING, beside

logger = logging.getLogger(__name__)

_ID = re.compile(r"video_[0-9a-f]{32}")
Order = Literal["asc", "desc"]


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """One video as clients see it. Times in unix seconds; `progress` in percent, 100 only when it is complete.
    `profile` is the bare name of the trace file."""

    id: str
    model: str
    params: SamplingParams
    created_at: int
    path: Path
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    eta_s: float | None = None
    completed_at: int | None = None
    generation_time: float | None = None
    peak_memory_mb: float | None = None
    profile: str | None = None
    error: ErrorInfo | None = None
    notes: tuple[str, ...] = ()
    safety_identifier: str | None = None

    @property
    def thumbnail(self) -> Path:
        """Where the still of its middle frame lies once it is complete."""
        return beside(self.path, THUMBNAIL_ENDING)

    @property
    def contact_sheet(self) -> Path:
        """Where the image of its frames in a grid lies once it is complete."""
        return beside(self.path, CONTACT_SHEET_ENDING)

    def unlink(self) -> None:
        """Remove its files, as far as they are there."""
        for path in (self.path, self.thumbnail, self.contact_sheet):
            path.unlink(missing_ok=True)

    @property
    def is_final(self) -> bool:
        """No event will change it any more."""
        return self.status in ("completed", "failed")


class VideoJobs:
    """All jobs of this server, at most `capacity`: beyond it the oldest finished one goes, bytes and all."""

    def __init__(self, engine: Engine, directory: Path, *, capacity: int, delete_timeout_s: float) -> None:
        self._engine = engine
        self._directory = directory
        self._capacity = capacity
        self._delete_timeout_s = delete_timeout_s
        self._jobs: dict[str, VideoJob] = {}  # in order of creation
        self._watchers: dict[str, asyncio.Task[None]] = {}

    async def create(
        self,
        params: SamplingParams,
        *,
        model: str,
        safety_identifier: str | None = None,
        inputs: DecodedInputs = NO_INPUTS,
    ) -> VideoJob:
        """Hand one complete request that saves its output to the engine; returns once the engine has queued it.

        Raises:
            QueueFull: all jobs held are unfinished.
            ServingError: the engine refused the request.
        """
        self._make_room()
        job_id = f"video_{secrets.token_hex(16)}"
        file_name = f"{job_id}.{params.output_format}"
        job = VideoJob(
            id=job_id,
            model=model,
            created_at=int(time.time()),
            path=self._directory / file_name,
            params=dataclasses.replace(
                params,
                output_path=str(self._directory),
                output_file_name=file_name,
                thumbnail=True,
                contact_sheet=True,
            ),
            safety_identifier=safety_identifier,
        )
        async with self._engine.stored(inputs) as media:
            events = aiter(await self._engine.submit(job.params, request_id=job_id, inputs=media))
        raise_if_terminal(await anext(events))
        self._jobs[job_id] = job
        self._watchers[job_id] = asyncio.create_task(self._watch(job_id, events))
        return self._jobs[job_id]

    def get(self, job_id: str) -> VideoJob:
        """The job as it is now. Raises VideoNotFound."""
        if _ID.fullmatch(job_id) is None or job_id not in self._jobs:
            raise VideoNotFound(job_id)
        return self._jobs[job_id]

    def page(self, *, after: str | None, limit: int, order: Order) -> tuple[list[VideoJob], bool]:
        """Up to `limit` jobs in order of creation after the job `after`, and whether more follow.

        Raises:
            InvalidValue: `after` is no job's id (code `invalid_cursor`).
        """
        jobs = list(self._jobs.values())
        if order == "desc":
            jobs.reverse()
        if after is not None:
            if after not in self._jobs:
                raise InvalidValue("after", after, "the id of a video in the list", code="invalid_cursor")
            jobs = list(itertools.dropwhile(lambda job: job.id != after, jobs))[1:]
        return jobs[:limit], len(jobs) > limit

    async def delete(self, job_id: str) -> None:
        """Cancel the job when it runs, and remove it and its bytes. Raises VideoNotFound."""
        job = self.get(job_id)
        del self._jobs[job_id]  # from here on nobody finds it; its watcher removes what may still be written
        watcher = self._watchers.get(job_id)
        if watcher is not None:
            await self._engine.cancel(job_id)
            await asyncio.wait({watcher}, timeout=self._delete_timeout_s)
        job.unlink()

    async def close(self) -> None:
        """Stop watching; the engine ends what runs."""
        watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)

    async def _watch(self, job_id: str, events: AsyncIterator[RequestEvent]) -> None:
        """Follow a job to its end. Whatever happens here, the job ends: clients poll until it does."""
        created = self._jobs[job_id]
        try:
            async for event in events:
                self._apply(job_id, event)
        finally:
            self._watchers.pop(job_id, None)
            job = self._jobs.get(job_id)
            if job is None:
                with contextlib.suppress(OSError):
                    created.unlink()
            elif not job.is_final:
                self._end(job, InternalError("the server lost track of this video; create it again").info())

    def _apply(self, job_id: str, event: RequestEvent) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        match event:
            case Queued():
                self._jobs[job_id] = dataclasses.replace(job, eta_s=event.eta_s)
            case Started():
                self._jobs[job_id] = dataclasses.replace(job, status="in_progress", notes=event.notes)
            case Progress():
                percent = max(job.progress, min(99, int(event.fraction * 100)))
                self._jobs[job_id] = dataclasses.replace(job, status="in_progress", progress=percent, eta_s=event.eta_s)
            case Finished():
                self._complete(job, event)
            case Failed():
                self._end(job, event.error)
            case Cancelled():
                self._end(job, ErrorInfo(code="cancelled", message=f"the video was not finished: {event.reason}"))

    def _complete(self, job: VideoJob, event: Finished) -> None:
        self._jobs[job.id] = dataclasses.replace(
            job,
            status="completed",
            progress=100,
            eta_s=None,
            completed_at=int(time.time()),
            generation_time=event.generation_time,
            peak_memory_mb=event.peak_memory_bytes / 2**20,
            profile=None if event.profile_path is None else Path(event.profile_path).name,
            notes=event.notes or job.notes,
        )

    def _end(self, job: VideoJob, error: ErrorInfo) -> None:
        # OpenAI's client knows no status `cancelled`: it would take it for a success.
        self._jobs[job.id] = dataclasses.replace(
            job, status="failed", eta_s=None, completed_at=int(time.time()), error=error
        )

    def _make_room(self) -> None:
        while len(self._jobs) >= self._capacity:
            oldest = next((job for job in self._jobs.values() if job.is_final), None)
            if oldest is None:
                raise QueueFull(self._capacity)
            del self._jobs[oldest.id]
            oldest.unlink()
