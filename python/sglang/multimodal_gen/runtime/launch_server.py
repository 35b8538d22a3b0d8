"""The supervisor: starts scheduler, output process and HTTP server, replaces what dies, stops them in order.

`launch_server(args)` is `sglang serve`, in the calling process. For the Python API the same supervisor runs as a child
(`python -m sglang.multimodal_gen.runtime.launch_server FD`) without HTTP; its parent's death, by whatever signal, ends
everything. Neither imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import platformdirs

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.errors import EngineStopped, PortInUse
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.entrypoints.openai.keys import read_key_file
from sglang.multimodal_gen.runtime.managers.child_process import ChildProcess, inherited_connection
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.job_store import prepare_job_store
from sglang.multimodal_gen.runtime.managers.messages import (
    HTTP_CLIENT_NAME,
    ClientLost,
    EngineStarted,
    Message,
    SchedulerLost,
    StopEngine,
    StopServing,
    encode,
)
from sglang.multimodal_gen.runtime.managers.run_dir import OwnedRunDir
from sglang.multimodal_gen.runtime.managers.state_dir import StateDir, claimed
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.postprocess.storage import check_storage
from sglang.multimodal_gen.runtime.server_args import HttpArgs, LoggingArgs, ServerArgs

# Started with -m, this module's own name is __main__, which is outside the package's logger.
logger = logging.getLogger("sglang.multimodal_gen.runtime.launch_server")

_APPLICATION = "sglang-diffusion"
_PACKAGE = "sglang.multimodal_gen.runtime"
_MODULES = {
    "scheduler": f"{_PACKAGE}.managers.scheduler",
    "output": f"{_PACKAGE}.managers.output_process",
    "http": f"{_PACKAGE}.entrypoints.http_main",
}
_STOP_ORDER = ("http", "scheduler", "output")
_STOP_GRACE_S = {"http": 5.0, "scheduler": 5.0, "output": 1.0}
_LOOK_S = 0.2  # how often the processes are looked at, when none of them ends
_STOPPED_S = 0.4  # a process that a signal has stopped for longer is as good as dead
_SILENCE_S = 20.0  # the scheduler tells of itself several times a second
_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 60.0
# What the HTTP process may take beyond the grace time of its requests, to answer those that were not done.
_BEYOND_GRACE_S = 8.0


@dataclass
class Supervisor:
    """The engine's processes. `notify` gets notes for an entry point that is our parent; `state_lock` is the descriptor
    that keeps other servers out of the state directory, for as long as the HTTP process lives as well."""

    args: ServerArgs
    http_socket: socket.socket | None = None
    state_lock: int | None = None
    notify: Callable[[Message], None] = lambda note: None
    sources: Mapping[str, str] = field(default_factory=dict)
    children: dict[str, ChildProcess] = field(default_factory=dict)
    restarts: list[float] = field(default_factory=list)
    config: EngineConfig | None = None
    stopped_since: dict[str, float] = field(default_factory=dict)
    scheduler_heard: float = 0.0
    drain_ends: float = 0.0

    def run(self, run_dir: OwnedRunDir, stop: StopSignal) -> int:
        """Until a stop signal; 0 after an orderly stop, 1 when processes kept dying."""
        serves_http = self.http_socket is not None
        self.config = EngineConfig.of_this_process(
            self.args, str(run_dir.paths.base), serves_http=serves_http, sources=self.sources
        )
        for name in ("scheduler", "output", *(("http",) if self.http_socket else ())):
            self._start(name)
        self.notify(EngineStarted(run_dir=self.config.run_dir))
        healthy = True
        try:
            while healthy and not stop.wait(self._child_fds()):
                self._kill_the_silent()
                healthy = all(self._replace(name) for name in _STOP_ORDER if self._is_dead(name))
            if healthy:
                self._drain(stop)
        finally:
            self._stop_all(stop)
        return 0 if healthy else 1

    def _start(self, name: str) -> None:
        assert self.config is not None
        fds: tuple[int, ...] = ()
        if name == "http" and self.http_socket:
            fds = (self.http_socket.fileno(), *(() if self.state_lock is None else (self.state_lock,)))
        self.children[name] = ChildProcess(_MODULES[name], config=self.config.to_bytes(), pass_fds=fds, nice_name=name)
        if name == "scheduler":
            self.scheduler_heard = time.monotonic()

    def _child_fds(self) -> list[int]:
        return [child.connection.fileno() for child in self.children.values()]

    def _kill_the_silent(self) -> None:
        """Those who live and do nothing: they are replaced as those are who died."""
        now = time.monotonic()
        scheduler = self.children.get("scheduler")
        if scheduler is not None and scheduler.drain():
            self.scheduler_heard = now
        elif scheduler is not None and now - self.scheduler_heard > _SILENCE_S:
            logger.error("the scheduler (pid %d) has been silent for %.0f s", scheduler.pid, now - self.scheduler_heard)
            scheduler.kill()
        for name, child in self.children.items():
            if not child.is_stopped():
                self.stopped_since.pop(name, None)
            elif now - self.stopped_since.setdefault(name, now) >= _STOPPED_S:
                logger.error("the %s process (pid %d) was stopped by a signal", name, child.pid)
                child.kill()

    def _is_dead(self, name: str) -> bool:
        child = self.children.get(name)
        return child is not None and not child.is_alive()

    def _replace(self, name: str) -> bool:
        """Start a dead process again; False when that happens too often."""
        child = self.children.pop(name)
        logger.error("the %s process (pid %d) %s", name, child.pid, child.describe_exit())
        child.close(grace_s=0)
        now = time.monotonic()
        self.restarts = [moment for moment in self.restarts if now - moment < _RESTART_WINDOW_S] + [now]
        restarting = len(self.restarts) <= _MAX_RESTARTS
        if name == "scheduler":
            self._tell_clients(
                SchedulerLost(error=EngineStopped("the scheduler process died").info(), restarting=restarting)
            )
        if not restarting:
            logger.error("processes died %d times within %.0f s; giving up", len(self.restarts), _RESTART_WINDOW_S)
            return False
        if name == "http" and "scheduler" in self.children:
            self.children["scheduler"].send(encode(ClientLost(client_name=HTTP_CLIENT_NAME)))
        self._start(name)
        if name == "scheduler":
            self._renew_output()
        return True

    def _renew_output(self) -> None:
        """The output process greets one scheduler; what it holds for a dead one, nobody waits for any more."""
        child = self.children.pop("output", None)
        if child is not None:
            child.close(grace_s=0)
        self._start("output")

    def _tell_clients(self, note: Message) -> None:
        self.notify(note)
        if "http" in self.children:
            self.children["http"].send(encode(note))

    def _drain(self, stop: StopSignal) -> None:
        """Let the HTTP process end what runs; it exits when that is done. A second signal ends the wait."""
        http = self.children.get("http")
        if http is None or not http.send(encode(StopServing())):
            return
        self.drain_ends = time.monotonic() + self.args.http.shutdown_grace_s
        deadline = self.drain_ends + _BEYOND_GRACE_S
        while http.is_alive() and not stop.urgent and time.monotonic() < deadline:
            self._kill_the_silent()
            if self._is_dead("scheduler"):
                self.children.pop("scheduler").close(grace_s=0)
                error = EngineStopped("the scheduler process died").info()
                self._tell_clients(SchedulerLost(error=error, restarting=False))
            if self._is_dead("output"):
                self._renew_output()
            stop.pause(self._child_fds())

    def _stop_all(self, stop: StopSignal) -> None:
        for name in _STOP_ORDER:
            child = self.children.pop(name, None)
            if child is None:
                continue
            grace_s = _STOP_GRACE_S[name]
            if name == "scheduler":
                # What is left of the grace time goes to jobs: their step ends and their state is saved.
                left = max(0.0, self.drain_ends - time.monotonic())
                child.send(encode(StopEngine(saving_s=left)))
                grace_s += left
            child.close(grace_s=0 if stop.urgent else grace_s, hurry=lambda: stop.urgent)


class StopSignal:
    """SIGINT, SIGTERM or the parent's end of file; a second signal makes the stop urgent."""

    def __init__(self, parent: Connection | None = None) -> None:
        self.requested = False
        self.urgent = False
        self._parent = parent
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def _on_signal(self, number: int, frame: object) -> None:
        if number != signal.SIGCHLD:
            self.urgent = self.requested
            self.requested = True

    def pause(self, child_fds: list[int]) -> None:
        """Sleep until a signal or a child's end of file, for a moment at most."""
        ready, _, _ = select.select([self._read, *child_fds], [], [], _LOOK_S)
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)
        if ready:
            time.sleep(0.01)  # as below

    def wait(self, child_fds: list[int]) -> bool:
        """Sleep until a signal, a child's end of file or the parent's; whether to stop."""
        if self.requested:
            return True
        watched = [self._read, *child_fds, *([self._parent.fileno()] if self._parent else [])]
        ready, _, _ = select.select(watched, [], [], _LOOK_S)
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)
        if self._parent is not None and self._parent.fileno() in ready:
            try:
                self._parent.recv_bytes()
            except (EOFError, OSError):
                self.requested = True
        elif ready and not self.requested:
            time.sleep(0.01)  # a child's pipe closes a moment before the child can be reaped
        return self.requested


def launch_server(
    args: ServerArgs,
    *,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
) -> int:
    """Serve over HTTP until a signal; the exit status. `warnings` and `notes` about the options go to the log;
    `sources` says where each option came from.

    Raises:
        PortInUse: before anything is started.
        StateDirInUse: another server holds the state directory, likewise.
        StorageError: it cannot be written, or its jobs cannot be read.
        InvalidKeyFile: the file of keys cannot be used, likewise.
        ModelError: a local path holds no model that we can serve, likewise.
        ServingError: results are to be uploaded and cannot be, likewise.
    """
    args = dataclasses.replace(args, http=_with_keys(args.http), logging=_server_logging(args.logging))
    configure_logging(args.logging)
    for warning in warnings:
        logger.warning("%s", warning)
    for note in notes:
        logger.info("%s", note)
    get_model_info(args.model.model_path, model_id=args.model.model_id, backend=args.model.backend)
    check_storage(envs.current())
    stop = StopSignal()
    with (
        _listening_socket(args.http) as http_socket,
        _claimed_state(args, http_socket) as (args_with_state, state_lock),
        contextlib.closing(OwnedRunDir()) as run_dir,
    ):
        if is_exposed(args.http, http_socket.getsockname()[0]):
            logger.warning(
                "anybody who reaches %s may use the server: it listens beyond this machine without --api-key or "
                "--api-key-file",
                args.http.host,
            )
        supervisor = Supervisor(args_with_state, http_socket=http_socket, state_lock=state_lock, sources=sources or {})
        return supervisor.run(run_dir, stop)


@contextlib.contextmanager
def _claimed_state(args: ServerArgs, listener: socket.socket) -> Iterator[tuple[ServerArgs, int | None]]:
    """The options with this server's state directory in them, and the lock that keeps others out of it."""
    given = args.storage.state_dir
    if given is None and args.http.port == 0:  # another port at each start: nobody would come back to it
        yield args, None
        return
    base = platformdirs.user_state_path(_APPLICATION) / f"port-{args.http.port}" if given is None else Path(given)
    base = base.expanduser().absolute()
    with claimed(base, address=address_of(listener)) as lock:
        prepare_job_store(StateDir(base).jobs)
        yield dataclasses.replace(args, storage=dataclasses.replace(args.storage, state_dir=str(base))), lock


def _with_keys(http: HttpArgs) -> HttpArgs:
    """With the keys of the file beside the others; read once, so that a restarted HTTP process has the same."""
    if http.api_key_file is None:
        return http
    keys = (*(http.api_key or ()), *read_key_file(http.api_key_file))
    return dataclasses.replace(http, api_key=tuple(dict.fromkeys(keys)))


def is_exposed(http: HttpArgs, address: str) -> bool:
    """Whether other machines may reach the server, which listens on `address`, and need no key."""
    return not http.api_key and not ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _server_logging(args: LoggingArgs) -> LoggingArgs:
    """A server tells of every request, unless it was told how much to tell."""
    return dataclasses.replace(args, log_level=args.log_level or "info")


@contextlib.contextmanager
def _listening_socket(http: HttpArgs) -> Iterator[socket.socket]:
    """A bound socket that survives restarts of the HTTP process."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise PortInUse(f"host: got {http.host}, accepted is an address of this machine", param="host") from None
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise PortInUse(_why_not_bound(http, error), param="port") from None
        listener.listen(2048)
        yield listener


def address_of(listener: socket.socket) -> str:
    """The listening socket's `http://HOST:PORT`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _why_not_bound(http: HttpArgs, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port: {http.port} on {http.host} is in use; choose another with --port, or 0 for any free one"
    reason = os.strerror(error.errno or 0)
    return f"host: cannot listen on {http.host}:{http.port} ({reason}); use an address of this machine"


def main() -> None:
    """The supervisor as a child of a Python program."""
    parent = inherited_connection()
    config = EngineConfig.from_bytes(parent.recv_bytes())
    configure_logging(config.args.logging)
    config.apply()

    def notify(note: Message) -> None:
        with contextlib.suppress(OSError):
            parent.send_bytes(encode(note))

    stop = StopSignal(parent)
    with contextlib.closing(OwnedRunDir()) as run_dir:
        sys.exit(Supervisor(config.args, notify=notify).run(run_dir, stop))


if __name__ == "__main__":
    main()
