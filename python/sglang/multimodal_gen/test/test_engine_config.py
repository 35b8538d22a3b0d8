"""What the processes of an engine are told when they start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.server_args import ServerArgs


def test_modules_beside_a_repl_are_found_by_its_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a REPL, and in a program read from stdin, the working directory stands in sys.path as an empty string."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    payload = EngineConfig.of_this_process(ServerArgs(), "/run").to_bytes()
    monkeypatch.setattr(sys, "path", ["/elsewhere"])
    EngineConfig.from_bytes(payload).apply()
    assert sys.path == ["/elsewhere", str(tmp_path)]
