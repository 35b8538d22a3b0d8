"""However `sglang serve` ends, nothing of it stays; and it does not start on a port that is taken."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from server_process import ServerProcess
from sglang.multimodal_gen.test.run_directories import private_run_directories

SGLANG = str(Path(sys.executable).with_name("sglang"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_ends_every_process_and_removes_every_file(number: signal.Signals) -> None:
    with private_run_directories() as directories:
        process = subprocess.Popen([SGLANG, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True)
        server = ServerProcess(process, time.monotonic())
        reader = threading.Thread(target=server.follow_log)
        reader.start()
        assert server.listening.wait(30), "".join(server.log)
        server.wait_ready()
        assert directories.left()
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        assert len(family) == 5  # supervisor, HTTP server, scheduler, output process, worker
        process.send_signal(number)
        status = process.wait(20)
        reader.join(20)
        assert process.stderr is not None
        process.stderr.close()
        assert status == (-number if number == signal.SIGKILL else 0)
        deadline = time.monotonic() + 10
        while (any(map(psutil.pid_exists, family)) or directories.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in family if psutil.pid_exists(pid)]
        assert not directories.left()


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
