"""How the server tells of itself, and how it ends: health, the small generation, /server_info, draining."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import socket
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from sglang.multimodal_gen.configs.model_info import AreaRule, InputLimits
from sglang.multimodal_gen.errors import QueueFull
from sglang.multimodal_gen.runtime.entrypoints.openai.lifecycle import Lifecycle
from sglang.multimodal_gen.runtime.managers.messages import EngineState
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    READY,
    SECRET_PATH,
    RunningServer,
    Start,
    error_of,
    wait_for,
)

ADMIN_KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    options = {"model_path": {"value": SECRET_PATH, "source": "flag"}}
    return start_server(admin_api_key=ADMIN_KEY, options=options, health_timeout_s=5.0)


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """The shared server with its engine reset."""
    engine = shared_server.engine
    engine.held, engine.refusal, engine.state = False, None, READY
    engine.submitted.clear()
    engine.cancelled.clear()
    return shared_server


# --- health ---


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (EngineState(state="starting"), "starting"),
        (EngineState(state="loading", detail=f"reading {SECRET_PATH}/a.safetensors"), "(reading …)"),
        (EngineState(state="recovering", model=MODEL), "a worker was lost and is being replaced"),
        (EngineState(state="reloading", model=MODEL, detail="new weights are loaded"), "new weights"),
        (EngineState(state="asleep", model=MODEL), "released its memory"),
        (EngineState(state="stopping", model=MODEL), "shutting down"),
        (EngineState(state="failed", detail=SECRET_PATH), "the engine has failed"),
    ],
)
def test_health_says_why_the_server_is_not_ready(server: RunningServer, state: EngineState, reason: str) -> None:
    server.engine.state = state
    reply = server.client.get("/health")
    body = reply.json()
    assert (reply.status_code, body["status"], body["state"]) == (503, "unavailable", state.state)
    assert reason in body["reason"] and SECRET_PATH not in reply.text
    assert reply.headers["x-request-id"]
    assert ("retry-after" in reply.headers) == (state.state != "failed")
    assert server.client.get("/liveness").status_code == 200


def test_a_server_without_its_memory_refuses_and_one_that_reloads_takes_requests(server: RunningServer) -> None:
    server.engine.state = EngineState(state="asleep", model=MODEL)
    for reply in (server.post_image(), server.post_video()):
        assert error_of(reply, 503)["code"] == "memory_released"
        assert reply.headers["x-should-retry"] == "false"
    server.engine.state = EngineState(state="reloading", model=MODEL)
    assert server.post_image().status_code == 200


# --- the small generation ---


def test_the_small_generation_is_small_and_leaves_nothing(server: RunningServer) -> None:
    reply = server.client.get("/health_generate")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "state": "ready", "inference_time_s": 0.5})
    [(request_id, params)] = server.engine.submitted.items()
    assert request_id.startswith("health_")
    assert (params.width, params.height, params.num_frames, params.num_inference_steps) == (64, 64, 1, 1)
    assert not (params.save_output or params.return_encoded or params.return_frames)
    assert params.output_type == "pixels", "every stage runs"


@pytest.mark.parametrize(("multiple", "max_pixels", "side"), [(16, 2**20, 64), (48, 2**20, 96), (128, 128 * 128, 128),
                                                              (16, 32 * 32, 16)])  # fmt: skip
def test_the_small_generation_is_of_a_size_that_the_model_has(
    server: RunningServer, multiple: int, max_pixels: int, side: int
) -> None:
    limits = msgspec.structs.replace(MODEL.limits, size_multiple=multiple, max_pixels=max_pixels)
    server.engine.state = EngineState(state="ready", model=msgspec.structs.replace(MODEL, limits=limits))
    assert server.client.get("/health_generate").status_code == 200
    [params] = server.engine.submitted.values()
    assert (params.width, params.height) == (side, side)


def test_the_small_generation_has_what_the_model_wants(server: RunningServer) -> None:
    inputs = InputLimits(min_images=2, max_images=3, requires_last_image=True, requires_video=True)
    limits = msgspec.structs.replace(MODEL.limits, inputs=inputs, area_rule=AreaRule(area=2**18, multiple=16))
    server.engine.state = EngineState(state="ready", model=msgspec.structs.replace(MODEL, limits=limits))
    assert server.client.get("/health_generate").status_code == 200
    [(request_id, params)] = server.engine.submitted.items()
    given = server.engine.inputs[request_id]
    assert [image.shape for image in given.images] == [(64, 64, 3)] * 2
    assert given.video is not None and given.video.frames.shape == (1, 64, 64, 3)
    assert given.last_image is not None and not np.any(given.last_image)
    assert (params.width, params.height) == (64, 64)


def test_those_who_ask_at_the_same_time_share_one_generation(server: RunningServer) -> None:
    server.engine.held = True
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        url = server.client.base_url.join("/health_generate")
        replies = [pool.submit(httpx.get, url, timeout=10) for _ in range(10)]
        wait_for(lambda: in_flight(server) == 11)  # and the request that asks for it
        server.engine.held = False
        assert {reply.result().status_code for reply in replies} == {200}
    assert len(server.engine.submitted) == 1
    assert server.client.get("/health_generate").status_code == 200
    assert len(server.engine.submitted) == 2, "who comes later asks anew"


def in_flight(server: RunningServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("sglang_diffusion_http_requests_in_flight"))


def test_one_who_goes_does_not_end_the_generation_of_the_others(server: RunningServer) -> None:
    server.engine.held = True
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with pytest.raises(httpx.ReadTimeout):
            server.client.get("/health_generate", timeout=0.3)
        other = pool.submit(server.client.get, "/health_generate")
        server.engine.held = False
        assert other.result().status_code == 200
    assert not server.engine.cancelled


def test_a_generation_that_hangs_or_fails_is_503(server: RunningServer, start_server: Start) -> None:
    server.engine.refusal = QueueFull(3)
    reply = server.client.get("/health_generate")
    assert (reply.status_code, reply.json()["status"]) == (503, "unavailable")
    assert reply.json()["error"]["code"] == "queue_full" and reply.headers["retry-after"]
    server.engine.refusal, server.engine.state = None, EngineState(state="loading")
    assert server.client.get("/health_generate").json()["error"]["code"] == "not_ready"
    slow = start_server(health_timeout_s=0.2)
    slow.engine.held = True
    reply = slow.client.get("/health_generate")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "probe_timed_out")
    assert slow.engine.cancelled == list(slow.engine.submitted)


# --- /server_info ---


def test_server_info_tells_users_nothing_of_the_machine(server: RunningServer) -> None:
    reply = server.client.get("/server_info")
    info = reply.json()
    assert (info["served_model_name"], info["state"]) == ("tiny", "ready")
    assert [info[name] for name in ("model_path", "tp_size", "dp_size")] == ["tiny", 1, 1] and "version" not in info
    assert info["queue"] == {"queued": 1, "running": 2} and info["workers"]["count"] == 1
    assert info["memory"] == {"budget_bytes": 1000, "reserved_bytes": 10, "allocated_bytes": None}
    assert info["model"]["names"] == ["tiny", "org/tiny"] and info["model"]["limits"]["size_multiple"] == 16
    assert info["limits"]["max_body_bytes"] == 2**20 and info["uptime_s"] >= 0
    assert "options" not in info and "versions" not in info and "4711" not in reply.text
    assert SECRET_PATH not in reply.text


def test_server_info_tells_the_administrator_the_options_and_versions(server: RunningServer) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    info = server.client.get("/server_info", headers=headers).json()
    assert info["options"] == {"model_path": {"value": SECRET_PATH, "source": "flag"}}
    assert info["versions"].keys() >= {"python", "fastapi", "uvicorn"}
    assert info["model_path"] == SECRET_PATH and info["version"] == info["versions"].get("sglang-diffusion")
    for path in ("/model_info", "/v1/model_info"):
        assert server.client.get(path, headers=headers).json()["model_path"] == SECRET_PATH


def test_gateways_are_told_what_kind_of_model_it_is(server: RunningServer) -> None:
    known = {"model_path": "tiny", "is_generation": True, "model_type": "diffusion", "has_audio_understanding": False}
    assert server.client.get("/model_info").json() == known | {
        "architectures": ["WanPipeline"], "has_image_understanding": False, "task_type": "text-to-video",
        "supported_task_types": ["text-to-video"], "output_types": ["video"], "is_image_gen": False,
    }  # fmt: skip
    assert server.client.get("/v1/model_info").json() == {"model_path": "tiny"}
    assert server.client.get("/models").json() == server.client.get("/v1/models").json()
    server.engine.state = EngineState(state="loading")
    loading = server.client.get("/model_info").json()
    assert (loading["architectures"], loading["task_type"], loading["output_types"]) == (None, None, [])


def test_server_info_answers_while_there_is_no_model_and_no_scheduler(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone() -> None:
        raise QueueFull(1)

    server.engine.state = EngineState(state="loading")
    monkeypatch.setattr(server.engine, "status", gone)
    info = server.client.get("/server_info").json()
    assert (info["model"], info["queue"], info["memory"], info["workers"]) == (None, None, None, None)


# --- draining ---


def test_a_draining_server_ends_what_runs_and_takes_nothing_new(start_server: Start) -> None:
    server = start_server(shutdown_grace_s=30.0)
    server.engine.held = True
    video = server.post_video().json()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post_image)
        wait_for(lambda: len(server.engine.submitted) == 2)
        with httpx.Client(base_url=server.client.base_url) as client:  # a new connection: it still listens
            assert client.get("/health").status_code == 200
            server.stop()
            wait_for(lambda: client.get("/health").status_code == 503)
            health = client.get("/health").json()
            assert health["state"] == "draining" and "shutting down" in health["reason"]
            for path in ("/v1/images/generations", "/v1/videos"):
                reply = client.post(path, json={"prompt": "a"})
                assert error_of(reply, 503)["code"] == "server_draining"
                assert reply.headers["x-should-retry"] == "true" and int(reply.headers["retry-after"]) > 0
            assert client.get("/liveness").status_code == 200
            assert client.get(f"/v1/videos/{video['id']}").status_code == 200, "reads go on"
            assert not running.done()
            server.engine.held = False
            assert running.result().status_code == 200
    wait_for(lambda: refuses(server.port))


def refuses(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


def test_the_hooks_of_a_drain_are_waited_for_and_one_that_fails_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[float | str] = []

    async def jobs(seconds: float) -> None:
        await asyncio.sleep(0.01)
        seen.append(seconds)

    async def broken(seconds: float) -> None:
        raise RuntimeError("no such job")

    async def endless(seconds: float) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append("cancelled")

    async def drain() -> None:
        lifecycle = Lifecycle()
        lifecycle.on_drain += [jobs, broken]
        await lifecycle.drain(20.0)
        assert lifecycle.draining and seen == [20.0]
        lifecycle.on_drain = [endless]
        await lifecycle.drain(0.05)

    asyncio.run(drain())
    assert "could not be brought to its end" in caplog.text
    assert seen == [20.0, "cancelled"]


def test_a_drain_waits_for_requests_and_not_longer_than_it_may() -> None:
    async def drain() -> None:
        lifecycle = Lifecycle()
        lifecycle.begin()
        draining = asyncio.create_task(lifecycle.drain(20.0))
        await asyncio.sleep(0.01)
        assert lifecycle.draining and not draining.done()
        lifecycle.end()
        await draining
        lifecycle.begin()
        await lifecycle.drain(0.01)

    asyncio.run(drain())


# --- many and idle connections ---


def test_idle_connections_do_not_hold_up_the_others(start_server: Start) -> None:
    server = start_server(header_timeout_s=2.0)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2000)]
    try:
        for connection in idle[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert server.client.get("/health").status_code == 200
        assert server.post_image().status_code == 200
        for connection in idle:
            connection.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b"", "closed at the deadline"
    finally:
        for connection in idle:
            connection.close()
    # In a connection of its own: the client's may be closed at the moment that it is used, after the same two seconds.
    assert server.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_one_address_holds_so_many_connections(start_server: Start) -> None:
    server = start_server(max_connections_per_ip=3)
    head = b"GET /liveness HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    try:
        answer, _, body = server.exchange(b"").partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 429 ") and b"x-request-id: req_" in answer and b"retry-after" in answer
        assert json.loads(body)["error"]["code"] == "too_many_connections"
    finally:
        for connection in held:
            connection.close()
    wait_for(lambda: server.exchange(head).startswith(b"HTTP/1.1 200 "))


def test_a_long_head_is_refused_at_the_cap(start_server: Start) -> None:
    server = start_server(max_header_bytes=4096)
    for size, statuses in ((2000, (b"200",)), (8000, (b"431",)), (1_000_000, (b"431", b"400"))):
        head = b"GET /liveness HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Long: " + b"a" * size + b"\r\n\r\n"
        answer = server.exchange(head)
        assert answer.split(b" ")[1] in statuses and b"x-request-id: req_" in answer
    error = error_of(server.client.get("/v1/models", headers={"x-long": "a" * 5000}), 431)
    assert error["code"] == "head_too_large"


def test_a_body_that_nobody_reads_any_more_ends(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A client that goes on sending, slowly, after it was answered."""
    server = start_server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = b"POST /no/such/route HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")
        with pytest.raises((ConnectionResetError, BrokenPipeError, AssertionError)):
            for _ in range(200):
                connection.sendall(b"x")
                connection.settimeout(0.1)
                try:
                    assert connection.recv(1) != b"", "it was closed"
                except TimeoutError:
                    continue
            pytest.fail("the connection is still open")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def everything_public(server: RunningServer) -> list[Any]:
    return [server.client.get(path) for path in ("/server_info", "/v1/models", "/health", "/openapi.json")]


def test_public_replies_name_no_place_of_the_machine(server: RunningServer) -> None:
    for reply in everything_public(server):
        assert not [place for place in ("/home/", "/tmp/", "/root/", "/usr/") if place in reply.text]
