"""`sglang generate` with a real engine and the family that does nothing."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sglang.cli.main import main
from sglang.multimodal_gen.test import null_family

COMMAND = """
import signal, sys
from sglang.cli.main import main
from sglang.multimodal_gen.test import null_family
signal.signal(signal.SIGINT, signal.default_int_handler)  # as on a terminal, also where the tests run in the background
null_family.register()
sys.exit(main(["generate", "--model-path", "null-model", *sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_output_is_told_and_one_failure_makes_the_exit_status_1(capfd: pytest.CaptureFixture[str]) -> None:
    null_family.register()
    arguments = ["generate", "--model-path", "null-model", "--prompt", "good", "fail", "--seed", "7"]
    assert main(arguments) == 1
    out, err = capfd.readouterr()
    match = re.fullmatch(r"Pixel data generated successfully in \d+\.\d{4} seconds\nsaved to (.+\.mp4), seed 7\n", out)
    assert match is not None
    assert Path(match[1]).parent == Path("outputs").resolve()
    assert Path(match[1]).stat().st_size > 0
    assert re.search(r"^sglang: error: prompt 2, output 1: .+$", err, re.MULTILINE)
    assert not re.search(r"INFO|WARNING", err), "the terminal is the user's; a log line would be in the way"


def test_ctrl_c_on_a_terminal_stops_quietly_with_130_and_leaves_no_bar() -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--prompt", "sleep-20000"], stderr=terminal, stdout=subprocess.PIPE
    )
    os.close(terminal)
    shown = b""
    while b"step" not in shown:
        shown += os.read(controller, 4096)
    process.send_signal(signal.SIGINT)
    while chunk := read_until_closed(controller):
        shown += chunk
    os.close(controller)
    assert process.communicate(timeout=30)[0] == b""
    assert process.returncode == 130
    assert b"Traceback" not in shown
    # The cursor, hidden while the bars move, is shown again.
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def read_until_closed(controller: int) -> bytes:
    """What the terminal shows next; empty once every process has let go of it."""
    try:
        return os.read(controller, 4096)
    except OSError:
        return b""
