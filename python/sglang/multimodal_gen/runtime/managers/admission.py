"""Who is let into the queue, as far as its limits go, and how long who waits there will wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, SamplingParams
from sglang.multimodal_gen.errors import DeadlineExceeded, ErrorInfo, QueueFull
from sglang.multimodal_gen.runtime.managers.dispatcher import DoneUnit
from sglang.multimodal_gen.runtime.managers.fair_share import ShareClass
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes, WorkRate
from sglang.multimodal_gen.runtime.managers.waiting_queue import WaitingQueue
from sglang.multimodal_gen.runtime.managers.warm_up import Shape, shape_of
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

_MEGAPIXEL = 1 << 20
_MOST_STEPS = 1000
_LEAST_STEPS_COUNTED = 64
# OpenAI's client gives up when it is told to wait for longer.
_MOST_RETRY_S = 120
_UNLEARNED_RETRY_S = 2
# A full queue has room again when a request has left it; who comes back is spread over the time in which some leave.
_SHARE_LEAVING = 0.1


def with_cost_limit(model: ModelInfo, execution: ExecutionArgs) -> ModelInfo:
    """The model's facts with what the server takes in one request, which entry points check at the door."""
    own = model.defaults.filled_from(GENERAL_DEFAULTS)
    pixels = (own.width or 1) * (own.height or 1) * (own.num_frames or 1)
    limit = execution.max_request_cost or _MOST_STEPS * max(pixels, _MEGAPIXEL)
    return msgspec.structs.replace(model, limits=msgspec.structs.replace(model.limits, max_cost=limit))


@dataclass
class Admission:
    """Reads who waits, whom the workers of all replicas hold (`active`), and how many replicas serve. Keeps what is
    learned of requests as a whole: how fast one replica does work, and which kinds of steps a size has.
    """

    execution: ExecutionArgs
    times: LearnedTimes
    waiting: WaitingQueue
    active: Callable[[], Iterable[RequestRecord]]
    num_serving: Callable[[], int] = lambda: 1
    rate: WorkRate = field(default_factory=WorkRate)
    _most_queued_cost: int | None = None
    _running_work: float | None = None
    _steps_of: dict[Shape, tuple[Phase, ...]] = field(default_factory=dict)
    _key_of: dict[ShareClass, str] = field(default_factory=dict)

    def model_ready(self, model: ModelInfo) -> None:
        """The queue's limit of work follows from the model's defaults when no other is set."""
        default = max(model.defaults.filled_from(GENERAL_DEFAULTS).cost, _LEAST_STEPS_COUNTED * _MEGAPIXEL)
        self._most_queued_cost = self.execution.max_queued_cost or self.execution.max_queued_requests * default

    def admitted(self, record: RequestRecord) -> None:
        """A worker has planned the request."""
        steps = tuple(phase for phase in record.phases if phase.lane == "denoise")
        if steps:
            self._steps_of[shape_of(record.params)] = steps
            self._key_of[record.share_class] = max(steps, key=lambda phase: phase.units).batch_key

    def key_of(self, share_class: ShareClass) -> str | None:
        """The batch key of a class's steps; None before one of it was planned."""
        return self._key_of.get(share_class)

    # -- into the queue --

    def refusal(self, params: SamplingParams, *, has_inputs: bool) -> ErrorInfo | None:
        """Why a request is not taken; None when it is. Costs nothing that grows with the queue."""
        waiting = self.waiting
        most_requests, most_cost = self.execution.max_queued_requests, self._most_queued_cost
        if len(waiting) >= most_requests:
            leaving = waiting.cost * _SHARE_LEAVING
            return QueueFull(most_requests, retry_after_s=self._retry_after_s(leaving)).info()
        surplus = 0 if most_cost is None else waiting.cost + params.cost - most_cost
        if most_cost is not None and surplus > 0 and len(waiting):
            leaving = max(surplus, waiting.cost * _SHARE_LEAVING)
            retry_after_s = self._retry_after_s(leaving)
            return QueueFull(most_cost, option="max-queued-cost", retry_after_s=retry_after_s).info()
        if params.deadline_s is None or has_inputs:
            return None
        return self.hopeless(params, seconds_left=params.deadline_s)

    def hopeless(self, params: SamplingParams, *, seconds_left: float) -> ErrorInfo | None:
        """The error of a request from a text alone that cannot be complete in time even if nothing else ran; None when
        it can, or when nobody knows. With inputs a request may skip some of its steps."""
        needed = self._seconds_alone(params)
        if needed is None or needed <= seconds_left or params.deadline_s is None:
            return None
        return DeadlineExceeded(params.deadline_s, needed_s=needed).info()

    def too_late(self, record: RequestRecord, *, has_inputs: bool) -> ErrorInfo | None:
        """The error of a request that waited until it cannot be complete in time any more."""
        if record.deadline_at is None or record.has_saved_state or has_inputs:
            return None
        return self.hopeless(record.params, seconds_left=record.deadline_at - time.monotonic())

    def _retry_after_s(self, work: float) -> int:
        seconds = self._seconds_for(work)
        return _UNLEARNED_RETRY_S if seconds is None else max(1, min(_MOST_RETRY_S, math.ceil(seconds)))

    def _seconds_alone(self, params: SamplingParams) -> float | None:
        """What the steps of such a request take at least; None where they were never measured."""
        steps = self._steps_of.get(shape_of(params))
        if steps is None:
            return None
        each = [self.times.fastest_seconds(phase.batch_key) for phase in steps]
        known = [seconds for seconds in each if seconds is not None]
        return min(known) * (params.num_inference_steps or 1) if len(known) == len(steps) else None

    # -- how long --

    def units_done(self, done: Iterable[DoneUnit], *, seconds: float) -> None:
        """A tick of so many seconds did these units; the work of a request is in its steps."""
        work = sum(unit.record.cost / max(1, unit.record.steps()[1]) for unit in done if unit.phase.lane == "denoise")
        self.rate.record(work, seconds)
        self._running_work = None

    def eta_s(self, work: float) -> float | None:
        """Until so much work is done after what ran after the last tick; None before anything was measured."""
        if self._running_work is None:
            self._running_work = sum(record.cost * record.fraction_left for record in self.active())
        return self._seconds_for(work + self._running_work)

    def _seconds_for(self, work: float) -> float | None:
        """With all replicas at it."""
        return self.rate.seconds_for(work / max(1, self.num_serving()))
