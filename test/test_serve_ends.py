"""However `sglang serve` ends, nothing of it stays; and it does not start on a port that is taken."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from server_process import ServerProcess

SGLANG = str(Path(sys.executable).with_name("sglang"))


def run_directories() -> set[Path]:
    places = {Path(tempfile.gettempdir()), Path("/dev/shm")}
    return {path for place in places if place.is_dir() for path in place.glob("sglang-run-*")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_ends_every_process_and_removes_every_file(number: signal.Signals) -> None:
    before = run_directories()
    process = subprocess.Popen([SGLANG, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True)
    server = ServerProcess(process, time.monotonic())
    reader = threading.Thread(target=server.follow_log)
    reader.start()
    assert server.listening.wait(30), "".join(server.log)
    server.wait_ready()
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    assert len(family) == 5  # supervisor, HTTP server, scheduler, output process, worker
    process.send_signal(number)
    status = process.wait(20)
    reader.join(20)
    assert process.stderr is not None
    process.stderr.close()
    assert status == (-number if number == signal.SIGKILL else 0)
    deadline = time.monotonic() + 10
    while (any(map(psutil.pid_exists, family)) or run_directories() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in family if psutil.pid_exists(pid)]
    assert run_directories() <= before


def test_a_port_in_use_is_one_sentence_and_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [SGLANG, "serve", "--port", str(port)], capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"sglang: error: port: {port} on 127.0.0.1 is in use; choose another with --port, or 0 for any free one"
    )
