"""Fixtures of the whole-system tests: real processes, started as users start them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_process import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server of the embedded model for all tests; it must end in order when it is told to."""
    command = [str(Path(sys.executable).with_name("sglang")), "serve", "--port", "0"]
    with running_server(command) as running:
        yield running
