"""Over HTTP: priorities and deadlines, what is refused, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from sglang.multimodal_gen.errors import DeadlineExceeded, QueueFull
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.entrypoints.engine_client import EngineClient
from sglang.multimodal_gen.runtime.entrypoints.http_server import create_app, serve
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.patience import client_deadline_s
from sglang.multimodal_gen.runtime.managers.messages import Status
from sglang.multimodal_gen.runtime.managers.state_dir import StateDir
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.scripted_server import RunningServer, Start, error_of, servers, wait_for

null_family.register()
IMAGES = "/v1/images/generations"
VIDEOS = "/v1/videos"
MOST_QUEUED = 64


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with servers(lambda: tmp_path_factory.mktemp("files")) as start:
        yield start


@pytest.fixture
def server(start_server: Start) -> RunningServer:
    return start_server()


# --- fields and headers ---


def test_the_client_s_patience_is_the_deadline_of_pictures_that_have_none(server: RunningServer) -> None:
    patience = {"x-stainless-read-timeout": "600"}
    server.client.post(IMAGES, json={"prompt": "a"}, headers=patience)
    server.client.post(IMAGES, json={"prompt": "b", "deadline_s": 7, "priority": 2}, headers=patience)
    server.client.post(IMAGES, json={"prompt": "c"})
    server.client.post("/v1/videos", json={"prompt": "d"}, headers=patience)
    found = {p.prompt: (p.deadline_s, p.priority) for p in server.engine.submitted.values()}
    assert found == {"a": (600.0, 0), "b": (7.0, 2), "c": (None, 0), "d": (None, 0)}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("600", 600.0), ("0.5", 0.5), ("1e30", 604_800.0), ("0", None), ("-1", None), ("nan", None), ("inf", None),
     ("None", None), ("", None)],
)  # fmt: skip
def test_what_a_client_may_say_of_its_patience(text: str, seconds: float | None) -> None:
    assert client_deadline_s({"x-stainless-read-timeout": text}) == seconds
    assert client_deadline_s({}) is None


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("priority", 3, "out_of_range"),
        ("priority", 1.5, "invalid_type"),
        ("deadline_s", 0, "out_of_range"),
        ("deadline_s", "soon", "invalid_type"),
    ],
)
def test_bad_values_are_refused(server: RunningServer, field: str, value: Any, code: str) -> None:
    for path in (IMAGES, "/v1/videos"):
        error = error_of(server.client.post(path, json={"prompt": "a", field: value}), 400)
        assert (error["code"], error["param"]) == (code, field)


def test_a_missed_deadline_answers_504_which_no_client_tries_again(server: RunningServer) -> None:
    server.engine.refusal = DeadlineExceeded(2.5)
    for reply in (server.post_image(), server.post_video()):
        error = error_of(reply, 504)
        assert (error["code"], error["param"]) == ("deadline_exceeded", "deadline_s")
        assert reply.headers["x-should-retry"] == "false" and "retry-after" not in reply.headers


def test_a_full_queue_says_when_there_is_room(server: RunningServer) -> None:
    server.engine.refusal = QueueFull(7, retry_after_s=41)
    for reply in (server.post_image(), server.post_video()):
        assert error_of(reply, 429)["code"] == "queue_full"
        assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("41", "true")


def test_more_work_than_the_server_takes_is_refused_on_every_route(server: RunningServer) -> None:
    model = server.engine.state.model
    assert model is not None
    limits = msgspec.structs.replace(model.limits, max_cost=128 * 96 * 4)
    limited = msgspec.structs.replace(model, limits=limits)
    server.engine.state = msgspec.structs.replace(server.engine.state, model=limited)
    assert server.post_image().status_code == 200
    for fields in ({"n": 2}, {"num_outputs_per_prompt": 2}, {"num_inference_steps": 5}, {"size": "128x128"},
                   {"width": 144, "height": 96}, {"seed": [1, 2]}):  # fmt: skip
        error = error_of(server.post_image(**fields), 400)
        assert error["code"] == "cost_above_maximum", fields
        assert "num_inference_steps" in error["message"] and "49152" in error["message"]
    for fields in ({}, {"num_frames": 5}, {"seconds": "1"}):
        assert error_of(server.post_video(**fields), 400)["code"] == "cost_above_maximum"
    assert server.post_video(num_frames=1).status_code == 200


def test_urgency_is_no_part_of_what_a_key_stands_for(server: RunningServer) -> None:
    headers = {"idempotency-key": "k"}
    first = server.client.post(IMAGES, json={"prompt": "a"}, headers=headers)
    again = server.client.post(IMAGES, json={"prompt": "a", "priority": 2, "deadline_s": 60}, headers=headers)
    assert first.text == again.text and len(server.engine.submitted) == 1


# --- clients that go away ---


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("null-model", batching_max_size=1, max_queued_requests=MOST_QUEUED) as generator:
        yield generator


@dataclasses.dataclass
class Front:
    """An HTTP server before a real engine."""

    port: int
    engine: DiffGenerator

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def status(self) -> Status:
        return self.engine.status()

    @contextlib.contextmanager
    def posted(self, prompt: str, *, cut_to: int | None = None, **fields: Any) -> Iterator[socket.socket]:
        """A connection on which an image was asked for; leaving closes it."""
        body = json.dumps({"prompt": prompt, **fields}).encode()
        lines = [f"POST {IMAGES} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
        head = "\r\n".join([*lines, "", ""])
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + body[:cut_to])
            yield connection


@pytest.fixture(scope="module")
def front(engine: DiffGenerator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    settings = HttpSettings(model_names=("null",), state=StateDir(tmp_path_factory.mktemp("state")))
    sock = socket.create_server(("127.0.0.1", 0))
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        client = EngineClient(str(engine._engine.client.run_dir.base), name="http")
        await client.start()
        await client.wait_ready()
        await serve(create_app(client, settings), sock, stop=stop, settings=settings)
        await client.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    port = sock.getsockname()[1]
    wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200, seconds=60)
    yield Front(port, engine)
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


def assert_nothing_is_left(front: Front, *, running: int = 0) -> None:
    """Soon, no request but those of others is there, and no tick runs any more."""
    wait_for(lambda: (s := front.status()).num_queued == 0 and s.num_running == running, seconds=20)
    if not running:
        ticks = front.status().ticks
        time.sleep(0.2)
        status = front.status()
        assert (status.ticks, status.reserved_bytes) == (ticks, 0)
        wait_for(lambda: front.status().ledger_files == 0, seconds=20)


def test_a_client_that_goes_during_a_step_takes_its_request_along(front: Front) -> None:
    with front.posted("sleep-20", num_inference_steps=1000):
        wait_for(lambda: front.status().num_running == 1, seconds=20)
        before = front.status().ticks
        wait_for(lambda: front.status().ticks > before + 2, seconds=20)
    assert_nothing_is_left(front)


def test_a_client_that_goes_while_it_waits_takes_its_request_along_and_no_other(front: Front) -> None:
    results: list[Any] = []
    wish = {"prompt": "sleep-20", "num_frames": 1, "num_inference_steps": 60, "num_outputs_per_prompt": 3,
            "return_frames": True, "seed": 4}  # fmt: skip
    others = threading.Thread(target=lambda: results.extend(front.engine.generate(wish)))  # type: ignore[arg-type]
    others.start()
    wait_for(lambda: front.status().num_queued == 1, seconds=20)
    with front.posted("sleep-20", num_inference_steps=60):
        wait_for(lambda: front.status().num_queued == 2, seconds=20)
    wait_for(lambda: front.status().num_queued <= 1, seconds=20)
    others.join(60)
    assert len(results) == 3 and all(isinstance(result, GenerationResult) for result in results)
    assert_nothing_is_left(front)


def test_a_client_that_goes_while_its_frames_are_decoded_leaves_no_result(front: Front, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    with front.posted(f"noise-until-{go_on}"):
        before = front.status().ticks
        wait_for(lambda: front.status().ticks >= before + 2 and front.status().num_running == 1, seconds=20)
        time.sleep(0.3)
    wait_for(lambda: front.status().num_running == 0, seconds=20)
    go_on.touch()
    assert_nothing_is_left(front)


def test_a_client_that_goes_while_it_sends_starts_nothing(front: Front) -> None:
    before = front.status().ticks
    with front.posted("sleep-20 " + "x" * 10_000, cut_to=5000):
        time.sleep(0.2)
    assert_nothing_is_left(front)
    assert front.status().ticks == before


def test_a_client_whose_patience_ends_gets_its_answer_in_time(front: Front) -> None:
    reply = httpx.post(
        f"http://127.0.0.1:{front.port}{IMAGES}",
        json={"prompt": "sleep-20", "num_inference_steps": 1000},
        headers={"x-stainless-read-timeout": "0.4"},
        timeout=30,
    )
    assert error_of(reply, 504)["code"] == "deadline_exceeded"
    assert_nothing_is_left(front)


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_ends_nothing_early_and_nothing_late(
    front: Front, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Of the front end's process; the scheduler's deadlines are of the monotonic clock."""
    video = httpx.post(f"{front.url}{VIDEOS}", json={"prompt": "sleep-20", "deadline_s": 60, "num_frames": 5}).json()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    reply = httpx.post(
        f"{front.url}{IMAGES}", json={"prompt": "sleep-20", "num_inference_steps": 1000, "deadline_s": 0.4}, timeout=30
    )
    assert error_of(reply, 504)["code"] == "deadline_exceeded"
    wait_for(lambda: httpx.get(f"{front.url}{VIDEOS}/{video['id']}").json()["status"] == "completed", seconds=30)
    assert httpx.get(f"{front.url}{VIDEOS}/{video['id']}/content").status_code == 200
    assert_nothing_is_left(front)


def test_hundreds_at_once_are_answered_with_an_image_or_with_429(front: Front) -> None:
    async def post_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}", timeout=120, limits=limits) as client:
            posts = [client.post(IMAGES, json={"prompt": "sleep-5", "num_inference_steps": 1}) for _ in range(300)]
            return list(await asyncio.gather(*posts))

    replies = asyncio.run(post_all())
    refused = [reply for reply in replies if reply.status_code == 429]
    made = [reply for reply in replies if reply.status_code == 200]
    assert len(made) + len(refused) == 300 and len(made) >= MOST_QUEUED and refused
    for reply in refused:
        assert error_of(reply, 429)["code"] == "queue_full"
        assert 1 <= int(reply.headers["retry-after"]) <= 120
    assert_nothing_is_left(front)


# --- workers that die ---


def test_an_image_whose_worker_dies_is_made_again(front: Front, tmp_path: Path) -> None:
    restarts = front.status().num_worker_restarts
    reply = httpx.post(f"{front.url}{IMAGES}", json={"prompt": f"die-once-{tmp_path / 'died'}"}, timeout=60)
    assert (reply.status_code, len(reply.json()["data"])) == (200, 1), reply.text
    assert front.status().num_worker_restarts == restarts + 1


def test_a_video_whose_worker_dies_goes_on_and_counts_its_attempts(front: Front, tmp_path: Path) -> None:
    body = {"prompt": f"die-once-{tmp_path / 'died'}", "num_frames": 5}
    video = httpx.post(f"{front.url}{VIDEOS}", json=body, timeout=30).json()
    seen = [video]

    def completed() -> bool:
        seen.append(httpx.get(f"{front.url}{VIDEOS}/{video['id']}", timeout=30).json())
        return seen[-1]["status"] == "completed"

    wait_for(completed, seconds=60)
    assert {each["status"] for each in seen} <= {"queued", "in_progress", "completed"}
    assert seen[-1]["attempts"] == 2


def test_an_image_that_kills_every_worker_fails_for_good_and_others_do_not(front: Front) -> None:
    reply = httpx.post(f"{front.url}{IMAGES}", json={"prompt": "die"}, timeout=60)
    assert error_of(reply, 500)["code"] == "poison_request"
    assert reply.headers["x-should-retry"] == "false"
    assert httpx.post(f"{front.url}{IMAGES}", json={"prompt": "x"}, timeout=60).status_code == 200
    assert_nothing_is_left(front)
