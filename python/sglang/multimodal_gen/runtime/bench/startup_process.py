"""A fresh interpreter that starts an engine and tells when what happened: `python -m … FD`."""

from __future__ import annotations

import time

import msgspec

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.bench.messages import StartupTask, StartupTimes, TaskFailed, encode
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
from sglang.multimodal_gen.runtime.managers.child_process import inherited_connection
from sglang.multimodal_gen.runtime.managers.messages import EngineState

_PROMPT = "a red circle"
# A worker also tells what was chosen for the user, as `what: choice`; that takes no time.
_CHOICE = ": "
_STARTING = "starting the worker"


class Timeline:
    """Moments by what ended at them."""

    def __init__(self) -> None:
        self.moments: list[tuple[str, float]] = []
        self._doing = "the worker's process"

    def mark(self, name: str) -> None:
        """Now `name` is over."""
        self.moments.append((name, time.monotonic()))

    def engine_state(self, state: EngineState) -> None:
        """A worker says what it begins, which is the end of what it did before."""
        if state.state == "loading" and _CHOICE not in state.detail and state.detail not in ("", _STARTING):
            self.mark(self._doing)
            self._doing = state.detail

    def ready(self) -> None:
        """The last component is loaded and the engine says so."""
        self.mark(self._doing)
        self.mark("ready")


def main() -> None:
    """Entry point of the process."""
    timeline = Timeline()
    timeline.mark("interpreter and imports")
    connection = inherited_connection()
    task = msgspec.msgpack.decode(connection.recv_bytes(), type=StartupTask)
    task.engine.apply()
    try:
        with DiffGenerator.from_server_args(task.engine.args) as generator:
            timeline.mark("the engine's processes")
            generator.wait_ready(on_state=timeline.engine_state)
            timeline.ready()
            request = {"prompt": _PROMPT, "seed": 0, "num_inference_steps": task.num_inference_steps}
            for name in ("first result", "second result"):
                generator.generate({**request, "return_frames": True})
                timeline.mark(name)
    except ServingError as error:
        connection.send_bytes(encode(TaskFailed(error=error.info())))
        return
    connection.send_bytes(encode(StartupTimes(moments=tuple(timeline.moments))))


if __name__ == "__main__":
    main()
