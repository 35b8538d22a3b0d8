"""Bad input by the rows of the table that the project keeps: each case's id begins with its row.

Rows with tests of their own elsewhere: B19 to B21 and B23 (files) in test_http_inputs.py and test_media_inputs.py, B27
and B28 (content, lists) and B30 (idempotency) in test_http_api.py, B31 (keys) in test_http_access.py, B33 (slow and
idle connections) in test_http_state.py and test_http_api.py.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from sglang.multimodal_gen.test.scripted_server import READY, RunningServer, Start, error_of, servers, wait_for

IMAGES, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
GENERATING = (IMAGES, VIDEOS)
JSON = "application/json"
FORM = "multipart/form-data; boundary=x"
CUT_FORM = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'
UNKNOWN_VIDEO = f"{VIDEOS}/video_{'0' * 32}"


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with servers(lambda: tmp_path_factory.mktemp("files")) as start:
        yield start


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    return start_server()


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """The shared server with its engine reset."""
    shared_server.engine.held, shared_server.engine.state = False, READY
    shared_server.engine.submitted.clear()
    return shared_server


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A request, and what it must be answered with."""

    row: str
    what: str
    status: int
    code: str
    param: str | None = None
    method: str = "POST"
    path: str = IMAGES
    content: bytes | None = None
    content_type: str | None = JSON

    @property
    def id(self) -> str:
        return f"{self.row} {self.what} {self.path}"


def field(row: str, name: str, value: Any, code: str, *, param: str | None = None, path: str = IMAGES) -> Bad:
    """A JSON body with one bad field."""
    content = json.dumps({"prompt": "a red circle", name: value}).encode()
    what = f"{name}={str(value)[:20]!r}"
    return Bad(row=row, what=what, status=400, code=code, param=param or name, path=path, content=content)


def body(row: str, what: str, content: bytes, status: int, code: str, **options: Any) -> Bad:
    """A whole body that is bad."""
    return Bad(row=row, what=what, content=content, status=status, code=code, **options)


def get(row: str, what: str, path: str, status: int, code: str, param: str | None, method: str = "GET") -> Bad:
    """A request without a body."""
    return Bad(row=row, what=what, method=method, path=path, status=status, code=code, param=param, content_type=None)


CASES = [
    *(body("B1", what, content, 400, "invalid_json", path=path) for path in GENERATING for what, content in (
        ("cut", b'{"prompt": '), ("list", b"[1]"), ("empty", b""), ("not UTF-8", b"\xff\xfe"),
        ("deep", b"[" * 100_000), ("deep object", b'{"a":' * 100_000), ("two", b"{} {}"), ("NaN key", b"{NaN: 1}"))),
    *(body("B2", "text", b'{"prompt": "a"}', 415, "unsupported_media_type", path=path, content_type="text/plain")
      for path in (*GENERATING, EDITS)),
    body("B2", "no boundary", b"--x--\r\n", 400, "invalid_multipart", path=VIDEOS, content_type="multipart/form-data"),
    *(body("B2", "truncated", CUT_FORM, 400, "invalid_multipart", path=path, content_type=FORM)
      for path in (VIDEOS, EDITS)),
    *(body("B3", "twice", b'{"prompt": "a", "seed": 1, "seed": 1}', 400, "duplicate_parameter", param="seed", path=path)
      for path in GENERATING),
    *(body("B4", "missing", b"{}", 400, "missing_required_parameter", param="prompt", path=path)
      for path in GENERATING),
    *(field("B4", "prompt", value, code, path=path) for path in GENERATING for value, code in (
        (None, "missing_required_parameter"), (5, "invalid_type"), ({}, "invalid_type"), ("", "empty_prompt"),
        (" \t\n", "empty_prompt"))),
    *(field("B5", "prompt", value, code, path=path) for path in GENERATING for value, code in (
        ("a" * 32_001, "string_above_max_length"), ("\ud800", "invalid_unicode"), ("a\0", "invalid_unicode"))),
    *(field("B6", "size", size, "invalid_size", path=path) for path in GENERATING for size in (
        "-64x64", "0x64", "64", "axb", "64x64x64", " 64 x 64 ", [64, 64])),
    *(field("B7", "size", "65x67", "invalid_size", path=path) for path in GENERATING),
    *(field("B8", name, value, "size_above_maximum", path=path) for path in GENERATING for name, value in (
        ("size", "99999x99999"), ("width", 10**9), ("height", 10**400))),
    *(field("B10", "n", n, "invalid_n") for n in (0, -1, 11, 1e12, 1.5, "2", True)),
    *(field("B11", "num_inference_steps", steps, "invalid_steps", path=path) for path in GENERATING
      for steps in (0, -1, 10**9, 1.5)),
    *(field("B12", name, value, code, path=path) for path in GENERATING for name in ("guidance_scale", "flow_shift")
      for value, code in ((float("nan"), "number_not_finite"), (float("inf"), "number_not_finite"),
                          (-1, "out_of_range"), (1e308, "out_of_range"))),
    *(field("B13", "seed", seed, "invalid_seed", path=path) for path in GENERATING for seed in (-1, 2**64, 1e30, [],
                                                                                                True)),
    *(body("B14", "unknown", b'{"prompt": "a", "model": "no-such"}', 404, "model_not_found", param="model", path=path)
      for path in GENERATING),
    *(field("B14", "model", 3, "invalid_type", path=path) for path in GENERATING),
    *(field("B15", "no_such_field", 1, "unknown_parameter", path=path) for path in GENERATING),
    *(field("B16", name, value, "invalid_value") for name, value in (
        ("output_format", "tiff"), ("background", "bogus"), ("response_format", "xml"))),
    body("B16", "quality", b'{"prompt": "a", "quality": "bogus"}', 400, "invalid_value", param="quality"),
    *(body("B16", str(number), b'{"prompt": "a", "output_format": "jpeg", "output_compression": %d}' % number, 400,
           "invalid_value", param="output_compression") for number in (101, -5)),
    field("B16", "output_compression", 50, "incompatible_parameters"),
    field("B17", "partial_images", 4, "invalid_value"),
    *(field("B18", name, "/tmp/x", "unknown_parameter", path=path) for path in GENERATING for name in (
        "output_path", "perf_dump_path", "file_path", "video_path", "upscaling_model_path", "diffusers_kwargs",
        "attention_backend_override")),
    *(field("B22", "input_reference", url, "url_not_allowed", path=VIDEOS) for url in (
        "http://127.0.0.1:1/a.png", "https://[::1]/a.png", "http://169.254.0.1/", "http://10.0.0.1/a.png",
        "file:///etc/hostname", "http://2130706433/", "http://ok\\@127.0.0.1/", "ftp://example.com/a.png")),
    *(field("B24", "seconds", seconds, "invalid_seconds", path=VIDEOS) for seconds in ("abc", "-4", "0", "1e9")),
    *(field("B24", "fps", fps, "invalid_fps", path=VIDEOS) for fps in (0, 10**9)),
    field("B24", "num_frames", 10**9, "invalid_num_frames", path=VIDEOS),
    body("B25", "input_reference", b'{"prompt": "a", "input_reference": "data:image/png;base64,aaaa"}', 400,
         "unsupported_parameter", param="input_reference", path=VIDEOS),
    *(get("B26", f"{method} {what}", f"{VIDEOS}/{video_id}{rest}", 404, "video_not_found", "video_id", method)
      for what, video_id in (("unknown", "video_" + "0" * 32), ("dots", "..%2F..%2Fx"), ("10 kB", "v" * 10_000))
      for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/content"))),
    get("B27", "variant", f"{UNKNOWN_VIDEO}/content?variant=bogus", 400, "invalid_variant", "variant"),
    *(get("B28", query, f"{VIDEOS}?{query}", 400, code, param) for query, code, param in (
        ("limit=-1", "out_of_range", "limit"), ("limit=101", "out_of_range", "limit"),
        ("limit=abc", "invalid_type", "limit"), ("order=bad", "invalid_value", "order"),
        ("after=video_none", "invalid_cursor", "after"))),
    get("B29", "unknown", UNKNOWN_VIDEO, 404, "video_not_found", "video_id", "DELETE"),
    get("B31", "route", "/v2/images", 404, "not_found", None),
    get("B31", "method", IMAGES, 405, "method_not_allowed", None, "PUT"),
    get("B31", "method", "/server_info", 405, "method_not_allowed", None, "DELETE"),
    body("B32", "1.2 MB", b'{"prompt": "' + b"a" * 1_200_000 + b'"}', 413, "body_too_large"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_input_is_refused_at_the_door(server: RunningServer, case: Bad) -> None:
    headers = {} if case.content_type is None else {"content-type": case.content_type}
    reply = server.client.request(case.method, case.path, content=case.content, headers=headers)
    error = error_of(reply, case.status)
    assert (error["code"], error["param"]) == (case.code, case.param), error["message"]
    assert not server.engine.submitted, "the engine does not hear of it"
    assert "x-should-retry" not in reply.headers, "no client repeats a 4xx of these"
    if case.status == 405:
        assert reply.headers["allow"]


@pytest.mark.parametrize("fields", [{}, {"size": "auto"}, {"size": None}], ids=["B9 absent", "B9 auto", "B9 null"])
@pytest.mark.parametrize("path", GENERATING)
def test_a_size_that_is_left_to_the_model_is_told(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    reply = server.client.post(path, json={"prompt": "a", **fields})
    assert (reply.status_code, reply.json()["size"]) == (200, "128x96")


def test_b22_nothing_is_fetched(server: RunningServer) -> None:
    """A server of ours waits at the address, and nobody comes."""
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.3)
        url = f"http://127.0.0.1:{canary.getsockname()[1]}/a.png"
        replies = [
            server.client.post(VIDEOS, json={"prompt": "a", "input_reference": url}),
            server.client.post(EDITS, json={"prompt": "a", "image": url}),
            server.client.post(EDITS, json={"prompt": "a", "images": [{"image_url": url}]}),
        ]
        assert [error_of(reply, 400)["code"] for reply in replies] == ["url_not_allowed"] * 3
        with pytest.raises(TimeoutError):
            canary.accept()


def test_b29_a_deleted_video_is_gone(server: RunningServer) -> None:
    server.engine.held = True
    video_id = server.post_video().json()["id"]
    reply = server.client.delete(f"{VIDEOS}/{video_id}")
    assert reply.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
    assert error_of(server.client.delete(f"{VIDEOS}/{video_id}"), 404)["code"] == "video_not_found"
    wait_for(lambda: video_id in server.engine.cancelled)


@pytest.mark.parametrize("with_length", [True, False], ids=["B32 with a length", "B32 in chunks"])
def test_a_body_over_the_cap_is_cut(server: RunningServer, with_length: bool) -> None:
    content = b'{"prompt": "' + b"a" * 4_000_000 + b'"}'
    chunks = content if with_length else (content[at : at + 65_536] for at in range(0, len(content), 65_536))
    reply = server.client.post(IMAGES, content=chunks, headers={"content-type": JSON})
    assert error_of(reply, 413)["code"] == "body_too_large"
    assert server.post_image().status_code == 200, "the connection and the server go on"


def test_b27_a_range_of_10_000_parts_is_more_than_a_head_may_hold(server: RunningServer) -> None:
    many = "bytes=" + ",".join(f"{at}-{at}" for at in range(10_000))
    reply = server.client.get(f"{UNKNOWN_VIDEO}/content", headers={"range": many})
    assert error_of(reply, 431)["code"] == "head_too_large"


def test_b32_two_statements_of_the_length_are_refused(server: RunningServer) -> None:
    for lengths in (
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        b"Content-Length: 2\r\nContent-Length: 3\r\n",
        b"Transfer-Encoding: gzip\r\n",
    ):
        head = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lengths + b"\r\n"
        answer, _, content = server.exchange(head + b"0\r\n\r\n", timeout_s=20).partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ") and b"x-request-id: req_" in answer
        assert json.loads(content)["error"]["code"] == "invalid_http"


def test_every_reply_has_an_id(server: RunningServer) -> None:
    for method, path in (
        ("GET", "/liveness"),
        ("GET", "/no"),
        ("PUT", "/health"),
        ("POST", IMAGES),
        ("OPTIONS", VIDEOS),
    ):
        reply: httpx.Response = server.client.request(method, path, headers={"x-request-id": "mine-7"})
        assert reply.headers["x-request-id"] == "mine-7"
        assert server.client.request(method, path).headers["x-request-id"].startswith("req_")
