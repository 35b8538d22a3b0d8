"""The HTTP process: an engine client and the FastAPI app on the socket that the supervisor bound.

Run as `python -m sglang.multimodal_gen.runtime.entrypoints.http_main FD SOCKET_FD`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from typing import Any

from sglang.multimodal_gen.runtime.entrypoints.engine_client import EngineClient
from sglang.multimodal_gen.runtime.entrypoints.http_server import create_app, serve
from sglang.multimodal_gen.runtime.launch_server import HTTP_CLIENT_NAME
from sglang.multimodal_gen.runtime.managers.child_process import (
    exit_with_parent,
    inherited_connection,
    inherited_fds,
)
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import Codec, SchedulerLost, SupervisorNote
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging

_DRAIN_S = 4.0


def _stop_in_order() -> None:
    """Let uvicorn end as on SIGTERM; when it does not in time, the caller leaves at once."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_DRAIN_S)


async def _run(config: EngineConfig, connection: Any, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    client = EngineClient(config.run_dir, name=HTTP_CLIENT_NAME)
    codec = Codec(SupervisorNote)

    def on_note(payload: bytes) -> None:
        note = codec.decode(payload)
        if isinstance(note, SchedulerLost):
            lost = client.scheduler_lost(note.error, restarting=note.restarting)
            asyncio.run_coroutine_threadsafe(lost, loop)

    exit_with_parent(connection, on_note, cleanup=_stop_in_order)
    await client.start()
    await serve(create_app(client, config), listener)
    await client.close()


def main() -> None:
    """Entry point of the process."""
    connection = inherited_connection()
    (listener_fd,) = inherited_fds()
    config = EngineConfig.from_bytes(connection.recv_bytes())
    configure_logging(config.args.logging)
    listener = socket.socket(fileno=listener_fd)
    asyncio.run(_run(config, connection, listener))


if __name__ == "__main__":
    main()
