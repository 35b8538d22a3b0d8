"""A fresh interpreter that starts an engine and tells when what happened: `python -m … FD`."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.bench.messages import StartupTask, StartupTimes, TaskFailed, encode
from sglang.multimodal_gen.runtime.bench.startup_timeline import Timeline
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
from sglang.multimodal_gen.runtime.managers.child_process import inherited_connection

_PROMPT = "a red circle"


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
            model = generator.wait_ready(on_state=timeline.engine_state)
            timeline.ready()
            request = {"prompt": _PROMPT, "seed": 0, "num_inference_steps": task.num_inference_steps}
            for name in ("first result", "second result"):
                generator.generate({**request, "return_frames": True})
                timeline.mark(name)
    except ServingError as error:
        connection.send_bytes(encode(TaskFailed(error=error.info())))
        return
    connection.send_bytes(encode(StartupTimes(moments=tuple(timeline.moments), reads=model.reads)))


if __name__ == "__main__":
    main()
