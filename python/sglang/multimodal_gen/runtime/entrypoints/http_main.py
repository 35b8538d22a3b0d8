"""The HTTP process: an engine client and the FastAPI app on the socket that the supervisor bound.

Run as `python -m sglang.multimodal_gen.runtime.entrypoints.http_main FD SOCKET_FD`.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import time
from multiprocessing.connection import Connection

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.runtime.entrypoints.engine_client import EngineClient
from sglang.multimodal_gen.runtime.entrypoints.http_server import create_app, serve
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings, JobSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.gate import hosts_for
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import BodyLimits
from sglang.multimodal_gen.runtime.entrypoints.openai.webhooks import WebhookTarget
from sglang.multimodal_gen.runtime.managers.child_process import (
    exit_with_parent,
    inherited_connection,
    inherited_fds,
)
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import (
    HTTP_CLIENT_NAME,
    Codec,
    SchedulerLost,
    StopServing,
    SupervisorNote,
)
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.postprocess.storage import open_object_store
from sglang.multimodal_gen.runtime.server_args import model_names, shown_options

_ORPHANED_S = 5.0


def _settings(config: EngineConfig, address: str) -> HttpSettings:
    args, http = config.args, config.args.http
    return HttpSettings(
        model_names=model_names(args.model),
        state=config.state_dir(),
        jobs=_job_settings(config),
        body=BodyLimits(
            timeout_s=http.body_timeout_s,
            max_upload_bytes=http.max_upload_mib << 20,
            max_json_upload_bytes=(http.max_upload_mib << 20) // 4,
        ),
        header_timeout_s=http.header_timeout_s,
        shutdown_grace_s=http.shutdown_grace_s,
        admin_api_key=http.admin_api_key,
        api_keys=http.api_key or (),
        allowed_hosts=hosts_for(http.host, address, http.allowed_host),
        cors_origins=frozenset(http.cors_origin or ()),
        max_header_bytes=http.max_header_kib << 10,
        max_connections_per_ip=http.max_connections_per_ip,
        max_queued_requests=args.execution.max_queued_requests,
        backend=args.model.backend,
        options=shown_options(args, config.sources),
        studio=http.studio,
        object_store=open_object_store(envs.current()),
    )


def _job_settings(config: EngineConfig) -> JobSettings:
    http, storage = config.args.http, config.args.storage
    webhook = None
    if http.webhook_url is not None and http.webhook_secret is not None:
        webhook = WebhookTarget(url=http.webhook_url, secret=http.webhook_secret)
    return JobSettings(
        capacity=storage.max_jobs,
        lifetime_s=storage.job_lifetime_h * 3600,
        max_output_bytes=round(storage.max_output_gib * 2**30),
        webhook=webhook,
        outlive=storage.state_dir is not None,
    )


def _allow_many_connections() -> None:
    """Each takes a descriptor, and a process may often open more than the 1024 that it begins with."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _run(config: EngineConfig, connection: Connection, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    client = EngineClient(config.run_dir, name=HTTP_CLIENT_NAME)
    settings = _settings(config, listener.getsockname()[0])
    stop, codec = asyncio.Event(), Codec(SupervisorNote)

    def on_note(payload: bytes) -> None:
        note = codec.decode(payload)
        if isinstance(note, SchedulerLost):
            lost = client.scheduler_lost(note.error, restarting=note.restarting)
            asyncio.run_coroutine_threadsafe(lost, loop)
        elif isinstance(note, StopServing):
            loop.call_soon_threadsafe(stop.set)

    def on_parent_gone() -> None:
        loop.call_soon_threadsafe(stop.set)
        time.sleep(_ORPHANED_S)  # the engine ends too, and with it every request; the loop then ends the process

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
    config.apply()
    _allow_many_connections()
    asyncio.run(_run(config, connection, socket.socket(fileno=listener_fd)))


if __name__ == "__main__":
    main()
