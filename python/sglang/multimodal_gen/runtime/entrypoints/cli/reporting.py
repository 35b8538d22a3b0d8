"""What `sglang generate` shows: progress on stderr, results on stdout."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.managers.messages import EngineState, Preview, Progress, Queued, Started

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import GenerationEvent, GenerationResult

_SECONDS_BETWEEN_LINES = 2.0


class Display(Protocol):
    """Where progress is shown; `label` tells outputs apart."""

    def status(self, text: str) -> None:
        """What the engine as a whole is doing."""

    def started(self, label: str) -> None:
        """A worker holds the output's request."""

    def progress(self, label: str, event: Progress) -> None:
        """A unit of the output is done."""

    def ended(self, label: str) -> None:
        """The output is complete or failed."""

    def note(self, line: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class LineDisplay:
    """For logs and pipes: a line now and then."""

    def __init__(self) -> None:
        self._last_line: dict[str, float] = {}

    def status(self, text: str) -> None:
        """See Display."""
        self.note(f"engine: {text}")

    def started(self, label: str) -> None:
        """See Display."""
        self._last_line[label] = time.monotonic()

    def progress(self, label: str, event: Progress) -> None:
        """See Display."""
        now = time.monotonic()
        if now - self._last_line.get(label, 0.0) >= _SECONDS_BETWEEN_LINES:
            self._last_line[label] = now
            self.note(f"{label} {event.fraction:.0%}, {describe_progress(event)}")

    def ended(self, label: str) -> None:
        """See Display."""
        self._last_line.pop(label, None)

    def note(self, line: str) -> None:
        """See Display."""
        sys.stderr.write(line + "\n")

    def close(self) -> None:
        """See Display."""


class Reporter:
    """Takes what the engine tells; `num_failed` counts the outputs that ended in an error."""

    def __init__(self, display: Display, *, several: bool) -> None:
        self.num_failed = 0
        self._display = display
        self._several = several
        self._told: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.close()

    def engine_state(self, state: EngineState) -> None:
        """The engine's state changed before the model was ready."""
        self._display.status(state.detail or state.state)

    def event(self, event: GenerationEvent) -> None:
        """One step, the result or the failure of one output."""
        label = f"prompt {event.prompt_index + 1}, output {event.output_index + 1}:" if self._several else "generating:"
        what = event.event
        if isinstance(what, Started):
            self._display.started(label)
            self._told[label] = what.notes
            for note in what.notes:
                self._display.note(f"{label} {note}")
        elif isinstance(what, Progress):
            self._display.progress(label, what)
        elif isinstance(what, ServingError):
            self.num_failed += 1
            self._display.ended(label)
            self._display.note(f"sglang: error: {label} {what}" if self._several else f"sglang: error: {what}")
        elif not isinstance(what, Queued | Preview):
            self._display.ended(label)
            for note in what.notes[len(self._told.get(label, ())) :]:
                self._display.note(f"{label} {note}")
            _tell(what)


def describe_progress(event: Progress) -> str:
    """Where an output is and how long it will take."""
    where = f"step {event.step}/{event.total_steps}" if event.step < event.total_steps else event.phase
    return where if event.eta_s is None else f"{where}, {event.eta_s:.0f} s left"


def _tell(result: GenerationResult) -> None:
    """Say what was made, on stdout; the first line's form is fixed, since scripts read it."""
    saved = "not saved" if result.output_file_path is None else f"saved to {result.output_file_path}"
    excluded = " (warmup excluded)" if result.metrics["warmup_excluded"] else ""
    sys.stdout.write(
        f"Pixel data generated successfully in {result.generation_time:.4f} seconds{excluded}\n"
        f"{saved}, seed {result.seed}\n"
    )
    if "num_forwards" in result.metrics:
        computed, steps = result.metrics["computed_steps"], len(result.metrics["step_ms"])
        forwards = f"{result.metrics['computed_forwards']} of {result.metrics['num_forwards']} forwards"
        sys.stdout.write(f"computed {computed} of {steps} steps, {forwards}\n")
    for name, path in (("thumbnail", result.thumbnail_path), ("contact sheet", result.contact_sheet_path)):
        if path is not None:
            sys.stdout.write(f"{name} saved to {path}\n")
    for name, file in result.stored.items():
        sys.stdout.write(f"{name.replace('_', ' ')} uploaded as {file.key}: {file.url}\n")
    if "profile_path" in result.metrics:
        sys.stdout.write(f"profile saved to {result.metrics['profile_path']}\n")
    sys.stdout.flush()
