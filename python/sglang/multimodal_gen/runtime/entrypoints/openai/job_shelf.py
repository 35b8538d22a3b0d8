"""The video jobs that a server holds, how much room their results take, and which of them go first."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Reversible
from itertools import islice

from sglang.multimodal_gen.errors import QueueFull
from sglang.multimodal_gen.runtime.managers.job_store import VideoJob


class JobShelf:
    """Jobs by id, in order of creation: at most `capacity` of them, with at most `max_output_bytes` of results.

    Beyond that the finished ones go, those first that expire first, as do those whose time is over. What goes is for
    the caller to remove: `crowded` and `excess` only say which.
    """

    def __init__(self, *, capacity: int, max_output_bytes: int) -> None:
        self._capacity = capacity
        self._max_output_bytes = max_output_bytes
        self._jobs: dict[str, VideoJob] = {}
        self._finished: dict[str, VideoJob] = {}  # in the order in which they expire: all live equally long
        self._num_bytes = 0

    def load(self, jobs: Iterable[VideoJob]) -> None:
        """Those of the server before this one, in order of creation."""
        self._jobs = {job.id: job for job in jobs}
        finished = sorted((job for job in self._jobs.values() if job.is_final), key=lambda job: job.expires_at or 0)
        self._finished = {job.id: job for job in finished}
        self._num_bytes = sum(job.num_bytes for job in finished)

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

    def put(self, job: VideoJob) -> None:
        """A new job, or what has become of one; a finished one keeps its place."""
        self._jobs[job.id] = job
        if job.is_final:
            known = self._finished.get(job.id)
            self._num_bytes += job.num_bytes - (0 if known is None else known.num_bytes)
            self._finished[job.id] = job

    def pop(self, job_id: str) -> None:
        """It is not held any more, if it was."""
        self._jobs.pop(job_id, None)
        finished = self._finished.pop(job_id, None)
        if finished is not None:
            self._num_bytes -= finished.num_bytes

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
        now, num_bytes = time.time(), self._num_bytes
        for job in self._finished.values():
            if num_bytes <= self._max_output_bytes and (job.expires_at is None or job.expires_at > now):
                return
            num_bytes -= job.num_bytes
            yield job
