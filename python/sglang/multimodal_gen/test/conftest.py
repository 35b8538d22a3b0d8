"""Session fixtures: each tiny checkpoint is built once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sglang.multimodal_gen import envs

if TYPE_CHECKING:
    from sglang.multimodal_gen.test.scripted_server import Start


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured or compiled once is kept in a directory of the tests' own, and nothing of the user's is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(envs.CACHE_ROOT, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def wan_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny Wan checkpoint with this name in TINY_WANS; to be read only."""
    # Here, because it imports diffusers: tests without a model should not wait seconds for it.
    from sglang.multimodal_gen.test.tiny_checkpoints import TINY_WANS, save_tiny_wan

    root = tmp_path_factory.mktemp("checkpoints")
    built: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in built:
            built[name] = save_tiny_wan(root / name, TINY_WANS[name])
        return built[name]

    return checkpoint


@pytest.fixture(scope="session")
def fallback_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny checkpoint with this name in TINY_FALLBACKS; to be read only."""
    from sglang.multimodal_gen.test.tiny_fallback import save_tiny_fallback  # likewise

    root = tmp_path_factory.mktemp("fallback")
    built: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in built:
            built[name] = save_tiny_fallback(root / name, name)
        return built[name]

    return checkpoint


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts HTTP servers before a scripted engine; they end with the module."""
    from sglang.multimodal_gen.test.scripted_server import servers  # likewise

    with servers(lambda: tmp_path_factory.mktemp("files")) as start:
        yield start
