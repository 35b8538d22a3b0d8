"""Start a child as `python -m module` with one end of a pipe; end of file on that pipe means the parent is gone.

No `multiprocessing` start method is involved, so a plain script, a notebook and a REPL can start an engine without a
main guard, and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

_LOOK_S = 0.1  # how often a wait for a child looks whether it is to go on


class ChildProcess:
    """A running child and our end of its pipe."""

    def __init__(self, module: str, *, config: bytes, pass_fds: tuple[int, ...] = (), nice_name: str = "") -> None:
        self.connection, theirs = Pipe(duplex=True)
        command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), *map(str, pass_fds)]
        self.name = nice_name or module.rsplit(".", 1)[-1]
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(), *pass_fds),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the entry point alone, which then stops the others in order
        )
        theirs.close()
        with contextlib.suppress(OSError):  # a child that is already dead is noticed by whoever watches it
            self.connection.send_bytes(config)

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Whether the process runs; reaps it when it does not."""
        return self.process.poll() is None

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process (SIGSTOP): it lives and does nothing. Linux only."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def drain(self) -> bool:
        """Read away what the child has sent; whether there was anything."""
        heard = False
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll(0):
                self.connection.recv_bytes()
                heard = True
        return heard

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def send(self, payload: bytes) -> bool:
        """Send one message; False when the child is gone."""
        try:
            self.connection.send_bytes(payload)
        except (OSError, ValueError):
            return False
        return True

    def describe_exit(self) -> str:
        """How the process ended, in words."""
        code = self.process.poll()
        if code is None:
            return "still running"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def close(self, *, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Close the pipe, wait until `hurry`, then SIGKILL. A stopped process (SIGSTOP) dies of SIGKILL as well."""
        self._hang_up()
        deadline = time.monotonic() + grace_s
        while self.is_alive():
            left = deadline - time.monotonic()
            if left <= 0 or hurry():
                self.kill()
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=min(left, _LOOK_S))

    def _hang_up(self) -> None:
        """End of file for the child, also while another thread of ours waits in a read, which a close would not end."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self.connection.close()


def inherited_connection() -> Connection:
    """The pipe end that `ChildProcess` handed to this process.

    From here on SIGTERM does nothing: service managers send it to every process of a service, and the parent, which
    gets it too, ends its children in order. A handler and not SIG_IGN, which programs started from here would inherit.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    return Connection(int(sys.argv[1]))


def inherited_fds() -> tuple[int, ...]:
    """Further descriptors handed down by `pass_fds`."""
    return tuple(int(text) for text in sys.argv[2:])


def exit_with_parent(
    connection: Connection, on_message: Callable[[bytes], None], *, cleanup: Callable[[], None]
) -> None:
    """Own `connection` in a thread: messages go to `on_message`; at end of file run `cleanup` and leave at once.

    What `on_message` raises ends the process too, with status 1: without the thread it would be deaf, to the parent's
    end as well. `os._exit` and not an exception: the main thread may be inside a kernel or a collective that never
    returns.
    """

    def read() -> None:
        while True:
            try:
                payload = connection.recv_bytes()
            except (EOFError, OSError):
                cleanup()
                os._exit(0)
            try:
                on_message(payload)
            except BaseException as error:
                # A traceback, or nothing for SystemExit, as of any thread.
                threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
                cleanup()
                os._exit(1)

    threading.Thread(target=read, name="parent-pipe", daemon=True).start()
