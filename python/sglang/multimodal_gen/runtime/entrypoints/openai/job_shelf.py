"""The video jobs that a server holds, how much room their results take, and which of them go first."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Reversible
from itertools import count, islice
from typing import Literal, NamedTuple

from sglang.multimodal_gen.errors import InsufficientStorage, QueueFull
from sglang.multimodal_gen.runtime.managers.job_store import VideoJob

_MAX_GONE = 10_000
Order = Literal["asc", "desc"]


class Place(NamedTuple):
    """Where a job stands, or stood, in the order of creation, and whose it is."""

    number: int
    owner: str


class JobShelf:
    """Jobs by id, in order of creation: at most `capacity` of them, with at most `max_output_bytes` of results and of
    what unfinished ones start from. The latter may take half of that, so that there is always room for results.

    Beyond that the finished ones go, those first that expire first, as do those whose time is over. What goes is for
    the caller to remove: `crowded` and `excess` only say which.
    """

    def __init__(self, *, capacity: int, max_output_bytes: int) -> None:
        self._capacity = capacity
        self._max_output_bytes = max_output_bytes
        self._jobs: dict[str, VideoJob] = {}
        self._finished: dict[str, VideoJob] = {}  # in the order in which they expire: all live equally long
        self._num_bytes = 0
        self._input_bytes: dict[str, int] = {}  # of those that start from something
        self._num_input_bytes = 0
        self._numbers = count()
        self._places: dict[str, Place] = {}
        self._gone: dict[str, Place] = {}  # the newest of them: lists go on from a job that was deleted

    def load(self, jobs: Iterable[VideoJob]) -> None:
        """Those of the server before this one, in order of creation."""
        self._jobs = {job.id: job for job in jobs}
        finished = sorted((job for job in self._jobs.values() if job.is_final), key=lambda job: job.expires_at or 0)
        self._finished = {job.id: job for job in finished}
        self._num_bytes = sum(job.num_bytes for job in finished)
        for job in self._jobs.values():
            self._hold_inputs(job)
        self._places = {job.id: Place(next(self._numbers), job.owner) for job in self._jobs.values()}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, job_id: str) -> VideoJob | None:
        """The job as it is now."""
        return self._jobs.get(job_id)

    def values(self) -> Reversible[VideoJob]:
        """All of them."""
        return self._jobs.values()

    def place(self, job_id: str) -> Place | None:
        """Also of a job that is not held any more, if that is not long ago."""
        return self._places.get(job_id) or self._gone.get(job_id)

    def beyond(self, place: Place | None, order: Order) -> Iterator[VideoJob]:
        """Those that come after `place` in this order; all of them without one."""
        jobs = iter(self._jobs.values()) if order == "asc" else reversed(self._jobs.values())
        if place is None:
            return jobs
        if order == "asc":
            return (job for job in jobs if self._places[job.id].number > place.number)
        return (job for job in jobs if self._places[job.id].number < place.number)

    def reserve(self, job: VideoJob) -> None:
        """Room for what a new job starts from, until it is final or popped. Raises InsufficientStorage."""
        most = self._max_output_bytes // 2
        if job.num_input_bytes and self._num_input_bytes + job.num_input_bytes > most:
            raise InsufficientStorage(
                f"no room for what the video starts from: it takes {_mib(job.num_input_bytes)}, what unfinished videos "
                f"start from {_mib(self._num_input_bytes)}, together accepted are {_mib(most)}, half of max-output-gib"
            )
        self._hold_inputs(job)

    def _hold_inputs(self, job: VideoJob) -> None:
        if job.num_input_bytes and not job.is_final:
            self._input_bytes[job.id] = job.num_input_bytes
            self._num_input_bytes += job.num_input_bytes

    def _release_inputs(self, job_id: str) -> None:
        self._num_input_bytes -= self._input_bytes.pop(job_id, 0)

    def put(self, job: VideoJob) -> None:
        """A new job, or what has become of one; a finished one keeps its place."""
        self._jobs[job.id] = job
        if job.id not in self._places:
            self._places[job.id] = Place(next(self._numbers), job.owner)
        if job.is_final:
            self._release_inputs(job.id)
            known = self._finished.get(job.id)
            self._num_bytes += job.num_bytes - (0 if known is None else known.num_bytes)
            self._finished[job.id] = job

    def pop(self, job_id: str) -> None:
        """It is not held any more, if it was."""
        self._jobs.pop(job_id, None)
        self._release_inputs(job_id)
        finished = self._finished.pop(job_id, None)
        if finished is not None:
            self._num_bytes -= finished.num_bytes
        place = self._places.pop(job_id, None)
        if place is not None:
            self._gone[job_id] = place
            if len(self._gone) > _MAX_GONE:
                del self._gone[next(iter(self._gone))]

    def crowded(self) -> list[VideoJob]:
        """Those that go for one more. Raises QueueFull when there are not enough finished ones."""
        too_many = max(0, len(self._jobs) - self._capacity + 1)
        if too_many > len(self._finished):
            raise QueueFull(self._capacity, option="max-jobs")
        return list(islice(self._finished.values(), too_many))

    def excess(self) -> list[VideoJob]:
        """Those whose time is over, or whose results do not fit."""
        return list(self._excess())

    def _excess(self) -> Iterator[VideoJob]:
        now, num_bytes = time.time(), self._num_bytes + self._num_input_bytes
        for job in self._finished.values():
            if num_bytes <= self._max_output_bytes and (job.expires_at is None or job.expires_at > now):
                return
            num_bytes -= job.num_bytes
            yield job


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
