"""What the scheduler knows of one request, from its arrival to its one terminal event."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.managers.batching import UnitCursor
from sglang.multimodal_gen.runtime.managers.messages import Finished, MappedArray, OutputDone, Progress
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes


@dataclass(kw_only=True)
class RequestRecord:
    """`client` is the ZMQ identity that gets the events. Times are seconds of the monotonic clock."""

    request_id: str
    client: bytes
    params: SamplingParams
    order: int
    max_attempts: int
    received_at: float = field(default_factory=time.monotonic)
    status: Literal["queued", "admitting", "running", "saving"] = "queued"
    attempts: int = 0
    started_at: float = 0.0
    cursor: UnitCursor | None = None
    notes: tuple[str, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    latents: MappedArray | None = None
    output: OutputDone | None = None

    def begin(self, phases: tuple[Phase, ...], notes: tuple[str, ...]) -> None:
        """The workers hold the request."""
        self.cursor = UnitCursor(request_id=self.request_id, phases=phases, order=self.order)
        self.notes = notes
        self.status = "running"

    def reset(self) -> None:
        """Back to the queue after its worker was lost; nothing of the attempt is kept."""
        self.cursor, self.latents, self.output = None, None, None
        self.stage_seconds, self.step_ms = {}, []
        self.status = "queued"

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

    def record_unit(self, phase: Phase, seconds: float, peak_bytes: int) -> None:
        """One unit is done."""
        assert self.cursor is not None
        self.cursor.done += 1
        self.stage_seconds[phase.name] = self.stage_seconds.get(phase.name, 0.0) + seconds
        if phase.lane == "denoise":
            self.step_ms.append(round(seconds * 1000, 3))
        self.peak_bytes = max(self.peak_bytes, peak_bytes)

    def progress(self, learned: LearnedTimes, sharing: int) -> Progress:
        """Where the request stands. `sharing` requests run side by side, which the ETA multiplies by."""
        assert self.cursor is not None
        cursor, position = self.cursor, self.cursor.done
        remaining, known, total_cost, done_cost = 0.0, True, 0.0, 0.0
        steps_done = steps = 0
        for phase in cursor.phases:
            here = min(max(position, 0), phase.units)
            position -= phase.units
            total_cost += phase.units * phase.cost
            done_cost += here * phase.cost
            if phase.lane == "denoise":
                steps += phase.units
                steps_done += here
            unit_s = learned.unit_seconds(phase.batch_key)
            if unit_s is not None:
                remaining += unit_s * (phase.units - here)
            elif phase.lane == "denoise":
                known = False
        phase, _ = cursor.position(min(cursor.done, cursor.total - 1))
        return Progress(
            request_id=self.request_id,
            phase=phase.name,
            step=steps_done,
            total_steps=steps,
            fraction=done_cost / total_cost if total_cost else 1.0,
            eta_s=remaining * max(1, sharing) if known else None,
        )

    def finished_event(self) -> Finished:
        """The terminal event of a complete request."""
        p, output = self.params, self.output
        assert isinstance(p.seed, int) and p.width and p.height and p.num_frames
        return Finished(
            request_id=self.request_id,
            seed=p.seed,
            width=p.width,
            height=p.height,
            num_frames=p.num_frames,
            output_file_path=None if output is None else output.output_file_path,
            frames=None if output is None else output.frames,
            encoded=None if output is None else output.encoded,
            latents=self.latents,
            generation_time=time.monotonic() - self.started_at,
            queue_seconds=self.started_at - self.received_at,
            stage_seconds=self.stage_seconds | ({} if output is None else {"encode_file": output.encode_seconds}),
            step_ms=tuple(self.step_ms),
            peak_memory_bytes=self.peak_bytes,
            attempts=self.attempts,
            notes=self.notes,
        )
