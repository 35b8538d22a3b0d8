"""The HTTP process: an engine client and the FastAPI app on the socket that the supervisor bound.

Run as `python -m sglang.multimodal_gen.runtime.entrypoints.http_main FD SOCKET_FD`.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from multiprocessing.connection import Connection

from sglang.multimodal_gen.runtime.entrypoints.engine_client import EngineClient
from sglang.multimodal_gen.runtime.entrypoints.http_server import create_app, serve
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings, JobSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.webhooks import WebhookTarget
from sglang.multimodal_gen.runtime.managers.child_process import (
    exit_with_parent,
    inherited_connection,
    inherited_fds,
)
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import HTTP_CLIENT_NAME, Codec, SchedulerLost, SupervisorNote
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.server_args import model_names


def _settings(config: EngineConfig) -> HttpSettings:
    http, storage = config.args.http, config.args.storage
    webhook = None
    if http.webhook_url is not None and http.webhook_secret is not None:
        webhook = WebhookTarget(url=http.webhook_url, secret=http.webhook_secret)
    return HttpSettings(
        model_names=model_names(config.args.model),
        state=config.state_dir(),
        jobs=JobSettings(
            capacity=storage.max_jobs,
            lifetime_s=storage.job_lifetime_h * 3600,
            max_output_bytes=round(storage.max_output_gib * 2**30),
            webhook=webhook,
        ),
        admin_api_key=http.admin_api_key,
    )


async def _run(config: EngineConfig, connection: Connection, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    client = EngineClient(config.run_dir, name=HTTP_CLIENT_NAME)
    settings, stop, codec = _settings(config), asyncio.Event(), Codec(SupervisorNote)

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
    listener_fd, *_ = inherited_fds()  # behind it, the lock of the state directory: it is only to be held
    config = EngineConfig.from_bytes(connection.recv_bytes())
    configure_logging(config.args.logging)
    asyncio.run(_run(config, connection, socket.socket(fileno=listener_fd)))


if __name__ == "__main__":
    main()
