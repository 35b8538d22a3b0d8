"""Video jobs: created, watched to their one end, listed, deleted; they outlive the processes that work on them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    DeadlineExceeded,
    EngineStopped,
    ErrorInfo,
    InternalError,
    InvalidValue,
    QueueFull,
    RequestCancelled,
    ServingError,
    storage_error,
)
from sglang.multimodal_gen.errors_http import VideoNotFound
from sglang.multimodal_gen.runtime.entrypoints.engine_client import raise_if_terminal
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import NO_INPUTS, DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import Engine, JobSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.job_keeper import JobKeeper
from sglang.multimodal_gen.runtime.entrypoints.openai.job_shelf import JobShelf, Order
from sglang.multimodal_gen.runtime.entrypoints.openai.kept_inputs import load_inputs, save_inputs
from sglang.multimodal_gen.runtime.entrypoints.openai.keys import NOBODY, Caller
from sglang.multimodal_gen.runtime.entrypoints.openai.results import Results
from sglang.multimodal_gen.runtime.entrypoints.openai.video_feeds import JobFeeds
from sglang.multimodal_gen.runtime.entrypoints.openai.webhooks import Webhooks
from sglang.multimodal_gen.runtime.managers.job_store import KeptReply, VideoJob
from sglang.multimodal_gen.runtime.managers.messages import (
    Cancelled,
    Failed,
    Finished,
    Preview,
    Progress,
    Queued,
    RequestEvent,
    Started,
)
from sglang.multimodal_gen.runtime.managers.state_dir import StateDir
from sglang.multimodal_gen.runtime.managers.state_keeper import state_name
from sglang.multimodal_gen.runtime.observability.logging_setup import fields
from sglang.multimodal_gen.runtime.postprocess.naming import CONTACT_SHEET_ENDING, THUMBNAIL_ENDING, beside

logger = logging.getLogger(__name__)

_ID = re.compile(r"video_[0-9a-f]{32}")
_SWEEP_S = 30.0
_RETRY_S = 0.5


class VideoJobs:
    """All jobs of this server. What is kept of them is on disk before anybody hears of it."""

    def __init__(self, engine: Engine, state: StateDir, settings: JobSettings, results: Results) -> None:
        """Raises StorageError when the database of jobs cannot be used."""
        self._engine = engine
        self._state = state
        self._settings = settings
        self._results = results
        self._directory = state.files / "videos"
        self._keeper = JobKeeper(state.jobs)
        self._jobs = JobShelf(capacity=settings.capacity, max_output_bytes=settings.max_output_bytes)
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.feeds = JobFeeds(engine, self._current)
        self._webhooks = None if settings.webhook is None else Webhooks(settings.webhook, self._webhook_settled)

    # -- the server's life --

    async def start(self) -> list[KeptReply]:
        """Find the jobs of the server before this one and go on with them; returns the replies that told of them."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        jobs, unreadable, replies = await self._keeper.load()
        self._jobs.load(_waiting(job) for job in jobs)
        await asyncio.to_thread(self._remove_strangers, frozenset(unreadable))
        unfinished = [job for job in jobs if not job.is_final]
        if unfinished:
            logger.info("going on with %d videos of the server before this one", len(unfinished))
        self._tasks = [asyncio.create_task(self._go_on(unfinished)), asyncio.create_task(self._sweep())]
        for job in jobs:
            self._tell(job)
        return replies

    async def drain(self, grace_s: float) -> None:
        """Wait for those videos that will be complete in that time; where there is no next server, for all of them. The
        engine saves the others when it ends."""
        deadline = time.monotonic() + grace_s
        while (left := deadline - time.monotonic()) > 0:
            ending = {self._watchers[job.id] for job in self._jobs.values() if self._ends_within(left, job)}
            if not ending:
                return
            await asyncio.wait(ending, timeout=min(left, _RETRY_S))

    def _ends_within(self, seconds: float, job: VideoJob) -> bool:
        if job.id not in self._watchers:
            return False
        return not self._settings.outlive or (
            job.status == "in_progress" and job.eta_s is not None and job.eta_s <= seconds
        )

    async def close(self) -> None:
        """Stop watching. The engine ends what runs, and the next server goes on with it."""
        tasks = [*self._tasks, *self._watchers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._webhooks is not None:
            await self._webhooks.close()
        await self._results.close()
        await self._keeper.close()

    def _remove_strangers(self, unreadable: Collection[str]) -> None:
        """Files that no job knows: of jobs that were deleted, or not accepted, when a process was killed. Those of jobs
        that only another release can read stay."""
        jobs = list(self._jobs.values())
        results = {path.name for job in jobs for path in self.files(job)}
        results |= {path.name for path in self._directory.iterdir() if path.name.partition(".")[0] in unreadable}
        inputs = {self._inputs_of(job_id).name for job_id in (*(job.id for job in jobs if job.has_inputs), *unreadable)}
        states = {state_name(job_id) for job_id in (*(job.id for job in jobs if not job.is_final), *unreadable)}
        for directory, names in (
            (self._directory, results),
            (self._state.inputs, inputs),
            (self._state.checkpoints, states),
        ):
            for path in directory.iterdir():
                if path.name not in names:
                    path.unlink(missing_ok=True)

    async def _go_on(self, unfinished: Iterable[VideoJob]) -> None:
        """Hand the jobs to the engine again, in their old order."""
        for job in unfinished:
            if job.id in self._jobs:
                passed_s = max(0.0, time.time() - job.created_at - 1)  # created_at is rounded down
                self._watchers[job.id] = asyncio.create_task(self._watch(job.id, None, _due(job, passed_s=passed_s)))
                await asyncio.sleep(0)

    async def _sweep(self) -> None:
        while True:
            self._forget(self._jobs.excess())
            await asyncio.sleep(_SWEEP_S)

    # -- what clients do --

    async def create(
        self,
        params: SamplingParams,
        *,
        model: str,
        safety_identifier: str | None = None,
        inputs: DecodedInputs = NO_INPUTS,
        remixed_from: str | None = None,
        owner: Caller = NOBODY,
        reply_for: Callable[[VideoJob], KeptReply | None] = lambda job: None,
    ) -> VideoJob:
        """Hand one complete request that saves its output to the engine; returns once the engine has queued it and the
        job is on disk, with the reply that `reply_for` makes of it. Returned is what that reply tells of.

        Raises:
            QueueFull: all jobs held are unfinished.
            InsufficientStorage: there is no room for what it starts from.
            StorageError: the job cannot be kept.
            ServingError: the engine refused the request.
        """
        self._forget(self._jobs.excess())
        self._forget(self._jobs.crowded())
        job = self._new_job(params, model=model, inputs=inputs)
        job = msgspec.structs.replace(
            job, safety_identifier=safety_identifier, remixed_from=remixed_from, owner=owner.id or ""
        )
        self._jobs.reserve(job)
        self._forget(self._jobs.excess())
        due = _due(job)
        try:
            await self._keep_inputs(job, inputs)
            await self._keeper.insert(job, reply_for(job))
            events = await self._submit(job, inputs, job.params)
            first = await anext(events)
            raise_if_terminal(first)
        except BaseException:
            await asyncio.shield(self._discard(job))
            raise
        self._jobs.put(job)
        self._apply(job.id, first)
        self._watchers[job.id] = asyncio.create_task(self._watch(job.id, events, due))
        return job

    def _new_job(self, params: SamplingParams, *, model: str, inputs: DecodedInputs) -> VideoJob:
        job_id = f"video_{secrets.token_hex(16)}"
        file_name = f"{job_id}.{params.output_format}"
        saved = dataclasses.replace(
            params,
            output_path=str(self._directory),
            output_file_name=file_name,
            thumbnail=True,
            contact_sheet=True,
        )
        return VideoJob(
            id=job_id,
            model=model,
            created_at=int(time.time()),
            file_name=file_name,
            params=saved,
            has_inputs=bool(inputs),
            num_input_bytes=inputs.num_bytes,
        )

    async def _keep_inputs(self, job: VideoJob, inputs: DecodedInputs) -> None:
        if not job.has_inputs:
            return
        try:
            await asyncio.to_thread(save_inputs, self._inputs_of(job.id), inputs)
        except OSError as error:
            raise storage_error("the server cannot keep what the video starts from", error) from error

    async def _discard(self, job: VideoJob) -> None:
        """The job was not accepted."""
        self._jobs.pop(job.id)
        await self._engine.cancel(job.id)
        self._remove_all(job)
        self._keeper.forget(job.id)

    def holds(self, job_id: str) -> bool:
        """Whether it is still there."""
        self._forget(self._jobs.excess())
        return job_id in self._jobs

    def _current(self, job_id: str) -> VideoJob:
        job = self._jobs.get(job_id)
        if job is None:
            raise VideoNotFound(job_id)
        return job

    def get(self, job_id: str, viewer: Caller = NOBODY) -> VideoJob:
        """The job as it is now, if it is the viewer's to see. Raises VideoNotFound."""
        self._forget(self._jobs.excess())
        job = self._jobs.get(job_id) if _ID.fullmatch(job_id) else None
        if job is None or not _may_see(viewer, job.owner):
            raise VideoNotFound(job_id)
        return job

    def page(
        self, *, after: str | None, limit: int, order: Order, viewer: Caller = NOBODY
    ) -> tuple[list[VideoJob], bool]:
        """Up to `limit` of the viewer's jobs in order of creation after the job `after`, which may have gone meanwhile,
        and whether more follow.

        Raises:
            InvalidValue: `after` is no job's id (code `invalid_cursor`).
        """
        self._forget(self._jobs.excess())
        place = None if after is None else self._jobs.place(after)
        if after is not None and (place is None or not _may_see(viewer, place.owner)):
            raise InvalidValue("after", after, "the id of a video in the list", code="invalid_cursor")
        jobs = (job for job in self._jobs.beyond(place, order) if _may_see(viewer, job.owner))
        page = list(itertools.islice(jobs, limit + 1))
        return page[:limit], len(page) > limit

    async def delete(self, job_id: str, viewer: Caller = NOBODY) -> None:
        """Cancel the job when it runs, and remove it and its bytes.

        Raises:
            VideoNotFound: there is no such job.
            StorageError: it cannot be forgotten.
            StorageUnavailable: its bytes are in a store that does not answer; a complete job is still there then.
        """
        job = self.get(job_id, viewer)
        was_final = job.is_final
        if was_final:
            await self._results.remove(self.files(job))
        await self._keeper.delete(job_id)
        job = self._current(job_id)  # another call may have deleted it, or it has ended
        if not job.is_final:
            deleted = RequestCancelled("the video was deleted").info()
            self.feeds.publish(
                msgspec.structs.replace(job, status="failed", completed_at=int(time.time()), error=deleted)
            )
        self._jobs.pop(job_id)  # from here on nobody finds it; its watcher removes what may still be written
        watcher = self._watchers.get(job_id)
        if watcher is not None:
            await self._engine.cancel(job_id)
            await asyncio.wait({watcher}, timeout=self._settings.delete_timeout_s)
        if watcher is not None or job.is_final != was_final:
            await self._results.remove(self.files(job))
        self._unlink_own(job)

    # -- files --

    def path(self, job: VideoJob) -> Path:
        """Where the result lies once the job is complete."""
        return self._directory / job.file_name

    def thumbnail(self, job: VideoJob) -> Path:
        """Where the still of its middle frame lies then."""
        return beside(self.path(job), THUMBNAIL_ENDING)

    def contact_sheet(self, job: VideoJob) -> Path:
        """Where the image of its frames in a grid lies then."""
        return beside(self.path(job), CONTACT_SHEET_ENDING)

    def files(self, job: VideoJob) -> tuple[Path, ...]:
        """All of the result."""
        return self.path(job), self.thumbnail(job), self.contact_sheet(job)

    def _inputs_of(self, job_id: str) -> Path:
        return self._state.inputs / f"{job_id}.npz"

    def _remove_all(self, job: VideoJob) -> None:
        self._results.discard(self.files(job))
        self._unlink_own(job)

    def _unlink_own(self, job: VideoJob) -> None:
        """What the job has besides its result."""
        for path in (self._inputs_of(job.id), self._state.checkpoints / state_name(job.id)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    # -- the engine --

    async def _submit(
        self, job: VideoJob, inputs: DecodedInputs, params: SamplingParams
    ) -> AsyncIterator[RequestEvent]:
        async with self._engine.stored(inputs) as media:
            return aiter(await self._engine.submit(params, request_id=job.id, inputs=media, durable=True))

    async def _watch(self, job_id: str, events: AsyncIterator[RequestEvent] | None, due: float | None) -> None:
        """Follow a job to its end, from engine to engine; without `events` it is handed over first. Its time is over at
        `due`, of the monotonic clock.

        Whatever happens here, the job ends: clients poll until it does.
        """
        created = job = self._jobs.get(job_id)
        assert created is not None, "a job is watched from its creation on"
        try:
            while job is not None and not job.is_final:
                events = await self._again(job, due) if events is None else events
                if not await self._follow(job_id, events):
                    return
                events = None
                await asyncio.sleep(_RETRY_S)
                job = self._jobs.get(job_id)
        except ServingError as error:
            self._end(job_id, error.info())
        except Exception:
            logger.exception("a job was lost track of", extra=fields(request_id=job_id))
            self._end(job_id, InternalError("the server lost track of this video; create it again").info())
        finally:
            self._watchers.pop(job_id, None)
            if job_id not in self._jobs:
                self._remove_all(created)

    async def _again(self, job: VideoJob, due: float | None) -> AsyncIterator[RequestEvent]:
        inputs = await asyncio.to_thread(load_inputs, self._inputs_of(job.id)) if job.has_inputs else NO_INPUTS
        params = _rest_of(job.params, due)
        if job.lora is not None:
            # Others may be set by now.
            params = dataclasses.replace(params, lora=tuple(use.as_field() for use in job.lora))
        return await self._submit(job, inputs, params)

    async def _follow(self, job_id: str, events: AsyncIterator[RequestEvent]) -> bool:
        """The events of one engine; whether the job is to be handed to the next one."""
        async for event in events:
            if self._interrupts(event):
                self._become(job_id, status="queued", eta_s=None, queue_position=None)
                return self._engine.state.state not in ("failed", "stopping")
            self._apply(job_id, event)
        return False

    def _interrupts(self, event: RequestEvent) -> bool:
        """Whether it is the engine that ends here, or has no room for jobs of before, and not the job."""
        if isinstance(event, Failed):
            return event.error.code in (EngineStopped.code, QueueFull.code) or self._engine.state.state == "failed"
        return isinstance(event, Cancelled) and event.engine_stopped

    def _apply(self, job_id: str, event: RequestEvent) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        running: dict[str, Any]
        match event:
            case Queued():
                lora = event.lora if job.lora is None else job.lora
                self._become(job_id, queue_position=event.position, eta_s=event.eta_s, lora=lora, kept=job.lora is None)
            case Started():
                running = {"status": "in_progress", "notes": event.notes, "queue_position": None}
                self._become(job_id, **running, started_at=job.started_at or int(time.time()), kept=True)
            case Progress():
                percent = max(job.progress, min(99, int(event.fraction * 100)))
                running = {"status": "in_progress", "progress": percent, "queue_position": None}
                moved = percent > job.progress  # what clients have seen of it is not taken back after a restart
                self._become(job_id, **running, eta_s=event.eta_s, kept=moved, synced=False)
            case Preview():
                pass
            case Finished():
                self._complete(job, event)
            case Failed():
                self._end(job_id, event.error)
            case Cancelled():
                self._end(job_id, RequestCancelled(f"the video was not finished: {event.reason}").info())
        self.feeds.saw(event)

    def _complete(self, job: VideoJob, event: Finished) -> None:
        here = sum(path.stat().st_size for path in self.files(job) if path.exists())
        uploaded = sum(file.num_bytes for file in event.stored.values())
        self._finish(
            job.id,
            status="completed",
            progress=100,
            generation_time=event.generation_time,
            queue_seconds=event.queue_seconds,
            peak_memory_mb=event.peak_memory_bytes / 2**20,
            computed_steps=event.computed_steps,
            profile=None if event.profile_path is None else Path(event.profile_path).name,
            notes=event.notes or job.notes,
            attempts=event.attempts,
            num_bytes=max(here, uploaded),  # the same files, when they are in both
        )

    def _end(self, job_id: str, error: ErrorInfo) -> None:
        # OpenAI's client knows no status `cancelled`: it would take it for a success.
        self._finish(job_id, status="failed", error=error)

    def _finish(self, job_id: str, **changes: Any) -> None:
        now = int(time.time())
        job = self._become(
            job_id,
            **changes,
            eta_s=None,
            queue_position=None,
            completed_at=now,
            expires_at=now + round(self._settings.lifetime_s),
            webhook="none" if self._webhooks is None else "due",
            kept=True,
        )
        if job is not None:
            self._inputs_of(job_id).unlink(missing_ok=True)
            self._tell(job)
            self._forget(self._jobs.excess())

    def _become(self, job_id: str, *, kept: bool = False, synced: bool = True, **changes: Any) -> VideoJob | None:
        """The changed job, told to whoever watches it and with `kept` to the disk; None when it is deleted."""
        job = self._jobs.get(job_id)
        if job is None:
            return None
        job = msgspec.structs.replace(job, **changes)
        self._jobs.put(job)
        self.feeds.publish(job)
        if kept:
            self._keeper.update(job, synced=synced)
        return job

    # -- webhooks --

    def _tell(self, job: VideoJob) -> None:
        if self._webhooks is not None and job.webhook == "due":
            self._webhooks.tell(job)

    def _webhook_settled(self, job: VideoJob, sent: bool) -> None:
        self._become(job.id, webhook="sent" if sent else "given_up", kept=True)

    def _forget(self, jobs: Iterable[VideoJob]) -> None:
        for job in jobs:
            self._jobs.pop(job.id)
            self._remove_all(job)
            self._keeper.forget(job.id)


def _waiting(job: VideoJob) -> VideoJob:
    """A job of the server before, as it is until this one's engine has begun with it. Its progress never falls."""
    job = msgspec.structs.replace(job, eta_s=None, queue_position=None)
    return job if job.is_final else msgspec.structs.replace(job, status="queued")


def _due(job: VideoJob, *, passed_s: float = 0.0) -> float | None:
    """When the job's time is over, on this server's monotonic clock; `passed_s` of it went by before."""
    deadline_s = job.params.deadline_s
    return None if deadline_s is None else time.monotonic() + deadline_s - passed_s


def _rest_of(params: SamplingParams, due: float | None) -> SamplingParams:
    """The request, with what is left of its time. Raises DeadlineExceeded when nothing is."""
    if due is None or params.deadline_s is None:
        return params
    seconds_left = due - time.monotonic()
    if seconds_left <= 0:
        raise DeadlineExceeded(params.deadline_s)
    return dataclasses.replace(params, deadline_s=seconds_left)


def _may_see(viewer: Caller, owner: str) -> bool:
    """Jobs belong to the key that they were made with; those made without one, on an open server, to everybody."""
    return viewer.role == "admin" or owner in ("", viewer.id)
