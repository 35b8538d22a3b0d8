"""Progress bars on a terminal: one per output that is being made, and a line for the engine while it starts."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from sglang.multimodal_gen.runtime.entrypoints.cli.reporting import describe_progress
from sglang.multimodal_gen.runtime.managers import messages


class BarDisplay:
    """For terminals. See `reporting.Display`."""

    def __init__(self) -> None:
        # Results go through the bars only when they end on the same terminal; into a pipe they go untouched.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._engine: TaskID | None = self._progress.add_task("engine", total=None, text="starting")
        self._progress.start()

    def status(self, text: str) -> None:
        """See Display."""
        if self._engine is not None:
            self._progress.update(self._engine, text=text)

    def started(self, label: str) -> None:
        """See Display."""
        self._forget_engine()
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=1.0, text="started")

    def progress(self, label: str, event: messages.Progress) -> None:
        """See Display."""
        self.started(label)
        self._progress.update(self._tasks[label], completed=event.fraction, text=describe_progress(event))

    def ended(self, label: str) -> None:
        """See Display."""
        if label in self._tasks:
            self._progress.remove_task(self._tasks.pop(label))

    def note(self, line: str) -> None:
        """See Display."""
        self._progress.console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """See Display."""
        self._progress.stop()

    def _forget_engine(self) -> None:
        if self._engine is not None:
            self._progress.remove_task(self._engine)
            self._engine = None
