"""Video jobs of a real server over `kill -9` of its processes: nothing that was accepted is lost."""

from __future__ import annotations

import concurrent.futures
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server_process import ServerProcess, running_server
from sglang.multimodal_gen.registry import EMBEDDED_ADAPTERS

STEPS = 60
VIDEO = {"prompt": "a red circle moving right", "size": "64x64", "num_frames": 9, "num_inference_steps": STEPS}


def command(state: Path, *options: str) -> list[str]:
    serve = [sys.executable, "-m", "sglang.cli.main", "serve", "--port", "0", "--state-dir", str(state)]
    # Nothing is shared: sums of a batch may be in another order, and results are compared to the byte.
    return [*serve, "--checkpoint-every", "2", "--warmup-mode", "off", "--deterministic", *options]


@contextmanager
def server_to_be_killed(state: Path, *options: str) -> Iterator[tuple[ServerProcess, Callable[[], None]]]:
    """A server that is ready, and what ends all of its processes at once without a word."""
    process = subprocess.Popen(command(state, *options), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    running = ServerProcess(process, time.monotonic())
    reader = threading.Thread(target=running.follow_log)
    reader.start()

    def kill() -> None:
        root = psutil.Process(process.pid)
        for each in [root, *root.children(recursive=True)]:
            each.send_signal(signal.SIGKILL)
        process.wait()
        reader.join()

    try:
        assert running.listening.wait(30), "".join(running.log)
        running.wait_ready()
        yield running, kill
    finally:
        if process.poll() is None:
            kill()
        assert process.stderr is not None
        process.stderr.close()


def create(url: str, **changes: Any) -> str:
    reply = httpx.post(f"{url}/v1/videos", json=VIDEO | changes, timeout=30)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def video(url: str, video_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/v1/videos/{video_id}", timeout=30).json()
    return found


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.02)


def num_running(url: str) -> int:
    found: int = httpx.get(f"{url}/server_info", timeout=30).json()["queue"]["running"]
    return found


def content(url: str, video_id: str) -> bytes:
    return httpx.get(f"{url}/v1/videos/{video_id}/content", timeout=30).raise_for_status().content


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The bytes by seed of a server that nobody kills."""
    with running_server(command(tmp_path_factory.mktemp("undisturbed"))) as server:
        ids = {seed: create(server.url, seed=seed) for seed in (1, 2)}
        for video_id in ids.values():
            wait_until(lambda video_id=video_id: video(server.url, video_id)["status"] == "completed", "the end")
        return {seed: content(server.url, video_id) for seed, video_id in ids.items()}


def test_jobs_go_on_after_every_process_was_killed(tmp_path: Path, undisturbed: dict[int, bytes]) -> None:
    with server_to_be_killed(tmp_path) as (server, kill):
        first = create(server.url, seed=1)
        second = create(server.url, seed=2)
        wait_until(lambda: video(server.url, first)["progress"] >= 30, "a third of the first video")
        kill()
    with running_server(command(tmp_path)) as server:
        assert video(server.url, first)["progress"] >= 30, "what a client has seen is not taken back"
        for video_id in (first, second):
            wait_until(lambda video_id=video_id: video(server.url, video_id)["status"] == "completed", "the end")
        assert content(server.url, first) == undisturbed[1]
        assert content(server.url, second) == undisturbed[2]
        listed = httpx.get(f"{server.url}/v1/videos", timeout=30).json()["data"]
        assert [found["id"] for found in listed] == [second, first]
        log = "".join(server.log)
    assert "going on with 2 videos of the server before this one" in log
    [finished] = [line for line in server.log if first in line and "finished:" in line]
    steps_here = int(finished.split("finished: ")[1].split(" steps")[0])
    assert 0 < steps_here < STEPS, f"it began again instead of going on: {finished}"
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_job_keeps_the_adapters_that_were_set_when_it_came(tmp_path: Path) -> None:
    """Neither what is set later nor the next server, which starts without any, changes them. An adapter whose file has
    gone meanwhile is not there any more."""
    gone = Path(shutil.copy(EMBEDDED_ADAPTERS["demo-outline"], tmp_path / "gone.safetensors"))
    key = ("--admin-api-key", "a-key-of-the-administrator")
    headers = {"Authorization": f"Bearer {key[1]}"}
    with (
        server_to_be_killed(tmp_path, *key) as (server, kill),
        httpx.Client(base_url=server.url, headers=headers, timeout=60) as admin,
    ):
        wish = {"lora_nickname": "outline", "lora_path": "demo-outline", "strength": 0.8}
        admin.post("/v1/set_lora", json=wish).raise_for_status()
        with_adapter = create(server.url, seed=1)
        admin.post("/v1/set_lora", json={"lora_nickname": "gone", "lora_path": str(gone)}).raise_for_status()
        admin.post("/v1/set_lora", json={"lora_nickname": []}).raise_for_status()
        without = create(server.url, seed=1)
        wait_until(lambda: video(server.url, with_adapter)["progress"] >= 30, "a third of the first video")
        kill()
    gone.unlink()
    with running_server(command(tmp_path, *key)) as server:
        named = create(server.url, seed=1, lora=[{"name": "outline", "scale": 0.8}])
        for video_id in (with_adapter, without, named):
            wait_until(lambda video_id=video_id: video(server.url, video_id)["status"] == "completed", "the end")
        assert content(server.url, with_adapter) == content(server.url, named)
        assert content(server.url, without) != content(server.url, named)
        listed = httpx.get(f"{server.url}/v1/list_loras", headers=headers, timeout=30).json()
        assert listed["active"] == {}
        assert [each["nickname"] for each in listed["loaded_adapters"]] == ["outline"]


@pytest.mark.parametrize(
    ("victim", "number"),
    [("http_main", signal.SIGKILL), ("managers.scheduler", signal.SIGSTOP)],
    ids=["http", "scheduler"],
)
def test_jobs_go_on_when_one_process_ends(
    tmp_path: Path, victim: str, number: signal.Signals, undisturbed: dict[int, bytes]
) -> None:
    """A process that is stopped and does not end is one that has died."""
    with running_server(command(tmp_path)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 1000}
        image = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=body, timeout=60)
        video_id = create(server.url, seed=1)
        wait_until(lambda: video(server.url, video_id)["progress"] >= 20, "a fifth of the video")
        assert num_running(server.url) == 2, image
        children = psutil.Process(server.process.pid).children()
        [process] = [child for child in children if any(victim in part for part in child.cmdline())]
        process.send_signal(number)
        if victim == "http_main":
            assert isinstance(image.exception(), httpx.TransportError), "its connection has gone"
            wait_until(lambda: server.answers("/health"), "the next HTTP process", seconds=30)
            # The image was its client's alone and has far more steps to go than the video.
            wait_until(lambda: num_running(server.url) <= 1, "the end of the image", seconds=5)
        else:
            assert image.result().status_code == 503
            assert image.result().json()["error"]["code"] == "engine_stopped"
            assert httpx.get(f"{server.url}/health").status_code == 503

        def completed() -> bool:
            try:
                return video(server.url, video_id)["status"] == "completed"
            except httpx.TransportError:  # the connection to the process that was killed
                return False

        wait_until(completed, "the end")
        assert content(server.url, video_id) == undisturbed[1]


def test_a_server_that_is_told_to_end_saves_what_runs(tmp_path: Path, undisturbed: dict[int, bytes]) -> None:
    options = ("--checkpoint-every", "0", "--shutdown-grace-s", "0.1")  # nothing but the end makes it save
    with running_server([*command(tmp_path), *options]) as server:
        video_id = create(server.url, seed=1)
        wait_until(lambda: video(server.url, video_id)["progress"] >= 30, "a third of the video")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    with running_server(command(tmp_path)) as server:
        wait_until(lambda: video(server.url, video_id)["status"] == "completed", "the end")
        assert content(server.url, video_id) == undisturbed[1]
    [finished] = [line for line in server.log if video_id in line and "finished:" in line]
    assert int(finished.split("finished: ")[1].split(" steps")[0]) < STEPS


def test_a_video_that_is_nearly_done_is_finished_before_the_server_ends(tmp_path: Path) -> None:
    with running_server([*command(tmp_path), "--shutdown-grace-s", "60"]) as server:
        video_id = create(server.url, seed=1)
        # Minutes, on any machine: it cannot be done before the server must end.
        queued = create(server.url, seed=2, size="128x128", num_frames=33, num_inference_steps=1000)
        wait_until(lambda: video(server.url, video_id)["progress"] >= 60, "most of the video")
        begin = time.monotonic()
    assert time.monotonic() - begin < 50, "it waited for a video that would not be done in time"
    with server_to_be_killed(tmp_path) as (server, kill):
        assert video(server.url, video_id)["status"] == "completed"
        assert video(server.url, queued)["status"] in ("queued", "in_progress")
        kill()


def test_a_second_server_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with running_server(command(tmp_path)) as server:
        second = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        [line] = second.stderr.strip().splitlines()
        assert str(tmp_path) in line and server.url in line and "--state-dir" in line
        assert server.answers("/health")
