"""Server-sent events over a real socket, from scripted_server's engine: what is sent, in which order, how it ends."""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from PIL import Image

from sglang.multimodal_gen.errors import QueueFull
from sglang.multimodal_gen.runtime.entrypoints.openai.patience import heartbeat_s
from sglang.multimodal_gen.runtime.managers.messages import EngineState
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    READY,
    RunningServer,
    Start,
    encoded_image,
    error_of,
    wait_for,
)

IMAGES, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    return start_server(heartbeat_s=0.2)


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    engine = shared_server.engine
    engine.held, engine.refusal, engine.state = False, None, READY
    for record in (engine.submitted, engine.cancelled, engine.watched):
        record.clear()
    yield shared_server
    engine.held = False


class Events:
    """The frames of a stream, as they come."""

    def __init__(self, reply: httpx.Response) -> None:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["transfer-encoding"] == "chunked" and "content-length" not in reply.headers
        self._lines = reply.iter_lines()
        self.news: list[dict[str, Any]] = []

    def skip_comments(self, number: int) -> None:
        """Read as many that only keep the connection, with nothing but comments."""
        lines = (line for line in self._lines if line)
        for _ in range(number):
            while (line := next(lines)) != ": keep-alive":
                self._hear(line)

    def _hear(self, line: str) -> None:
        assert line.startswith(": {"), line
        self.news.append(json.loads(line.removeprefix(": ")))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The content of each event, which must say the same type as its name; an error has no name."""
        name: str | None = None
        for line in self._lines:
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                content = json.loads(line.removeprefix("data: "))
                assert content.get("type") == name
                yield content
                name = None
            elif line not in ("", ": keep-alive"):
                self._hear(line)


def image_events(server: RunningServer, path: str = IMAGES, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "a red circle", "stream": True, **fields}
    with server.client.stream("POST", path, json=body) as reply:
        return list(Events(reply))


# --- images ---


def test_a_streamed_image_has_pictures_on_the_way_and_then_the_result(server: RunningServer) -> None:
    *partial, completed = image_events(server, partial_images=2, output_format="jpeg", seed=7, size="64x48")
    assert [event.pop("type") for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.pop("partial_image_index") for event in partial] == [0, 1]
    assert [base64.b64decode(event.pop("b64_json")) for event in partial] == [b"step 1", b"step 2"]
    steps = [[event.pop(name) for name in ("step", "total_steps", "eta_seconds")] for event in partial]
    assert steps == [[1, 4, 1.2], [2, 4, 1.2]]
    [params] = server.engine.submitted.values()
    assert (params.num_previews, params.return_encoded) == (2, True)
    assert completed.pop("type") == "image_generation.completed"
    assert base64.b64decode(completed.pop("b64_json")) == encoded_image(params)
    usage = completed.pop("usage")
    assert usage.keys() == {"input_tokens", "output_tokens", "total_tokens", "input_tokens_details"}
    assert usage["input_tokens_details"].keys() == {"image_tokens", "text_tokens"}
    assert (completed.pop("seed"), completed.pop("safety_identifier")) == (7, None)
    assert {completed.pop(name) is not None for name in ("generation_time", "notes")} == {True}
    assert [completed.pop(f"{name}_time_s") for name in ("queue", "inference")] == [0.25, 0.5]
    assert (completed.pop("peak_memory_mb"), completed.pop("computed_steps")) == (0.0, 3)
    for event in (*partial, completed):
        assert isinstance(event.pop("created_at"), int)
        assert event == {"size": "64x48", "quality": "auto", "background": "opaque", "output_format": "jpeg"}


def test_a_stream_without_partial_images_is_one_event(server: RunningServer) -> None:
    [completed] = image_events(server)
    assert (completed["type"], completed["size"]) == ("image_generation.completed", "128x96")
    assert [params.num_previews for params in server.engine.submitted.values()] == [0]


def test_an_edit_is_streamed_under_its_own_name(start_server: Start) -> None:
    server = start_server()
    inputs = msgspec.structs.replace(MODEL.limits.inputs, max_images=1)
    limits = msgspec.structs.replace(MODEL.limits, inputs=inputs)
    server.engine.state = EngineState(state="ready", model=msgspec.structs.replace(MODEL, limits=limits))
    wish = {"prompt": "a", "stream": "true", "partial_images": "1"}
    picture = ("a.png", png(), "image/png")
    with server.client.stream("POST", EDITS, data=wish, files={"image": picture}) as reply:
        events = list(Events(reply))
    assert [event["type"] for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="png")
    return buffer.getvalue()


def test_comments_keep_a_stream_alive_while_nothing_happens(server: RunningServer) -> None:
    server.engine.held = True
    with server.client.stream("POST", IMAGES, json={"prompt": "a", "stream": True}) as reply:
        events = Events(reply)
        events.skip_comments(2)
        server.engine.held = False
        assert [event["type"] for event in events] == ["image_generation.completed"]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_comments_come_within_the_clients_patience(start_server: Start, kind: str) -> None:
    """OpenAI's client says how long it waits for the next bytes: 15 s between comments were too long for this one."""
    server = start_server()
    server.engine.held = True
    headers = {"x-stainless-read-timeout": "0.6"}
    call: dict[str, Any] = {"method": "POST", "url": IMAGES, "json": {"prompt": "a", "stream": True}}
    if kind == "video":
        call = {"method": "GET", "url": f"{VIDEOS}/{created(server)}/events", "params": {"previews": "false"}}
    with server.client.stream(**call, headers=headers, timeout=3) as reply:
        comments = (line for line in reply.iter_lines() if line == ": keep-alive")
        assert next(comments) == next(comments)
        server.engine.held = False


@pytest.mark.parametrize(
    ("patience", "seconds"),
    [("600", 15.0), ("10", 10 / 3), ("0.001", 0.1), ("nan", 15.0), ("-1", 15.0), ("soon", 15.0), (None, 15.0)],
)
def test_a_heartbeat_is_a_third_of_the_clients_patience(patience: str | None, seconds: float) -> None:
    headers = {} if patience is None else {"x-stainless-read-timeout": patience}
    assert heartbeat_s(headers, 15.0) == pytest.approx(seconds)


def test_comments_tell_how_far_an_image_is(server: RunningServer) -> None:
    """The newest only: what is older than half a second is nobody's news."""
    server.engine.held = True
    with server.client.stream("POST", IMAGES, json={"prompt": "a", "stream": True}) as reply:
        events = Events(reply)
        events.skip_comments(4)
        assert events.news == [
            {"status": "in_progress", "progress": 50, "step": 2, "total_steps": 4, "eta_seconds": 1.2}
        ]
        [request_id] = server.engine.submitted
        server.call(lambda: [server.engine.wait_again(request_id, position) for position in (3, 2)])
        events.skip_comments(3)
        assert events.news[1:] == [{"status": "queued", "queue_position": 2, "eta_seconds": 9.0}]
        server.engine.held = False
        assert [event["type"] for event in events] == ["image_generation.completed"]


def test_an_error_before_the_first_event_is_an_ordinary_reply(server: RunningServer) -> None:
    server.engine.refusal = QueueFull(4)
    reply = server.post_image(stream=True, partial_images=1)
    assert error_of(reply, 429)["code"] == "queue_full" and reply.headers["x-should-retry"] == "true"
    server.engine.refusal = None
    assert error_of(server.post_image(stream=True, prompt="fail"), 500)["code"] == "out_of_memory"


def test_an_error_in_the_middle_is_the_last_frame(server: RunningServer) -> None:
    partial, failure = image_events(server, prompt="fail", partial_images=1)
    assert partial["type"] == "image_generation.partial_image"
    assert failure.keys() == {"error"} and failure["error"].keys() == {"message", "type", "param", "code"}
    assert (failure["error"]["code"], failure["error"]["type"]) == ("out_of_memory", "server_error")
    assert "/" not in failure["error"]["message"]


def test_a_client_that_goes_takes_its_image_along(server: RunningServer) -> None:
    server.engine.held = True
    with server.client.stream("POST", IMAGES, json={"prompt": "a", "stream": True, "partial_images": 1}) as reply:
        assert next(iter(Events(reply)))["type"] == "image_generation.partial_image"
        [request_id] = server.engine.submitted
    wait_for(lambda: server.engine.cancelled == [request_id], seconds=1.0)


def test_the_same_call_again_is_answered_with_the_result_alone(server: RunningServer) -> None:
    body, headers = {"prompt": "a", "stream": True, "partial_images": 1}, {"idempotency-key": "once"}
    streams = []
    for _ in range(2):
        with server.client.stream("POST", IMAGES, json=body, headers=headers) as reply:
            streams.append(list(Events(reply)))
    assert [[event["type"].partition(".")[2] for event in events] for events in streams] == [
        ["partial_image", "completed"], ["completed"],
    ]  # fmt: skip
    assert streams[0][-1] == streams[1][-1] and len(server.engine.submitted) == 1


def test_a_model_without_previews_streams_the_result_only(server: RunningServer) -> None:
    model = msgspec.structs.replace(MODEL, gives_previews=False)
    server.engine.state = EngineState(state="ready", model=model)
    error = error_of(server.post_image(stream=True, partial_images=1), 400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "partial_images")
    assert [event["type"] for event in image_events(server)] == ["image_generation.completed"]


def test_a_stopping_server_ends_its_streams_with_an_error(start_server: Start) -> None:
    server = start_server(shutdown_grace_s=1.0)
    server.engine.held = True
    with server.client.stream("POST", IMAGES, json={"prompt": "a", "stream": True, "partial_images": 1}) as reply:
        events = iter(Events(reply))
        next(events)
        server.stop()
        assert [event["error"]["code"] for event in events] == ["engine_stopped"]


# --- videos ---


def created(server: RunningServer, **fields: Any) -> str:
    reply = server.post_video(**fields)
    assert reply.status_code == 200, reply.text
    video_id: str = reply.json()["id"]
    return video_id


def test_a_videos_life_is_streamed_from_now_to_its_end(server: RunningServer) -> None:
    server.engine.held = True
    video_id = created(server)
    found: list[dict[str, Any]] = []
    with server.client.stream("GET", f"{VIDEOS}/{video_id}/events") as reply:
        for event in Events(reply):
            found.append(event)
            if event["type"] == "video.in_progress" and event["video"]["progress"] == 50:
                server.call(lambda: server.engine.show(video_id, 2))
            if event["type"] == "video.preview":
                server.engine.held = False
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    *_, progress, preview, completed = found
    assert (progress["video"]["id"], progress["video"]["eta_seconds"]) == (video_id, 1.2)
    del preview["sequence_number"]
    assert preview == {
        "type": "video.preview",
        "video_id": video_id,
        "step": 2,
        "total_steps": 4,
        "media_type": "image/webp",
        "b64_json": base64.b64encode(b"step 2").decode(),
    }
    assert (completed["type"], completed["video"]["queue_time_s"]) == ("video.completed", 0.25)
    assert completed["video"] == server.client.get(f"{VIDEOS}/{video_id}").json()
    wait_for(lambda: server.engine.watched == {video_id: False})


def test_a_finished_video_has_one_event(server: RunningServer) -> None:
    for prompt, kind in (("a", "video.completed"), ("fail", "video.failed")):
        video_id = created(server, prompt=prompt)
        wait_for(lambda id_=video_id: server.client.get(f"{VIDEOS}/{id_}").json()["status"] in ("completed", "failed"))
        with server.client.stream("GET", f"{VIDEOS}/{video_id}/events") as reply:
            [event] = Events(reply)
        assert (event["type"], event["sequence_number"]) == (kind, 0)
    assert event["video"]["error"]["code"] == "out_of_memory"


def test_previews_are_made_while_somebody_wants_them(server: RunningServer) -> None:
    server.engine.held = True
    video_id = created(server)
    url = f"{VIDEOS}/{video_id}/events"
    with server.client.stream("GET", url, params={"previews": "false"}) as blind:
        next(iter(Events(blind)))
        assert server.engine.watched == {}
        with httpx.Client(base_url=server.client.base_url) as other:
            with server.client.stream("GET", url) as first, other.stream("GET", url) as second:
                streams = [Events(reply) for reply in (first, second)]
                iterators = [iter(stream) for stream in streams]
                for iterator in iterators:
                    next(iterator)
                assert server.engine.watched == {video_id: True}
                server.call(lambda: server.engine.show(video_id, 3))
                for iterator in iterators:
                    assert next(e for e in iterator if e["type"] == "video.preview")["step"] == 3
                first.close()
                server.call(lambda: server.engine.show(video_id, 4))
                assert next(e for e in iterators[1] if e["type"] == "video.preview")["step"] == 4
                assert server.engine.watched == {video_id: True}, "one of the two still looks"
            wait_for(lambda: server.engine.watched == {video_id: False})
        server.engine.held = False
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")
    assert server.engine.cancelled == [], "who goes away changes nothing"


def test_a_video_that_is_deleted_ends_its_streams(server: RunningServer) -> None:
    server.engine.held = True
    video_id = created(server)
    with server.client.stream("GET", f"{VIDEOS}/{video_id}/events") as reply:
        events = iter(Events(reply))
        next(events)
        with httpx.Client(base_url=server.client.base_url) as other:
            assert other.delete(f"{VIDEOS}/{video_id}").json()["deleted"] is True
        *_, last = events
    assert (last["type"], last["video"]["error"]["code"]) == ("video.failed", "cancelled")


def test_a_watcher_that_does_not_read_holds_nobody_up(server: RunningServer) -> None:
    """Its socket takes a few hundred kilobytes; what comes beyond is forgotten, not kept."""
    server.engine.held = True
    video_id = created(server)
    with socket.create_connection(("127.0.0.1", server.port)) as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.sendall(f"GET {VIDEOS}/{video_id}/events HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        wait_for(lambda: server.engine.watched == {video_id: True})
        for step in range(2000):
            server.call(lambda number=step: server.engine.show(video_id, number))
        server.engine.held = False
        wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")
    wait_for(lambda: server.engine.watched == {video_id: False})


@pytest.mark.parametrize("video_id", ["video_" + "0" * 32, "nothing", "..%2F..%2Fx"])
def test_an_unknown_video_has_no_events(server: RunningServer, video_id: str) -> None:
    assert error_of(server.client.get(f"{VIDEOS}/{video_id}/events"), 404)["code"] == "video_not_found"


def test_a_bad_query_is_refused(server: RunningServer) -> None:
    video_id = created(server)
    for params, code in (({"previews": "some"}, "invalid_type"), ({"no_such": "1"}, "unknown_parameter")):
        assert error_of(server.client.get(f"{VIDEOS}/{video_id}/events", params=params), 400)["code"] == code
