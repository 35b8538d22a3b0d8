"""Sends the requests of a plan, at their moments or so many at a time, and collects the samples."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator
from typing import Any

from sglang.multimodal_gen.errors import BenchmarkFailed, LoadRefused
from sglang.multimodal_gen.runtime.bench.child import tell
from sglang.multimodal_gen.runtime.bench.load.client import LoadClient
from sglang.multimodal_gen.runtime.bench.load.observation import Observation, RequestFailure
from sglang.multimodal_gen.runtime.bench.load.plan import Plan, PlannedRequest
from sglang.multimodal_gen.runtime.bench.load.samples import INTERRUPTED, OK, Sample, sample_of

_TELL_EVERY_S = 5.0
_PROBE_S = 0.02
_AFTER_FAILURE_S = 0.1
"""How long a lane of a closed loop rests after a failure; else a server that is gone would be asked without end."""
# Such a status may be another one the next time; every other one below 500 says that the request itself is wrong.
_MAY_PASS = frozenset({408, 409, 413, 425, 429})


class LoadGenerator:
    """`samples` are in the order of their ends; `delays` are how late this process's own loop woke up, in seconds."""

    def __init__(self, client: LoadClient, *, endpoint: str, timeout_s: float) -> None:
        self._client = client
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._begin = time.perf_counter()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[object]] = set()
        self._deletions: set[asyncio.Task[None]] = set()
        self._refusal: LoadRefused | None = None
        self._bug: BaseException | None = None
        self._has_succeeded = False
        self._num_sent = 0
        self.samples: list[Sample] = []
        self.delays: list[float] = []
        self.was_interrupted = False

    def interrupt(self) -> None:
        """Send no more, and give up what is under way."""
        self.was_interrupted = True
        self._stop.set()

    async def warm_up(self, requests: Iterator[PlannedRequest]) -> None:
        """One after the other; their samples are thrown away.

        Raises:
            LoadRefused: the server refuses what is asked of it.
            BenchmarkFailed: one fails in another way.
        """
        for planned in requests:
            await self._one(planned)
            sample = self.samples.pop()
            self._raise_refusal()
            if not sample.is_ok:
                raise BenchmarkFailed(f"a warm-up request failed: {_in_words(sample)}")
        await self._all_deleted()
        self._num_sent = 0

    async def run(self, plan: Plan, *, max_concurrency: int) -> None:
        """All requests of the plan, until each has its sample. `max_concurrency` counts where the plan has no moments.

        Raises LoadRefused when the first reply says that the server refuses what is asked of it.
        """
        self._begin = time.perf_counter()
        beside = [asyncio.create_task(work) for work in (self._probe(), self._tell())]
        try:
            if plan.request_rate is not None:
                await self._at_their_moments(plan)
            else:
                await self._so_many_at_a_time(plan, max_concurrency)
            await self._all_ended()
        finally:
            for task in [*beside, *self._tasks]:
                task.cancel()
            await asyncio.gather(*beside, *self._tasks, return_exceptions=True)
        await self._all_deleted()
        self._raise_refusal()
        if self._bug is not None:
            raise self._bug

    async def _at_their_moments(self, plan: Plan) -> None:
        """Open loop: nothing here waits for a reply."""
        for planned in plan.requests():
            assert planned.due_s is not None, "the plan has a rate"
            await self._pause(self._begin + planned.due_s - time.perf_counter())
            if self._stop.is_set():
                return
            self._start(self._one(planned))

    async def _so_many_at_a_time(self, plan: Plan, number: int) -> None:
        """Closed loop: each lane takes the next request when its last one has ended."""
        requests = plan.requests()

        async def lane() -> None:
            for planned in requests:
                passed_s = time.perf_counter() - self._begin
                if self._stop.is_set() or (plan.duration_s is not None and passed_s >= plan.duration_s):
                    return
                if not await self._one(planned):
                    await self._pause(_AFTER_FAILURE_S)

        for _ in range(number):
            self._start(lane())

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            self._bug = bug
            self._stop.set()

    async def _pause(self, seconds: float) -> None:
        """Until then, or until it is all over; others have their turn even when there is no time left."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    async def _all_ended(self) -> None:
        """Until nothing is under way, or it is all over."""
        stopped = asyncio.ensure_future(self._stop.wait())
        everything = asyncio.gather(*self._tasks, return_exceptions=True)
        either: list[asyncio.Future[Any]] = [everything, stopped]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    async def _all_deleted(self) -> None:
        await asyncio.gather(*self._deletions)

    async def _one(self, planned: PlannedRequest) -> bool:
        """Send it and make its sample, however it ends; whether it has a result."""
        self._num_sent += 1
        is_video = self._endpoint == "videos"
        seen = Observation(num_frames=None if is_video else 1)
        seen.says(planned.body)
        send = self._client.video if is_video else self._client.image
        outcome, detail = INTERRUPTED, ""
        try:
            async with asyncio.timeout(self._timeout_s):
                await send(planned.body, seen)
            outcome = OK
            self._has_succeeded = True
        except TimeoutError:
            outcome, detail = "timeout", f"no result within {self._timeout_s:g} s"
        except RequestFailure as failure:
            outcome, detail = failure.key, failure.detail
            self._consider(failure)
        finally:  # also when it is cancelled
            ended = seen.ended if outcome == OK and seen.ended is not None else time.perf_counter()
            sample = sample_of(planned, seen, begin=self._begin, ended=ended, outcome=outcome, detail=detail)
            self.samples.append(sample)
            if seen.job_id is not None:
                deletion = asyncio.create_task(self._client.delete(seen.job_id))
                self._deletions.add(deletion)
                deletion.add_done_callback(self._deletions.discard)
        return outcome == OK

    def _consider(self, failure: RequestFailure) -> None:
        """Whether the whole test is pointless: the server refuses, and never did anything else."""
        status = failure.status
        if status is None or status >= 500 or status in _MAY_PASS or self._has_succeeded or self._refusal is not None:
            return
        url = f"{self._client.api}/{'videos' if self._endpoint == 'videos' else 'images/generations'}"
        remedy = {
            401: "give the server's key as SGLANG_BENCH_API_KEY or with --api-key",
            404: "see that --base-url, --endpoint and --model are right",
        }.get(status, "see that the options of the requests are what this server takes")
        self._refusal = LoadRefused(url, status=status, reason=failure.detail, remedy=remedy)
        self._stop.set()

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    async def _probe(self) -> None:
        """How late a timer fires here is how far every moment that is measured here may be off."""
        while True:
            due = time.perf_counter() + _PROBE_S
            await asyncio.sleep(_PROBE_S)
            self.delays.append(max(0.0, time.perf_counter() - due))

    async def _tell(self) -> None:
        """Say from time to time how far it is; stdout is for the result."""
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            done, failed = len(self.samples), sum(not sample.is_ok for sample in self.samples)
            tell(f"{self._num_sent} sent, {self._num_sent - done} under way, {done - failed} done, {failed} failed")


def _in_words(sample: Sample) -> str:
    return sample.outcome + (f" ({sample.detail})" if sample.detail else "")
