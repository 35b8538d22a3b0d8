"""The HTTP process: an engine client and the FastAPI app on the socket that the supervisor bound.

Run as `python -m sglang.multimodal_gen.runtime.entrypoints.http_main FD SOCKET_FD`.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.runtime.entrypoints.engine_client import EngineClient
from sglang.multimodal_gen.runtime.entrypoints.http_server import create_app, serve
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings
from sglang.multimodal_gen.runtime.managers.child_process import (
    exit_with_parent,
    inherited_connection,
    inherited_fds,
)
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import HTTP_CLIENT_NAME, Codec, SchedulerLost, SupervisorNote
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.postprocess.storage import open_object_store
from sglang.multimodal_gen.runtime.server_args import model_names


def _settings(config: EngineConfig) -> HttpSettings:
    state_dir = config.args.storage.state_dir
    files = Path(state_dir) if state_dir is not None else RunDir.at(config.run_dir).private_state
    return HttpSettings(
        model_names=model_names(config.args.model),
        files_dir=files / "files",
        admin_api_key=config.args.http.admin_api_key,
        object_store=open_object_store(envs.current()),
    )


async def _run(config: EngineConfig, connection: Connection, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    client = EngineClient(config.run_dir, name=HTTP_CLIENT_NAME)
    settings, stop, codec = _settings(config), asyncio.Event(), Codec(SupervisorNote)
    settings.files_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def on_note(payload: bytes) -> None:
        note = codec.decode(payload)
        if isinstance(note, SchedulerLost):
            lost = client.scheduler_lost(note.error, restarting=note.restarting)
            asyncio.run_coroutine_threadsafe(lost, loop)

    def on_parent_gone() -> None:
        loop.call_soon_threadsafe(stop.set)
        time.sleep(settings.shutdown_grace_s)  # the loop ends the process before that, unless a request hangs

    exit_with_parent(connection, on_note, cleanup=on_parent_gone)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await client.start()
    await serve(create_app(client, settings), listener, stop=stop, settings=settings)
    await client.close()


def main() -> None:
    """Entry point of the process."""
    connection = inherited_connection()
    (listener_fd,) = inherited_fds()
    config = EngineConfig.from_bytes(connection.recv_bytes())
    configure_logging(config.args.logging)
    asyncio.run(_run(config, connection, socket.socket(fileno=listener_fd)))


if __name__ == "__main__":
    main()
