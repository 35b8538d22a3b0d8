"""Fixtures of the whole-system tests: real processes, started as users start them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from server_process import ServerProcess, running_server
from studio_page import go

# As long as other waits for the page: beside other tests a browser may take seconds for a picture.
expect.set_options(timeout=20_000)
# Files that take more than a minute. They go first: the one that is taken last is waited for alone.
_LONG = frozenset(
    ("test_parallel", "test_docs", "test_bench", "test_demo_model", "test_engine", "test_job_restart", "test_studio")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files before others, each whole and in its own order."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server of the embedded model for all tests; it must end in order when it is told to."""
    command = [str(Path(sys.executable).with_name("sglang")), "serve", "--port", "0"]
    with running_server(command) as running:
        yield running


def chromium() -> str:
    """The browser's path."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found is not None, "there is no Chromium; run scripts/ensure_browser, or install the package `chromium`"
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a module, not for all: while it runs, no test could run an event loop of its own."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that remembers nothing, whose user wants no movement."""
    made = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce", accept_downloads=True)
    made.set_default_timeout(20_000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext, server: ServerProcess) -> Iterator[Page]:
    """The Studio, ready to generate. No test may leave an exception or a breach of the page's own policy behind."""
    problems: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if _is_breach(message.text) else None)
    go(opened, server)
    yield opened
    assert problems == []


def _is_breach(text: str) -> bool:
    return "Content Security Policy" in text or "Trusted" in text or "Uncaught" in text
