"""What happened during a start, and when."""

from __future__ import annotations

import time

from sglang.multimodal_gen.runtime.managers.messages import EngineState

# A worker also tells what was chosen for the user, as `what: choice`; that takes no time.
_CHOICE = ": "
_STARTING = "starting the worker"


class Timeline:
    """Moments by what ended at them. `doing` is what goes on at first, and after that what was told last."""

    def __init__(self, *, doing: str = "the worker's process") -> None:
        self.moments: list[tuple[str, float]] = []
        self.doing = doing

    def mark(self, name: str) -> None:
        """Now `name` is over."""
        self.moments.append((name, time.monotonic()))

    def begins(self, detail: str) -> None:
        """A worker says what it begins, which is the end of what it did before."""
        if detail != self.doing and _CHOICE not in detail and detail not in ("", _STARTING):
            self.mark(self.doing)
            self.doing = detail

    def engine_state(self, state: EngineState) -> None:
        """What a worker says comes with the engine's state."""
        if state.state == "loading":
            self.begins(state.detail)

    def ready(self) -> None:
        """The last component is loaded and the engine says so."""
        self.mark(self.doing)
        self.mark("ready")
