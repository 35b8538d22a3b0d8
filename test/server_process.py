"""A real `sglang serve` process, followed through its log."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

_LISTENING = re.compile(r'Listening on (http://[^\s"]+)')
START_SECONDS = 30.0
_READY_SECONDS = 90.0
STOP_SECONDS = 20.0


@dataclass
class ServerProcess:
    """A running `sglang serve`. `started` is the monotonic time at which its process was made."""

    process: subprocess.Popen[str]
    started: float
    url: str = ""
    log: list[str] = field(default_factory=list)
    listening: threading.Event = field(default_factory=threading.Event)
    was_ready_when_live: bool = False

    def follow_log(self) -> None:
        """Collect stderr until the process ends; the line with the address sets `listening`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if (match := _LISTENING.search(line)) is not None:
                self.url = match[1]
                self.listening.set()

    def answers(self, path: str) -> bool:
        """Whether a GET of `path` gives 200."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as reply:
                return reply.status == 200
        except urllib.error.HTTPError as error:
            error.close()
            return False

    def wait_ready(self) -> None:
        """Until the model is loaded; the log is shown when it does not come to that."""
        deadline = self.started + _READY_SECONDS
        while not self.answers("/health"):
            alive = self.process.poll() is None
            assert alive and time.monotonic() < deadline, "the server did not get ready:\n" + "".join(self.log)
            time.sleep(0.1)


@contextmanager
def running_server(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """The server that `command` starts, once it takes requests; it must end in order when it is told to."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    running = ServerProcess(process, started)
    reader = threading.Thread(target=running.follow_log)
    reader.start()
    try:
        assert running.listening.wait(START_SECONDS), "the server announced no address:\n" + "".join(running.log)
        assert running.answers("/liveness")
        running.was_ready_when_live = running.answers("/health")
        running.wait_ready()
        yield running
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0, "".join(running.log)
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
