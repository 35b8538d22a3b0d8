"""The HTTP routes against a scripted engine: every bad input's status, code and parameter, and the happy paths.

The server is real; the engine is scripted_server's.
"""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import logging
import re
import socket
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.errors import NotAModel, QueueFull
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import JobSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import BodyLimits
from sglang.multimodal_gen.runtime.managers.messages import EngineState
from sglang.multimodal_gen.runtime.server_args import ModelArgs, model_names
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    READY,
    SECRET_PATH,
    RunningServer,
    Start,
    error_of,
    wait_for,
)


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    """One server for the tests that leave it as it was."""
    return start_server()


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """The shared server with its engine reset."""
    shared_server.engine.held = False
    shared_server.engine.refusal = None
    shared_server.engine.state = READY
    shared_server.engine.submitted.clear()
    shared_server.engine.cancelled.clear()
    return shared_server


def assert_error(reply: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """The whole error contract of one reply."""
    error = error_of(reply, status)
    assert (error["code"], error["param"]) == (code, param), error["message"]


IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos"
BIG = 10**400

BAD_FIELDS = [
    # B4, B5: the prompt
    (IMAGES, {"prompt": None}, "missing_required_parameter", "prompt"),
    (IMAGES, {"prompt": 5}, "invalid_type", "prompt"),
    (IMAGES, {"prompt": ""}, "empty_prompt", "prompt"),
    (IMAGES, {"prompt": " \n "}, "empty_prompt", "prompt"),
    (IMAGES, {"prompt": ["a", "b"]}, "invalid_type", "prompt"),
    (IMAGES, {"prompt": "a" * 32_001}, "string_above_max_length", "prompt"),
    (IMAGES, {"prompt": "\ud800"}, "invalid_unicode", "prompt"),
    (IMAGES, {"prompt": "a\0b"}, "invalid_unicode", "prompt"),
    (VIDEOS, {"prompt": None}, "missing_required_parameter", "prompt"),
    (VIDEOS, {"prompt": "  "}, "empty_prompt", "prompt"),
    # B6, B7, B8: sizes
    *((IMAGES, {"size": size}, "invalid_size", "size")
      for size in ("-64x64", "0x64", "64", "axb", "64x64x64", " 64 x 64 ", [64, 64], 64, "", "64X64")),
    (IMAGES, {"size": "65x67"}, "invalid_size", "size"),
    (VIDEOS, {"size": "65x67"}, "invalid_size", "size"),
    (IMAGES, {"size": "99999x99999"}, "size_above_maximum", "size"),
    (IMAGES, {"size": "1024x1024"}, "size_above_maximum", "size"),
    (IMAGES, {"width": 1_000_000_000}, "size_above_maximum", "width"),
    (IMAGES, {"width": 1e9}, "size_above_maximum", "width"),
    (IMAGES, {"height": BIG}, "size_above_maximum", "height"),
    (IMAGES, {"width": -1}, "invalid_size", "width"),
    (IMAGES, {"size": "64x64", "width": 64}, "incompatible_parameters", "size"),
    # B10, B11: counts
    *((IMAGES, {"n": n}, "invalid_n", "n") for n in (0, -1, 11, 1e12, 1.5, "2", True, BIG)),
    (IMAGES, {"n": 1, "num_outputs_per_prompt": 2}, "incompatible_parameters", "n"),
    *((IMAGES, {"num_inference_steps": steps}, "invalid_steps", "num_inference_steps")
      for steps in (0, -1, 1_000_000_000, 1.5, float("nan"))),
    # B12: floats
    *((IMAGES, {name: float(value)}, "number_not_finite", name)
      for name in ("guidance_scale", "guidance_rescale", "flow_shift") for value in ("nan", "inf", "-inf")),
    *((IMAGES, {name: value}, "out_of_range", name)
      for name in ("guidance_scale", "guidance_rescale", "flow_shift") for value in (-1, 1e308, BIG)),
    # B13: seeds
    *((IMAGES, {"seed": seed}, "invalid_seed", "seed") for seed in (-1, 2**64, 1e30, [], True, [1, -1], [1] * 11)),
    (VIDEOS, {"seed": [1, 2]}, "invalid_seed", "seed"),
    # B14: the model
    (IMAGES, {"model": 3}, "invalid_type", "model"),
    # B15, B18: fields that do not exist, or not here
    *((path, {name: "x"}, "unknown_parameter", name) for path in (IMAGES, VIDEOS)
      for name in ("no_such_field", "output_path", "output_file_name", "save_output", "return_encoded", "return_frames",
                   "perf_dump_path", "file_path", "video_path", "upscaling_model_path", "diffusers_kwargs",
                   "attention_backend_override", "attention_backend", "self_attention_backend",
                   "cross_attention_backend", "\ud800")),
    (IMAGES, {"extra_body": {"no_such_field": 1}}, "unknown_parameter", "no_such_field"),
    (IMAGES, {"extra_body": {"prompt": "twice"}}, "duplicate_parameter", "prompt"),
    (IMAGES, {"extra_body": 3}, "invalid_type", "extra_body"),
    # B16, B17: OpenAI's own choices
    (IMAGES, {"output_format": "tiff"}, "invalid_value", "output_format"),
    (IMAGES, {"output_format": "mp4"}, "invalid_value", "output_format"),
    (VIDEOS, {"output_format": "png"}, "invalid_value", "output_format"),
    (IMAGES, {"quality": "bogus"}, "invalid_value", "quality"),
    (IMAGES, {"background": "bogus"}, "invalid_value", "background"),
    (IMAGES, {"background": "transparent"}, "invalid_value", "background"),
    (IMAGES, {"response_format": "xml"}, "invalid_value", "response_format"),
    (IMAGES, {"output_format": "jpeg", "output_compression": 101}, "invalid_value", "output_compression"),
    (IMAGES, {"output_format": "jpeg", "output_compression": -5}, "invalid_value", "output_compression"),
    (IMAGES, {"output_compression": 50}, "incompatible_parameters", "output_compression"),
    (IMAGES, {"output_format": "png", "output_compression": 50}, "incompatible_parameters", "output_compression"),
    (IMAGES, {"stream": "yes"}, "invalid_type", "stream"),
    (IMAGES, {"stream": True, "partial_images": 4}, "invalid_value", "partial_images"),
    (IMAGES, {"partial_images": 1}, "incompatible_parameters", "partial_images"),
    (IMAGES, {"stream": True, "n": 2}, "incompatible_parameters", "n"),
    (IMAGES, {"stream": True, "seed": [1, 2]}, "incompatible_parameters", "n"),
    (IMAGES, {"stream": True, "response_format": "url"}, "incompatible_parameters", "response_format"),
    (IMAGES, {"num_previews": 1}, "unknown_parameter", "num_previews"),
    (VIDEOS, {"num_previews": 1}, "unknown_parameter", "num_previews"),
    (IMAGES, {"style": "vivid"}, "unsupported_parameter", "style"),
    (IMAGES, {"num_frames": 5}, "unknown_parameter", "num_frames"),
    (IMAGES, {"x264_preset": "slow"}, "unknown_parameter", "x264_preset"),
    (IMAGES, {"metadata": "no"}, "invalid_type", "metadata"),
    *((path, {name: True}, "unknown_parameter", name) for path in (IMAGES, VIDEOS)
      for name in ("thumbnail", "contact_sheet")),
    # B24, B25: videos
    *((VIDEOS, {"seconds": seconds}, "invalid_seconds", "seconds")
      for seconds in ("abc", "-4", "0", "1e9", 1e9, 0, -4, "", "nan", "4 ", True, [4], BIG)),
    *((VIDEOS, {"fps": fps}, "invalid_fps", "fps") for fps in (0, 1_000_000_000, 1.5)),
    *((VIDEOS, {"num_frames": n}, "invalid_num_frames", "num_frames") for n in (0, 1_000_000_000, 34, 85)),
    (VIDEOS, {"seconds": "2", "num_frames": 33}, "incompatible_parameters", "seconds"),
    (VIDEOS, {"x264_preset": "quick"}, "invalid_value", "x264_preset"),
    (VIDEOS, {"x264_preset": "slow", "output_format": "webm"}, "invalid_value", "x264_preset"),
    (VIDEOS, {"fps": 60, "output_format": "gif"}, "invalid_value", "fps"),
    (IMAGES, {"enable_cache_dit": True, "cache_dit_params": {"scm_preset": "fast"}}, "unknown_parameter",
     "cache_dit_params.scm_preset"),
    (IMAGES, {"cache_dit_params": {"max_warmup_steps": 2}}, "incompatible_parameters", "cache_dit_params"),
    (VIDEOS, {"enable_teacache": True, "teacache_params": {"teacache_thresh": -1}}, "out_of_range",
     "teacache_params.teacache_thresh"),
    (VIDEOS, {"enable_teacache": True, "enable_cache_dit": True}, "incompatible_parameters", "enable_teacache"),
    (VIDEOS, {"n": 2}, "unsupported_parameter", "n"),
    (VIDEOS, {"input_reference": "https://example.com/a.png"}, "url_not_allowed", "input_reference"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "code", "param"), BAD_FIELDS)
def test_a_bad_field_is_refused_at_the_door(
    server: RunningServer, path: str, fields: dict[str, Any], code: str, param: str
) -> None:
    body = json.dumps({"prompt": "a red circle", **fields})
    reply = server.client.post(path, content=body, headers={"content-type": "application/json"})
    assert_error(reply, 400, code, param)
    assert not server.engine.submitted


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": ',
        b"[1]",
        b"",
        b"\xff\xfe{}",
        b"5",
        b'{"a": ' * 100_000,
        b'{"prompt": "a", "n": 1%s}' % (b"0" * 5000),
    ],
    ids=["cut", "list", "empty", "not utf-8", "number", "deep", "endless integer"],
)
def test_a_body_that_is_no_json_object_is_refused(server: RunningServer, content: bytes) -> None:
    for path in (IMAGES, VIDEOS):
        reply = server.client.post(path, content=content, headers={"content-type": "application/json"})
        assert_error(reply, 400, "invalid_json")


def test_a_key_given_twice_is_refused(server: RunningServer) -> None:
    for content in ('{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "extra_body": {"n": 1, "n": 2}}'):
        reply = server.client.post(IMAGES, content=content, headers={"content-type": "application/json"})
        assert_error(reply, 400, "duplicate_parameter", "n" if "extra" in content else "prompt")


@pytest.mark.parametrize(
    ("path", "content_type", "content", "status", "code"),
    [
        (IMAGES, "text/plain", b'{"prompt": "a"}', 415, "unsupported_media_type"),
        (IMAGES, "multipart/form-data; boundary=x", b"--x--\r\n", 415, "unsupported_media_type"),
        (VIDEOS, "text/plain", b'{"prompt": "a"}', 415, "unsupported_media_type"),
        (VIDEOS, "application/x-www-form-urlencoded", b"prompt=a", 415, "unsupported_media_type"),
        (VIDEOS, None, b'{"prompt": "a"}', 415, "unsupported_media_type"),
        (VIDEOS, "multipart/form-data", b"--x--\r\n", 400, "invalid_multipart"),
        (VIDEOS, "multipart/form-data; boundary=" + "x" * 300, b"--x--\r\n", 400, "invalid_multipart"),
        (VIDEOS, "multipart/form-data; boundary=x", b"", 400, "invalid_multipart"),
        (VIDEOS, "multipart/form-data; boundary=x", b"junk", 400, "invalid_multipart"),
        (VIDEOS, "multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na r',
         400, "invalid_multipart"),
        (VIDEOS, "multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
         400, "invalid_multipart"),
    ],
)  # fmt: skip
def test_a_body_of_the_wrong_kind_is_refused(
    server: RunningServer, path: str, content_type: str | None, content: bytes, status: int, code: str
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert_error(server.client.post(path, content=content, headers=headers), status, code)


def form(*fields: tuple[str, str | bytes]) -> dict[str, Any]:
    """Keyword arguments of a multipart request with these parts, in order."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (name.encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in fields
    ]
    return {"content": b"".join(parts) + b"--x--\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ([("prompt", "a"), ("prompt", "b")], "duplicate_parameter", "prompt"),
        ([("prompt", "a"), ("seed", "x")], "invalid_seed", "seed"),
        ([("prompt", "a"), ("fps", "1.5")], "invalid_fps", "fps"),
        ([("prompt", "a"), ("guidance_scale", "nan")], "number_not_finite", "guidance_scale"),
        ([("prompt", "a"), ("seconds", "abc")], "invalid_seconds", "seconds"),
        ([("prompt", "a"), ("no_such_field", "1")], "unknown_parameter", "no_such_field"),
        ([("prompt", "a"), ("output_path", "/tmp")], "unknown_parameter", "output_path"),
        ([("prompt", b"\xff")], "invalid_unicode", "prompt"),
        ([("prompt", "a\0")], "invalid_unicode", "prompt"),
        ([("size", "64x64")], "missing_required_parameter", "prompt"),
        ([("prompt", "a"), ("input_reference[file_id]", "f")], "unsupported_parameter", "input_reference"),
        ([("prompt", "a"), ("extra_body", '{"seed": -1}')], "invalid_seed", "seed"),
        ([("prompt", "a"), ("extra_body", "{")], "invalid_json", None),
        ([("prompt", "a")] * 200, "invalid_multipart", None),
    ],
)
def test_a_bad_multipart_field_is_refused(
    server: RunningServer, fields: list[tuple[str, str | bytes]], code: str, param: str | None
) -> None:
    assert_error(server.client.post(VIDEOS, **form(*fields)), 400, code, param)
    assert not server.engine.submitted


@pytest.mark.parametrize("file_name", ["a.png", "../../etc/passwd", ""])
def test_an_uploaded_file_is_refused_and_never_stored(server: RunningServer, file_name: str) -> None:
    files_before = sorted(server.files_dir.rglob("*"))
    big = b"\x89PNG" + b"0" * 3_000_000  # larger than the cap: the reason still is the file, not its size
    reply = server.client.post(VIDEOS, data={"prompt": "a"}, files={"input_reference": (file_name or "x", big)})
    assert_error(reply, 400, "unsupported_parameter", "input_reference")
    reply = server.client.post(VIDEOS, files={"prompt": ("p.txt", b"a red circle")})
    assert_error(reply, 400, "invalid_type", "prompt")
    assert sorted(server.files_dir.rglob("*")) == files_before


def test_a_body_over_the_cap_is_refused_with_and_without_a_length(server: RunningServer) -> None:
    body = json.dumps({"prompt": "a" * 2_000_000}).encode()
    headers = {"content-type": "application/json"}
    assert_error(server.client.post(IMAGES, content=body, headers=headers), 413, "body_too_large")
    chunks = (body[i : i + 65536] for i in range(0, len(body), 65536))
    assert_error(server.client.post(IMAGES, content=chunks, headers=headers), 413, "body_too_large")


def test_a_slow_body_and_a_slow_head_are_ended_at_the_deadline(start_server: Start) -> None:
    server = start_server(body=BodyLimits(timeout_s=0.2), header_timeout_s=0.2)
    head = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    answer, _, body = server.exchange(head).partition(b"\r\n\r\n")
    assert b" 408 " in answer and json.loads(body)["error"]["code"] == "request_timeout"
    assert server.exchange(b"GET /health HT") == b""
    assert server.exchange(b"") == b""
    again = b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\nGET /live"
    assert server.exchange(again).startswith(b"HTTP/1.1 200")


def test_bytes_that_are_no_http_get_json(server: RunningServer) -> None:
    huge = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 1_000_000 + b"\r\n\r\n"
    for request in (b"nonsense\r\n\r\n", huge):
        head, _, body = server.exchange(request).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and b"x-request-id: req_" in head
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_what_follows_bytes_that_are_no_http_is_dropped(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
        connection.sendall(b"more nonsense\r\n\r\n")
        assert server.client.get("/liveness").status_code == 200  # the loop has seen both by now
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_two_statements_of_the_length_are_refused(server: RunningServer) -> None:
    request = (
        b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    )
    head, _, body = server.exchange(request).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["code"] == "invalid_http"


def test_an_unknown_model_is_not_found_and_its_names_are(server: RunningServer) -> None:
    assert_error(server.post_image(model="no-such"), 404, "model_not_found", "model")
    assert_error(server.post_video(model="no-such"), 404, "model_not_found", "model")
    assert_error(server.client.get("/v1/models/no-such"), 404, "model_not_found", "model")
    assert server.post_image(model="org/tiny").status_code == 200
    assert server.client.get("/v1/models/org%2Ftiny").json()["id"] == "org/tiny"
    [card] = server.client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("tiny", "model", "sglang")
    assert card["limits"]["size_multiple"] == 16 and card["defaults"]["num_frames"] == 33


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (ModelArgs(model_path="demo"), ("demo",)),
        (ModelArgs(model_path="Wan-AI/Wan2.1"), ("Wan-AI/Wan2.1", "Wan2.1")),
        (ModelArgs(model_path="/srv/secret/wan"), ("wan",)),
        (ModelArgs(model_path="./wan/"), ("wan",)),
        (ModelArgs(model_path="/srv/wan", served_model_name="mine", model_id="a/b"), ("mine", "a/b", "wan")),
    ],
)
def test_the_served_names_hold_no_directory(args: ModelArgs, names: tuple[str, ...]) -> None:
    assert model_names(args) == names


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/videos/", 404, "video_not_found"),
        ("GET", IMAGES, 405, "method_not_allowed"),
        ("PUT", VIDEOS, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
def test_unknown_routes_and_methods_get_json(
    server: RunningServer, method: str, path: str, status: int, code: str
) -> None:
    reply = server.client.request(method, path)
    assert_error(reply, status, code, "video_id" if code == "video_not_found" else None)
    if status == 405:
        assert reply.headers["allow"]


@pytest.mark.parametrize("model", [None, MODEL], ids=["first start", "known model"])
@pytest.mark.parametrize("state", ["starting", "loading", "stopping"])
def test_requests_before_the_model_is_ready_get_503(server: RunningServer, state: Any, model: ModelInfo | None) -> None:
    server.engine.state = EngineState(state=state, detail=f"reading {SECRET_PATH}", model=model)
    code = "engine_stopped" if state == "stopping" else "not_ready"
    for reply in (server.post_image(), server.post_video()):
        assert_error(reply, 503, code)
        assert reply.headers["x-should-retry"] == ("false" if state == "stopping" else "true")
        assert ("retry-after" in reply.headers) == (state != "stopping")
    health = server.client.get("/health")
    assert health.status_code == 503 and health.json()["state"] == state
    assert health.headers["retry-after"] and SECRET_PATH not in health.text
    assert server.client.get("/liveness").json() == {"status": "ok"}
    assert server.client.get("/v1/models").status_code == 200


def test_a_recovering_engine_still_takes_requests(server: RunningServer) -> None:
    server.engine.state = EngineState(state="recovering", model=MODEL)
    assert server.post_image().status_code == 200
    assert server.client.get("/health").status_code == 503


def test_a_failed_engine_says_so_without_naming_files(server: RunningServer) -> None:
    error = NotAModel(f"{SECRET_PATH} holds no checkpoint").info()
    server.engine.state = EngineState(state="failed", error=error)
    reply = server.post_image()
    assert_error(reply, 503, "not_a_model")
    assert reply.headers["x-should-retry"] == "false" and "retry-after" not in reply.headers
    assert server.client.get("/health").json()["error"]["code"] == "not_a_model"


def test_a_full_queue_answers_429(server: RunningServer) -> None:
    server.engine.refusal = QueueFull(3)
    for reply in (server.post_image(), server.post_video()):
        assert_error(reply, 429, "queue_full")
        assert 0 < int(reply.headers["retry-after"]) <= 120
    assert server.client.get(VIDEOS, params={"limit": "0"}).status_code == 200


def test_an_error_of_the_engine_reaches_the_client_without_paths(server: RunningServer) -> None:
    reply = server.post_image(prompt="fail")
    assert_error(reply, 500, "out_of_memory")
    assert reply.headers["x-should-retry"] == "false"
    assert "no memory left" in reply.json()["error"]["message"]


def test_health_is_ok_when_ready(server: RunningServer) -> None:
    assert server.client.get("/health").json() == {"status": "ok", "state": "ready"}


def test_request_ids_are_taken_over_when_they_are_harmless(server: RunningServer) -> None:
    assert server.client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert re.fullmatch("req_[0-9a-f]{32}", server.client.get("/health").headers["x-request-id"])
    assert server.client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_other_origins_get_no_permission(server: RunningServer) -> None:
    reply = server.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in reply.headers)


# --- images ---


def test_images_come_back_as_base64_with_what_was_used(server: RunningServer) -> None:
    reply = server.post_image(n=2, seed=7, num_inference_steps=3, guidance_scale=2, negative_prompt="blurry")
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert (found["size"], found["output_format"], found["background"]) == ("128x96", "png", "opaque")
    assert abs(found["created"] - time.time()) < 60
    assert [image["seed"] for image in found["data"]] == [7, 8]
    for image in found["data"]:
        with Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))) as picture:
            assert (picture.format, picture.size) == ("PNG", (128, 96))
    params = list(server.engine.submitted.values())
    assert [p.num_frames for p in params] == [1, 1] and {p.guidance_scale for p in params} == {2.0}
    assert {(p.negative_prompt, p.num_inference_steps, p.save_output) for p in params} == {("blurry", 3, False)}


@pytest.mark.parametrize("fields", [{}, {"size": "auto"}, {"size": None, "n": None, "user": "u", "quality": "auto"}])
def test_an_unset_size_is_the_models_own(server: RunningServer, fields: dict[str, Any]) -> None:
    assert server.post_image(**fields).json()["size"] == "128x96"


def test_fields_of_extra_body_count_like_the_others(server: RunningServer) -> None:
    assert server.post_image(extra_body={"seed": 5, "size": "64x64"}).json()["size"] == "64x64"
    assert [p.seed for p in server.engine.submitted.values()] == [5]


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_an_image_url_gives_the_same_bytes_safely(server: RunningServer, file_format: str) -> None:
    image = server.post_image(response_format="url", output_format=file_format).json()["data"][0]
    assert image["b64_json"] is None
    assert re.fullmatch(r"/v1/images/img_[0-9a-f]{32}/content", httpx.URL(image["url"]).path)
    reply = server.client.get(image["url"])
    assert reply.headers["content-type"] == f"image/{file_format}"
    assert (
        reply.headers["x-content-type-options"] == "nosniff" and "sandbox" in reply.headers["content-security-policy"]
    )
    with Image.open(io.BytesIO(reply.content)) as picture:
        assert picture.size == (128, 96)


@pytest.mark.parametrize("image_id", ["img_" + "0" * 32, "x", "img_" + "0" * 10_000])
def test_an_unknown_image_is_not_found(server: RunningServer, image_id: str) -> None:
    assert_error(server.client.get(f"/v1/images/{image_id}/content"), 404, "image_not_found", "image_id")


def test_only_so_many_images_are_kept(start_server: Start) -> None:
    server = start_server(max_images=2)
    urls = [server.post_image(response_format="url").json()["data"][0]["url"] for _ in range(3)]
    assert [server.client.get(url).status_code for url in urls] == [404, 200, 200]
    assert len(list((server.files_dir / "images").iterdir())) == 2


def test_a_client_that_goes_away_cancels_its_images(server: RunningServer) -> None:
    server.engine.held = True
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(IMAGES, json={"prompt": "a", "n": 3}, timeout=0.3)
    wait_for(lambda: len(server.engine.cancelled) == 3)
    assert sorted(server.engine.cancelled) == sorted(server.engine.submitted)
    server.engine.held = False
    assert server.post_image().status_code == 200, "the server goes on"


def test_a_stopping_server_answers_who_still_waits(start_server: Start) -> None:
    server = start_server(shutdown_grace_s=3.0)
    server.engine.held = True
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post_image)
        wait_for(lambda: len(server.engine.submitted) == 1)
        server.stop()
        assert_error(reply.result(), 503, "engine_stopped")
    assert server.engine.cancelled == list(server.engine.submitted)
    wait_for(lambda: refuses_connections(server))


def refuses_connections(server: RunningServer) -> bool:
    try:
        server.client.get("/liveness")
    except httpx.ConnectError:
        return True
    return False


# --- videos ---


def finished_video(server: RunningServer, **fields: Any) -> dict[str, Any]:
    """A completed job."""
    video = server.post_video(**fields).json()
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video['id']}").json()["status"] == "completed")
    return server.client.get(f"{VIDEOS}/{video['id']}").json()


def test_a_video_goes_from_queued_to_completed(server: RunningServer) -> None:
    server.engine.held = True
    created = server.post_video(seed=3)
    assert created.status_code == 200 and int(created.headers["openai-poll-after-ms"]) > 0
    video = created.json()
    assert re.fullmatch("video_[0-9a-f]{32}", video["id"])
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["seconds"], video["size"], video["model"], video["seed"]) == ("2", "128x96", "tiny", 3)
    url = f"{VIDEOS}/{video['id']}"
    wait_for(lambda: server.client.get(url).json()["progress"] == 50)
    running = server.client.get(url).json()
    assert (running["status"], running["eta_seconds"], running["notes"]) == ("in_progress", 1.2, ["a note"])
    assert_error(server.client.get(f"{url}/content"), 400, "video_not_ready", "video_id")
    server.engine.held = False
    wait_for(lambda: server.client.get(url).json()["status"] == "completed")
    done = server.client.get(url)
    assert (done.json()["progress"], done.json()["error"]) == (100, None)
    assert done.json()["completed_at"] >= done.json()["created_at"] and "openai-poll-after-ms" not in done.headers
    content = server.client.get(f"{url}/content", params={"variant": "video"})
    assert (content.content, content.headers["content-type"]) == (bytes(range(200)), "video/mp4")
    assert content.headers["x-content-type-options"] == "nosniff"
    assert content.headers["content-disposition"].startswith("attachment")
    [params] = server.engine.submitted.values()
    assert params.save_output and params.output_path == str(server.files_dir / "videos")


def test_multipart_fields_are_read_by_their_declared_types(server: RunningServer) -> None:
    fields = [
        ("prompt", "ein Kreis – rot"),
        ("seconds", "4"),
        ("size", "64x48"),
        ("seed", "5"),
        ("guidance_scale", "2.5"),
    ]
    reply = server.client.post(VIDEOS, **form(*fields, ("extra_body", '{"num_inference_steps": 2}')))
    assert (reply.json()["seconds"], reply.json()["num_frames"], reply.json()["size"]) == ("4", 65, "64x48")
    [params] = server.engine.submitted.values()
    assert (params.prompt, params.seed, params.guidance_scale) == ("ein Kreis – rot", 5, 2.5)
    assert params.num_inference_steps == 2


@pytest.mark.parametrize("layers", [(7,), (7, 8, 9)])
def test_a_list_is_read_from_json_and_from_multipart_fields(server: RunningServer, layers: tuple[int, ...]) -> None:
    fields = [("prompt", "a"), *(("skip_guidance_layers[]", str(layer)) for layer in layers)]
    assert server.client.post(VIDEOS, **form(*fields)).status_code == 200
    assert server.post_video(skip_guidance_layers=list(layers)).status_code == 200
    assert [params.skip_guidance_layers for params in server.engine.submitted.values()] == [layers, layers]


@pytest.mark.parametrize(
    ("fields", "num_frames", "seconds"),
    [
        ({}, 33, "2"),
        ({"seconds": "5"}, 81, "5"),
        ({"seconds": 1}, 17, "1"),
        ({"seconds": "1.1"}, 17, "1"),
        ({"seconds": 2.3, "fps": 10}, 21, "2"),
        ({"seconds": "0.1"}, 1, "0"),
        ({"num_frames": 5}, 5, "0.25"),
    ],
)
def test_the_reply_tells_the_actual_length(
    server: RunningServer, fields: dict[str, Any], num_frames: int, seconds: str
) -> None:
    video = server.post_video(**fields).json()
    assert (video["num_frames"], video["seconds"]) == (num_frames, seconds)


def test_a_failed_video_says_why_and_has_no_content(server: RunningServer) -> None:
    video_id = server.post_video(prompt="fail").json()["id"]
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "failed")
    error = server.client.get(f"{VIDEOS}/{video_id}").json()["error"]
    assert error["code"] == "out_of_memory" and SECRET_PATH not in error["message"]
    assert_error(server.client.get(f"{VIDEOS}/{video_id}/content"), 404, "video_failed", "video_id")


@pytest.mark.parametrize("video_id", ["video_" + "0" * 32, "..%2F..%2Fx", "x", "video_" + "0" * 10_000, "%00", "%ff"])
def test_an_unknown_video_is_not_found(server: RunningServer, video_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        reply = server.client.request(method, f"{VIDEOS}/{video_id}{path}")
        assert_error(reply, 404, "video_not_found", "video_id")


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("variant=bogus", "invalid_variant", "variant"),
        ("variant=contact_sheet", "invalid_variant", "variant"),
        ("variant=video&variant=video", "duplicate_parameter", "variant"),
        ("format=mp4", "unknown_parameter", "format"),
    ],
)
def test_a_bad_content_query_is_refused(server: RunningServer, query: str, code: str, param: str) -> None:
    assert_error(server.client.get(f"{VIDEOS}/video_{'0' * 32}/content?{query}"), 400, code, param)


@pytest.mark.parametrize(
    ("header", "status", "expected"),
    [
        ("bytes=0-9", 206, bytes(range(10))),
        ("bytes=190-", 206, bytes(range(190, 200))),
        ("bytes=-5", 206, bytes(range(195, 200))),
        ("bytes=5-2", 200, bytes(range(200))),
        ("nonsense", 200, bytes(range(200))),
        ("bytes=" + ",".join(f"{i}-{i}" for i in range(5_000)), 200, bytes(range(200))),
        ("bytes=200-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_ranges_of_a_video(server: RunningServer, header: str, status: int, expected: bytes | None) -> None:
    video = finished_video(server)
    began = time.perf_counter()
    reply = server.client.get(f"{VIDEOS}/{video['id']}/content", headers={"range": header})
    assert time.perf_counter() - began < 0.5
    if expected is None:
        assert_error(reply, status, "range_not_satisfiable", "range")
    else:
        assert (reply.status_code, reply.content) == (status, expected)


def test_videos_are_listed_page_by_page(start_server: Start) -> None:
    server = start_server()
    empty = server.client.get(VIDEOS).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    ids = [server.post_video().json()["id"] for _ in range(5)]
    assert [v["id"] for v in server.client.get(VIDEOS).json()["data"]] == ids[::-1]
    first = server.client.get(VIDEOS, params={"limit": 2, "order": "asc"}).json()
    assert ([v["id"] for v in first["data"]], first["last_id"], first["has_more"]) == (ids[:2], ids[1], True)
    rest = server.client.get(VIDEOS, params={"limit": 3, "order": "asc", "after": ids[1]}).json()
    assert ([v["id"] for v in rest["data"]], rest["has_more"]) == (ids[2:], False)
    none = server.client.get(VIDEOS, params={"limit": 0}).json()
    assert (none["data"], none["last_id"]) == ([], None)


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=-1", "out_of_range", "limit"),
        ("limit=101", "out_of_range", "limit"),
        ("limit=abc", "invalid_type", "limit"),
        ("order=sideways", "invalid_value", "order"),
        ("after=video_unknown", "invalid_cursor", "after"),
        ("page=2", "unknown_parameter", "page"),
    ],
)
def test_a_bad_list_query_is_refused(server: RunningServer, query: str, code: str, param: str) -> None:
    assert_error(server.client.get(f"{VIDEOS}?{query}"), 400, code, param)


def test_deleting_a_video_removes_its_bytes(server: RunningServer) -> None:
    video = finished_video(server)
    files = list((server.files_dir / "videos").glob(f"{video['id']}.*"))
    assert len(files) == 3
    reply = server.client.delete(f"{VIDEOS}/{video['id']}")
    assert reply.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert not any(path.exists() for path in files)
    assert_error(server.client.delete(f"{VIDEOS}/{video['id']}"), 404, "video_not_found", "video_id")


def test_deleting_a_running_video_cancels_it(server: RunningServer) -> None:
    server.engine.held = True
    video_id = server.post_video().json()["id"]
    assert server.client.delete(f"{VIDEOS}/{video_id}").json()["deleted"] is True
    assert server.engine.cancelled == [video_id]
    assert_error(server.client.get(f"{VIDEOS}/{video_id}"), 404, "video_not_found", "video_id")


def test_only_so_many_videos_are_kept(start_server: Start) -> None:
    server = start_server(jobs=JobSettings(capacity=2))
    old = finished_video(server)
    server.engine.held = True
    running = [server.post_video().json()["id"] for _ in range(2)]
    assert_error(server.client.get(f"{VIDEOS}/{old['id']}"), 404, "video_not_found", "video_id")
    assert list((server.files_dir / "videos").iterdir()) == []
    assert_error(server.post_video(), 429, "queue_full")
    server.engine.held = False
    for video_id in running:
        wait_for(lambda video_id=video_id: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")


def test_a_gif_is_served_as_one(server: RunningServer) -> None:
    video = finished_video(server, output_format="gif")
    assert server.client.get(f"{VIDEOS}/{video['id']}/content").headers["content-type"] == "image/gif"


@pytest.mark.parametrize("file_format", ["mp4", "gif"])
@pytest.mark.parametrize(
    ("variant", "content", "media_type", "ending"),
    [
        ("thumbnail", b"thumbnail", "image/webp", ".thumb.webp"),
        ("spritesheet", b"contact sheet", "image/jpeg", ".sheet.jpg"),
    ],
)
def test_a_video_has_a_thumbnail_and_a_contact_sheet(
    server: RunningServer, file_format: str, variant: str, content: bytes, media_type: str, ending: str
) -> None:
    video = finished_video(server, output_format=file_format)
    url = f"{VIDEOS}/{video['id']}/content?variant={variant}"
    reply = server.client.get(url)
    assert (reply.content, reply.headers["content-type"]) == (content, media_type)
    assert f'filename="{video["id"]}{ending}"' in reply.headers["content-disposition"]
    assert server.client.get(url, headers={"range": "bytes=0-1"}).content == content[:2]
    (server.files_dir / "videos" / f"{video['id']}{ending}").unlink()
    assert_error(server.client.get(url), 404, "video_not_found", "video_id")


def test_a_client_may_keep_the_parameters_out_of_the_file(server: RunningServer) -> None:
    for post in (server.post_image, server.post_video):
        assert [post(**fields).status_code for fields in ({}, {"metadata": False})] == [200, 200]
    assert [params.metadata for params in server.engine.submitted.values()] == [True, False] * 2


# --- idempotency ---


@pytest.mark.parametrize("path", [IMAGES, VIDEOS])
def test_one_idempotency_key_is_one_execution(server: RunningServer, path: str) -> None:
    server.engine.held = True
    headers = {"idempotency-key": f"key-{path}"}

    def send(_: int) -> httpx.Response:
        return httpx.post(server.client.base_url.join(path), json={"prompt": "a"}, headers=headers, timeout=10)

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        replies = pool.map(send, range(10))
        wait_for(lambda: len(server.engine.submitted) == 1)
        server.engine.held = False
        bodies = {reply.text for reply in replies}
    assert len(bodies) == 1 and len(server.engine.submitted) == 1
    other = server.client.post(path, json={"prompt": "b"}, headers=headers)
    assert_error(other, 400, "idempotency_mismatch", "idempotency-key")


def test_a_failure_is_not_kept_under_its_key(server: RunningServer) -> None:
    headers = {"idempotency-key": "fails-once"}
    server.engine.refusal = QueueFull(1)
    assert server.client.post(IMAGES, json={"prompt": "a"}, headers=headers).status_code == 429
    server.engine.refusal = None
    assert server.client.post(IMAGES, json={"prompt": "a"}, headers=headers).status_code == 200


def test_the_last_client_of_a_key_to_go_cancels_the_work(server: RunningServer) -> None:
    server.engine.held = True
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(IMAGES, json={"prompt": "a"}, headers={"idempotency-key": "gone"}, timeout=0.3)
    wait_for(lambda: server.engine.cancelled == list(server.engine.submitted))


# --- the page that describes it all ---


def test_the_openapi_page_is_made_of_the_declarations(server: RunningServer) -> None:
    page = server.client.get("/openapi.json").json()
    body = page["paths"][VIDEOS]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    fields = body["application/json"]["schema"]["properties"]
    assert fields["fps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 240}
    assert "output_path" not in fields and "num_outputs_per_prompt" not in fields
    assert fields["output_format"]["anyOf"][0]["enum"] == ["mp4", "gif", "webm"]
    assert "422" not in json.dumps(page), "bad input is 400 here"
    assert page["paths"]["/v1/videos/{video_id}"]["get"]["parameters"][0]["name"] == "video_id"


# --- fields for administrators, metrics ---

ADMIN_KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def admin_server(start_server: Start) -> RunningServer:
    """A server that has an admin key."""
    return start_server(admin_api_key=ADMIN_KEY)


@pytest.mark.parametrize("path", [IMAGES, VIDEOS])
@pytest.mark.parametrize(
    "authorization", [None, "Bearer unused", f"Basic {ADMIN_KEY}", f"Bearer {ADMIN_KEY}x", "Bearer"]
)
def test_a_field_for_administrators_is_refused_without_the_key(
    admin_server: RunningServer, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    reply = admin_server.client.post(path, json={"prompt": "a", "profile": True}, headers=headers)
    assert_error(reply, 403, "admin_required", "profile")
    assert ADMIN_KEY not in reply.text
    assert admin_server.client.post(path, json={"prompt": "a", "profile": None}, headers=headers).status_code == 200


def test_without_a_key_on_the_server_nobody_is_its_administrator(server: RunningServer) -> None:
    reply = server.client.post(IMAGES, json={"prompt": "a", "profile": True}, headers={"authorization": "Bearer None"})
    assert_error(reply, 403, "admin_required", "profile")


@pytest.mark.parametrize("path", [IMAGES, VIDEOS])
def test_the_administrator_may_profile_the_first_output(admin_server: RunningServer, path: str) -> None:
    admin_server.engine.submitted.clear()
    headers = {"authorization": f"bearer {ADMIN_KEY}"}
    fields = {"prompt": "a", "profile": True, "num_profiled_timesteps": 2} | ({"n": 2} if path == IMAGES else {})
    assert admin_server.client.post(path, json=fields, headers=headers).status_code == 200
    submitted = list(admin_server.engine.submitted.values())
    assert [(p.profile, p.num_profiled_timesteps) for p in submitted] == [(True, 2), (False, 2)][: len(submitted)]
    assert_error(
        admin_server.client.post(path, json={"prompt": "a", "profile_all_stages": True}, headers=headers),
        *(400, "incompatible_parameters", "profile_all_stages"),
    )


def test_paths_stay_out_of_reach_for_the_administrator_too(admin_server: RunningServer) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    for name in ("perf_dump_path", "output_path", "profile_dir"):
        reply = admin_server.client.post(IMAGES, json={"prompt": "a", name: "x"}, headers=headers)
        assert_error(reply, 400, "unknown_parameter", name)


def test_the_engines_ids_begin_with_the_requests_id(server: RunningServer) -> None:
    for _ in range(2):  # the same id again is no collision
        reply = server.client.post(IMAGES, json={"prompt": "a", "n": 2}, headers={"x-request-id": "trace:1"})
        assert reply.status_code == 200
    assert len(server.engine.submitted) == 4
    assert all(request_id.startswith("trace:1-") for request_id in server.engine.submitted)


def test_replies_tell_inference_time_and_memory(server: RunningServer) -> None:
    image = server.post_image().json()
    assert (image["queue_time_s"], image["inference_time_s"], image["peak_memory_mb"]) == (0.25, 0.5, 0.0)
    assert image["data"][0]["computed_steps"] == 3
    video = server.post_video().json()
    assert video["peak_memory_mb"] is video["computed_steps"] is None
    wait_for(lambda: server.client.get(f"/v1/videos/{video['id']}").json()["status"] == "completed")
    done = server.client.get(f"/v1/videos/{video['id']}").json()
    assert (done["inference_time_s"], done["peak_memory_mb"], "profile" in done) == (0.5, 0.0, False)
    assert done["computed_steps"] == 3


def test_metrics_are_answered_without_a_scheduler(server: RunningServer) -> None:
    """The scripted engine has none: it raises as the client does whose scheduler is gone."""
    before = scraped(server)
    assert server.client.get("/no/such/path").status_code == 404
    assert server.client.request("BREW", "/v1/models").status_code == 405
    after = scraped(server)
    assert after["sglang_diffusion_scheduler_up"] == 0.0
    assert after["sglang_diffusion_http_requests_in_flight"] == 1.0  # the scrape itself

    def rise(method: str, route: str, status: int) -> float:
        name = f'sglang_diffusion_http_requests_total{{method="{method}",route="{route}",status="{status}"}}'
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert (rise("GET", "none", 404), rise("other", "/v1/models", 405), rise("GET", "/metrics", 200)) == (1, 1, 1)


def scraped(server: RunningServer) -> dict[str, float]:
    """Each sample's value by its name and labels as they stand in the text."""
    reply = server.client.get("/metrics")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
