"""SIGTERM, as an orchestrator sends it: nothing new is taken, what runs is finished, and a second one ends at once."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from server_process import START_SECONDS, STOP_SECONDS, ServerProcess, running_server

SGLANG = str(Path(sys.executable).with_name("sglang"))
KEY, ADMIN_KEY = "the-key-of-the-tests", "the-key-of-their-administrator"


@contextmanager
def serving(*options: str) -> Iterator[ServerProcess]:
    """A server that the test ends itself; whatever it leaves is killed."""
    command = [SGLANG, "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    server = ServerProcess(process, time.monotonic())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(server.follow_log)
        family = [psutil.Process(process.pid)]
        try:
            assert server.listening.wait(START_SECONDS), "".join(server.log)
            server.wait_ready()
            family += family[0].children(recursive=True)
            yield server
            deadline = time.monotonic() + 10
            while any(psutil.pid_exists(member.pid) for member in family) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not [member.pid for member in family if psutil.pid_exists(member.pid)]
        finally:
            for member in family:
                if member.is_running():
                    member.kill()
            process.wait()
    assert process.stderr is not None
    process.stderr.close()


def call(
    server: ServerProcess, path: str, *, key: str | None = None, post: bool = False, **fields: Any
) -> tuple[int, dict[str, Any]]:
    """The status and body of a GET, or of a POST, which is also what has fields."""
    request = urllib.request.Request(server.url + path, data=json.dumps(fields).encode() if post or fields else None)
    request.add_header("content-type", "application/json")
    if key is not None:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def num_running(server: ServerProcess) -> int:
    _, info = call(server, "/server_info")
    running: int = info["queue"]["running"]
    return running


def begin_image(server: ServerProcess, pool: concurrent.futures.Executor, steps: int) -> Any:
    """An image that is being made when this returns."""
    fields = {"prompt": "a red circle", "size": "128x128", "num_inference_steps": steps}
    image = pool.submit(call, server, "/v1/images/generations", **fields)
    deadline = time.monotonic() + 30
    while num_running(server) == 0:
        assert time.monotonic() < deadline and not image.done(), "the image is not being made"
        time.sleep(0.02)
    return image


@pytest.mark.timeout(300)
@pytest.mark.parametrize("to_all", [False, True], ids=["to the server", "to each of its processes"])
def test_what_runs_is_finished_and_nothing_new_is_taken(to_all: bool) -> None:
    """Service managers send the signal to every process of a service."""
    with serving("--shutdown-grace-s", "120") as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        image = begin_image(server, pool, steps=100)
        main = psutil.Process(server.process.pid)
        for process in [main, *(main.children(recursive=True) if to_all else [])]:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while server.answers("/health"):
            assert time.monotonic() < deadline, "the server is still healthy"
        status, body = call(server, "/v1/images/generations", prompt="a star")
        assert (status, body["error"]["code"]) == (503, "server_draining")
        assert call(server, "/health")[1]["state"] == "draining"
        assert not image.done(), "the test came too late to see anything"
        status, body = image.result()
        assert (status, len(body["data"])) == (200, 1), body
        assert server.process.wait(STOP_SECONDS) == 0


def test_what_is_not_done_within_the_grace_time_is_answered() -> None:
    with serving("--shutdown-grace-s", "0.5") as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        image = begin_image(server, pool, steps=1000)
        server.process.send_signal(signal.SIGTERM)
        status, body = image.result()
        assert (status, body["error"]["code"]) == (503, "engine_stopped")
        assert server.process.wait(STOP_SECONDS) == 0


def test_a_second_signal_ends_at_once() -> None:
    with serving("--shutdown-grace-s", "3600") as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        image = begin_image(server, pool, steps=1000)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while server.answers("/health"):
            assert time.monotonic() < deadline, "the server is still healthy"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_SECONDS) == 0
        assert isinstance(image.exception(), OSError), "cut off"


def test_keys_health_and_operations_of_a_real_server(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# of the tests\n{KEY}\n")
    command = [SGLANG, "serve", "--port", "0", "--api-key-file", str(keys), "--admin-api-key", ADMIN_KEY]
    with running_server(command) as server:
        assert call(server, "/v1/models")[0] == 401
        assert call(server, "/flush_cache", key=KEY, post=True)[0] == 403
        status, body = call(server, "/health_generate", key=KEY)
        assert (status, body["status"]) == (200, "ok"), body
        _, info = call(server, "/server_info", key=KEY)
        assert info["model"]["names"] == ["demo"] and info["queue"] == {"queued": 0, "running": 0}
        assert info["workers"]["count"] == 1 and "options" not in info
        _, info = call(server, "/server_info", key=ADMIN_KEY)
        assert info["options"]["api_key_file"] == {"value": str(keys), "source": "flag"}
        assert info["options"]["api_key"]["value"] == info["options"]["admin_api_key"]["value"] == "***"
        assert info["versions"].keys() >= {"python", "torch"}
        assert call(server, "/release_memory_occupation", key=ADMIN_KEY, post=True)[1]["success"] is True
        status, health = call(server, "/health")
        assert (status, health["state"]) == (503, "asleep")
        assert call(server, "/v1/images/generations", key=KEY, prompt="a star")[1]["error"]["code"] == "memory_released"
        assert call(server, "/resume_memory_occupation", key=ADMIN_KEY, post=True)[1]["success"] is True
        assert call(server, "/update_weights_from_disk", key=ADMIN_KEY, model_path=None)[1]["success"] is True
        status, body = call(server, "/health_generate", key=KEY)
        assert (status, body["status"]) == (200, "ok"), body
        assert not [secret for secret in (KEY, ADMIN_KEY) if secret in "".join(server.log)]
    log = "".join(server.log)
    assert not [secret for secret in (KEY, ADMIN_KEY) if secret in log]


def test_a_server_that_listens_beyond_the_machine_without_a_key_warns() -> None:
    command = [SGLANG, "serve", "--host", "0.0.0.0", "--port", "0", "--model-path", "null-model"]
    with serving(*command[2:]) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_SECONDS) == 0
        assert "without --api-key" in "".join(server.log)
