"""What the scheduler knows of one request, from its arrival to its one terminal event."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from sglang.multimodal_gen.configs.request_plan import Lane, Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import DeadlineExceeded, ErrorInfo, PoisonRequest, WorkerLost
from sglang.multimodal_gen.runtime.managers.batching import UnitCursor
from sglang.multimodal_gen.runtime.managers.fair_share import Account, ShareClass
from sglang.multimodal_gen.runtime.managers.messages import CachedSteps, Finished, MappedArray, Progress, Started
from sglang.multimodal_gen.runtime.managers.output_messages import OpenOutput, OutputDone
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes
from sglang.multimodal_gen.runtime.managers.worker_messages import Admitted, Unit


@dataclass(kw_only=True)
class RequestRecord:
    """`client` is the ZMQ identity that gets the events, None for a warm-up. Times are seconds of the monotonic clock.

    `reserved`: memory is set aside, so units may run. `parking`: the state is being saved to make room for another
    request, after which this one is back in the queue. `cost` is its work as admission counts it. `is_suspect`: a
    worker was lost while it held the request, so its next admission, and its units up to number `quarantined`, have
    the worker for themselves: whoever loses the next one is known for sure. `durable`: its client may ask for it again
    after a death. `lora_ids`: of the adapters that it names, by name. `replica` is the one that holds the request; a
    warm-up waits for its own.
    """

    request_id: str
    client: bytes | None
    params: SamplingParams
    order: int
    max_attempts: int
    durable: bool = False
    lora_ids: dict[str, str] = field(default_factory=dict)
    replica: int | None = None
    share_class: ShareClass = field(init=False)
    cost: int = field(init=False)
    received_at: float = field(default_factory=time.monotonic)
    status: Literal["queued", "admitting", "running", "parking", "saving"] = "queued"
    attempts: int = 1
    started_at: float = 0.0
    handed_at: float = 0.0
    admitted_at: float = 0.0
    reserved: bool = False
    state_file: str | None = None
    has_saved_state: bool = False
    num_preemptions: int = 0
    is_suspect: bool = False
    quarantined: int = 0
    told_position: int | None = None
    told_at: float = 0.0
    warmup_excluded: bool = False
    cursor: UnitCursor | None = None
    notes: tuple[str, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_peak_bytes: dict[str, int] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    step_batch_sizes: list[int] = field(default_factory=list)
    cached: CachedSteps | None = None
    profile_path: str | None = None
    latents: MappedArray | None = None
    output: OutputDone | None = None

    def __post_init__(self) -> None:
        self.share_class, self.cost = ShareClass.of(self.params), self.params.cost

    @property
    def deadline_at(self) -> float | None:
        """When the result must be complete."""
        return None if self.params.deadline_s is None else self.received_at + self.params.deadline_s

    def deadline_error(self) -> ErrorInfo:
        """Its time is up."""
        assert self.params.deadline_s is not None, "only deadlines are watched"
        return DeadlineExceeded(self.params.deadline_s).info()

    def begin(self, admitted: Admitted, account: Account) -> None:
        """The workers hold the request, as far as it has come where it goes on from a saved state; `account` is that of
        its class."""
        done = sum(admitted.units_done.values())
        self.cursor = UnitCursor(
            request_id=self.request_id,
            phases=admitted.phases,
            order=self.order,
            account=account,
            quarantined=self.quarantined,
            issued=done,
            done=done,
        )
        self.is_suspect = False
        self.notes = admitted.notes
        self.status, self.admitted_at = "running", time.monotonic()
        admission = self.admitted_at - self.handed_at
        self.stage_seconds["admission"] = self.stage_seconds.get("admission", 0.0) + admission
        num_steps = self.steps()[0]
        del self.step_ms[num_steps:], self.step_batch_sizes[num_steps:]

    def replan(self, phases: tuple[Phase, ...], notes: tuple[str, ...]) -> None:
        """What is left of the request was planned anew."""
        assert self.cursor is not None
        self.cursor.phases, self.notes = phases, notes

    def loss(self, text: str, blamed: Collection[str]) -> ErrorInfo:
        """The error of a request that was lost with its worker as often as it may be; `blamed` may have done it."""
        is_known = self.attempts > 1 and set(blamed) == {self.request_id}
        return PoisonRequest(text).info() if is_known else WorkerLost(text).info()

    def blame(self) -> None:
        """A worker was lost, and it may have been this request's fault."""
        self.attempts += 1
        self.is_suspect = True
        self.quarantined = max(self.quarantined, 0 if self.cursor is None else self.cursor.issued)

    def reset(self) -> None:
        """Back to the queue after its worker was lost or to make room; it goes on from its saved state, if any."""
        self.cursor, self.latents, self.output = None, None, None
        self.status, self.reserved = "queued", False

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The planned phases, in order; none before the request is admitted."""
        return () if self.cursor is None else self.cursor.phases

    @property
    def lane(self) -> Lane | None:
        """Where the request's next unit runs; None before admission and at the end."""
        if self.cursor is None or self.cursor.finished:
            return None
        return self.cursor.position(self.cursor.done)[0].lane

    def steps(self) -> tuple[int, int]:
        """Denoising steps that are done, and all of them."""
        position, done, total = 0 if self.cursor is None else self.cursor.done, 0, 0
        for phase in self.phases:
            if phase.lane == "denoise":
                total += phase.units
                done += min(max(position, 0), phase.units)
            position -= phase.units
        return done, total

    def step_of(self, unit: Unit) -> int:
        """Which denoising step of the request a unit of that lane is, counted from 1 over all phases."""
        before = itertools.takewhile(lambda phase: phase.name != unit.phase, self.phases)
        return sum(phase.units for phase in before if phase.lane == "denoise") + unit.index + 1

    @property
    def remaining_cost(self) -> float:
        """The price of the units that are not done."""
        position, cost = 0 if self.cursor is None else self.cursor.done, 0.0
        for phase in self.phases:
            cost += phase.cost * (phase.units - min(max(position, 0), phase.units))
            position -= phase.units
        return cost

    @property
    def fraction_left(self) -> float:
        """Of the whole work, what is not done."""
        total = sum(phase.units * phase.cost for phase in self.phases)
        return self.remaining_cost / total if total else float(self.cursor is None)

    @property
    def needs_pixels(self) -> bool:
        """Whether frames go to the output process."""
        p = self.params
        return p.output_type == "pixels" and bool(p.save_output or p.return_frames or p.return_encoded)

    @property
    def needs_latents(self) -> bool:
        """Whether latents travel back to the client."""
        return self.params.return_latents or self.params.output_type == "latent"

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for is there."""
        assert self.cursor is not None
        return (
            self.cursor.finished
            and (self.output is not None or not self.needs_pixels)
            and (self.latents is not None or not self.needs_latents)
        )

    @property
    def mean_batch_size(self) -> float:
        """Requests that shared its denoising steps, itself included."""
        sizes = self.step_batch_sizes
        return sum(sizes) / len(sizes) if sizes else 0.0

    def record_unit(self, phase: Phase, seconds: float, peak_bytes: int, *, batch_size: int) -> None:
        """One unit is done, together with those of other requests: `batch_size` in all."""
        assert self.cursor is not None
        self.cursor.done += 1
        self.stage_seconds[phase.name] = self.stage_seconds.get(phase.name, 0.0) + seconds
        if phase.lane == "denoise":
            self.step_ms.append(round(seconds * 1000, 3))
            self.step_batch_sizes.append(batch_size)
        self.stage_peak_bytes[phase.name] = max(peak_bytes, self.stage_peak_bytes.get(phase.name, 0))

    def progress(self, learned: LearnedTimes, sharing: int) -> Progress:
        """Where the request stands. `sharing` requests run side by side, which the ETA multiplies by."""
        assert self.cursor is not None
        cursor, position = self.cursor, self.cursor.done
        remaining, known = 0.0, True
        for phase in cursor.phases:
            left = phase.units - min(max(position, 0), phase.units)
            position -= phase.units
            unit_s = learned.unit_seconds(phase.batch_key)
            if unit_s is not None:
                remaining += unit_s * left
            elif phase.lane == "denoise":
                known = False
        steps_done, steps = self.steps()
        phase, _ = cursor.position(min(cursor.done, cursor.total - 1))
        return Progress(
            request_id=self.request_id,
            phase=phase.name,
            step=steps_done,
            total_steps=steps,
            fraction=1.0 - self.fraction_left,
            eta_s=remaining * max(1, sharing) if known else None,
        )

    def open_output(self, default_directory: str) -> OpenOutput:
        """Announces its frames to the output process."""
        p = self.params
        return OpenOutput(
            request_id=self.request_id,
            params=p,
            num_frames=p.num_frames or 1,
            directory=p.output_path or default_directory if p.save_output else None,
        )

    def started_event(self) -> Started:
        """The workers hold the request."""
        return Started(
            request_id=self.request_id,
            queue_seconds=self.started_at - self.received_at,
            phases=self.phases,
            notes=self.notes,
        )

    def finished_event(self) -> Finished:
        """The terminal event of a complete request."""
        p, output = self.params, self.output
        assert isinstance(p.seed, int) and p.width and p.height and p.num_frames
        generation_time = time.monotonic() - self.started_at
        return Finished(
            request_id=self.request_id,
            seed=p.seed,
            width=p.width,
            height=p.height,
            num_frames=p.num_frames,
            output_file_path=None if output is None else output.output_file_path,
            thumbnail_path=None if output is None else output.thumbnail_path,
            contact_sheet_path=None if output is None else output.contact_sheet_path,
            frames=None if output is None else output.frames,
            encoded=None if output is None else output.encoded,
            latents=self.latents,
            generation_time=generation_time,
            queue_seconds=self.started_at - self.received_at,
            stage_seconds=self.stage_seconds | self._output_seconds(),
            waiting_seconds=max(0.0, generation_time - sum(self.stage_seconds.values())),
            step_ms=tuple(self.step_ms),
            step_batch_sizes=tuple(self.step_batch_sizes),
            peak_memory_bytes=max(self.stage_peak_bytes.values(), default=0),
            stage_peak_bytes=self.stage_peak_bytes,
            attempts=self.attempts,
            notes=self.notes,
            warmup_excluded=self.warmup_excluded,
            profile_path=self.profile_path,
            stored={} if output is None else output.stored,
            computed_steps=self.steps()[1] if self.cached is None else self.cached.computed_steps,
            cached=self.cached,
        )

    def _output_seconds(self) -> dict[str, float]:
        """What the output process spent, by stage."""
        if self.output is None:
            return {}
        upload = {"upload": self.output.upload_seconds} if self.output.stored else {}
        return {"encode_file": self.output.encode_seconds} | upload
