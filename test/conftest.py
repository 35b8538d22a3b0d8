"""Fixtures of the whole-system tests: real processes, started as users start them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_process import START_SECONDS, STOP_SECONDS, ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server of the embedded model for all tests; it must end in order when it is told to."""
    command = [str(Path(sys.executable).with_name("sglang")), "serve", "--port", "0"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    running = ServerProcess(process, started)
    reader = threading.Thread(target=running.follow_log)
    reader.start()
    try:
        assert running.listening.wait(START_SECONDS), "the server announced no address:\n" + "".join(running.log)
        assert running.answers("/liveness")
        running.live_after_s = time.monotonic() - started
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
