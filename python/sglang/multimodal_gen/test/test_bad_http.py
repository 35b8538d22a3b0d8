"""Bad input by the rows of the table that the project keeps: each case's id begins with its row.

Rows with tests of their own elsewhere: B19 to B21 and B23 (files) in test_http_inputs.py and test_media_inputs.py, B27
and B28 (content, lists) and B30 (idempotency) in test_http_api.py, B31 (keys) in test_http_access.py, B33 (slow and
idle connections) in test_http_state.py and test_http_api.py.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import socket
import time
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_CLIP, STARTS_FROM_A_PICTURE, InputLimits
from sglang.multimodal_gen.runtime.entrypoints import media_reading
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import IMAGE_CALL
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    READY,
    RunningServer,
    Start,
    assert_error,
    encoded_image,
    error_of,
    wait_for,
)

IMAGES, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
VIDEO_EDITS, EXTENSIONS = f"{VIDEOS}/edits", f"{VIDEOS}/extensions"
GENERATING = (IMAGES, VIDEOS)
TAKING_FORMS = (EDITS, VIDEOS, VIDEO_EDITS, EXTENSIONS)
JSON = "application/json"
FORM = "multipart/form-data; boundary=x"
CUT_FORM = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'
UNKNOWN_VIDEO = f"{VIDEOS}/video_{'0' * 32}"
REMIX = f"{UNKNOWN_VIDEO}/remix"
ZERO_WIDTH = ("\u200b", "\u2060\ufeff \u00ad", "\u0001\u2029")
# Whatever takes a number has an end.
NUMBERS = sorted(
    name for name, p in IMAGE_CALL.accepted.items() if float in p.types and p.declaration.group != "openai"
)


PNG = encoded_image(dataclasses.replace(MODEL.defaults, width=64, height=64, output_format="png"))
PNG_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def ready_for(inputs: InputLimits) -> Any:
    """Ready with a model that takes these inputs, and a cap on the work of a request."""
    limits = msgspec.structs.replace(MODEL.limits, inputs=inputs, max_cost=512 * 512 * 81 * 10)
    return msgspec.structs.replace(READY, model=msgspec.structs.replace(MODEL, limits=limits))


EDITING, FROM_CLIPS = ready_for(STARTS_FROM_A_PICTURE), ready_for(STARTS_FROM_A_CLIP)


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
    coding: str | None = None

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


def form(row: str, what: str, parts: bytes, status: int, code: str, param: str | None, **options: Any) -> Bad:
    """A multipart body of these parts; each `name=value` on a line of its own is a part."""
    lines = [line.partition(b"=") for line in parts.split(b"\n")]
    content = b"".join(b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (n, v) for n, _, v in lines)
    options = {"path": VIDEOS, "content_type": FORM, **options}
    return body(row, what, content + b"--x--\r\n", status, code, param=param, **options)


def part(row: str, what: str, head: bytes, code: str, param: str | None = None) -> Bad:
    """A multipart body with a prompt and a part that has this head."""
    parts = (b'Content-Disposition: form-data; name="prompt"', b"a"), (head, b"5")
    content = b"".join(b"--x\r\n%s\r\n\r\n%s\r\n" % each for each in parts) + b"--x--\r\n"
    return body(row, what, content, 400, code, param=param, path=VIDEOS, content_type=FORM)


def nested(depth: int, *, size: int = 0) -> bytes:
    """A JSON object with lists in it, `depth` levels in all, of at least so many bytes."""
    lists = b"[" * (depth - 1) + b"]" * (depth - 1)
    return b'{"prompt": "a", "seed": %s%s}' % (lists, b" " * size)


def get(row: str, what: str, path: str, status: int, code: str, param: str | None, method: str = "GET") -> Bad:
    """A request without a body."""
    return Bad(row=row, what=what, method=method, path=path, status=status, code=code, param=param, content_type=None)


# Of fields that every call has.
OF_ANY_CALL = [
    *(("B11", "num_inference_steps", steps, "invalid_steps") for steps in (0, 10**9, 1.5)),
    ("B12", "guidance_scale", float("nan"), "number_not_finite"),
    ("B12", "flow_shift", 1e308, "out_of_range"),
    ("B13", "seed", -1, "invalid_seed"),
    ("B13", "seed", 2**64, "invalid_seed"),
    ("B14", "model", 3, "invalid_type"),
    ("B15", "no_such_field", 1, "unknown_parameter"),
    ("B16", "output_format", "tiff", "invalid_value"),
    ("B18", "output_path", "/tmp/x", "unknown_parameter"),
]
CASES = [
    *(body("B1", what, content, 400, "invalid_json", path=path) for path in GENERATING for what, content in (
        ("cut", b'{"prompt": '), ("list", b"[1]"), ("empty", b""), ("not UTF-8", b"\xff\xfe"),
        ("deep", b"[" * 100_000), ("deep object", b'{"a":' * 100_000), ("two", b"{} {}"), ("NaN key", b"{NaN: 1}"))),
    *(body("B1", f"{depth} levels, {size} bytes", nested(depth, size=size), 400, "invalid_json", path=path)
      for path, size in ((IMAGES, 0), (VIDEOS, 0), (VIDEOS, 1_100_000), (EDITS, 1_100_000))
      for depth in (65, 500, 990, 100_000)),
    body("B1", "64 levels", nested(64), 400, "invalid_seed", param="seed"),
    form("B1", "deep extra_body", b"prompt=a\nextra_body=" + nested(990), 400, "invalid_json", None),
    *(body("B1", what, content, 400, "invalid_json", path=path) for path in (*TAKING_FORMS, REMIX)
      for what, content in (("cut", b'{"prompt": '), ("list", b"[1]"), ("empty", b""), ("not UTF-8", b"\xff\xfe"))),
    *(body("B2", "text", b'{"prompt": "a"}', 415, "unsupported_media_type", path=path, content_type="text/plain")
      for path in (VIDEO_EDITS, EXTENSIONS, REMIX)),
    form("B2", "form", b"prompt=a", 415, "unsupported_media_type", None, path=REMIX),
    *(body("B2", charset, b'{"prompt": "a"}', 415, "unsupported_media_type", path=path,
           content_type=f"application/json; charset={charset}")
      for path in GENERATING for charset in ("utf-16", "latin-1", '"iso-8859-1"')),
    *(body("B2", coding, b'{"prompt": "a"}', 415, "unsupported_media_type", path=path, coding=coding)
      for path in (*GENERATING, EDITS, REMIX) for coding in ("gzip", "br", "identity, deflate")),
    *(form("B2", coding, b"prompt=a", 415, "unsupported_media_type", None, coding=coding) for coding in ("gzip", "x")),
    *(part("B2", f"part in {coding.decode()}",
           b'Content-Disposition: form-data; name="seed"\r\nContent-Transfer-Encoding: ' + coding, "invalid_multipart")
      for coding in (b"base64", b"Quoted-Printable")),
    part("B2", "two names", b'Content-Disposition: form-data; name="seed"; name="fps"', "invalid_multipart"),
    part("B2", "two names", b'Content-Disposition: form-data; NAME=seed; filename="a;name=\\"b"; name ="fps"',
         "invalid_multipart"),
    part("B2", "two dispositions", b'Content-Disposition: form-data; name="seed"\r\ncontent-disposition: form-data',
         "invalid_multipart"),
    part("B2", "name not UTF-8", b'Content-Disposition: form-data; name="\xff"', "invalid_unicode"),
    *(form("B3", parts.decode(), b"prompt=a\n" + parts, 400, "duplicate_parameter", param, path=path)
      for path in TAKING_FORMS for param, parts in (
        ("prompt", b"prompt[]=b"), ("seed", b"seed=1\nseed[]=2"), ("seed", b"seed[]=1\nseed=2"),
        ("seed", b"seed[a]=1\nseed[]=2"))),
    *(form("B3", parts.decode(), b"prompt=a\n" + parts, 400, "duplicate_parameter", "input_reference")
      for parts in (b"input_reference[image_url]=b\ninput_reference[]=c", b"input_reference=b\ninput_reference[]=c",
                    b"input_reference[]=b\ninput_reference[image_url]=c")),
    *(body("B3", "twice", b'{"prompt": "a", "seed": 1, "seed": 1}', 400, "duplicate_parameter", param="seed", path=path)
      for path in (*TAKING_FORMS, REMIX)),
    *(form("B3", "two ids", b"prompt=a\nvideo_id=A\nvideo[id]=B", 400, "incompatible_parameters", "video_id", path=path)
      for path in (VIDEO_EDITS, EXTENSIONS)),
    body("B3", "two ids", b'{"prompt": "a", "video_id": "A", "video": {"id": "B"}}', 400, "incompatible_parameters",
         param="video_id", path=VIDEO_EDITS),
    *(form("B4", parts.decode(), parts, 400, code, param) for parts, code, param in (
        (b"prompt[foo]=a", "invalid_type", "prompt"), (b"prompt[]=a", "invalid_type", "prompt"),
        (b"prompt=a\nsize[x]=64x64", "invalid_size", "size"),
        (b"prompt=a\nseed[evil]=5", "invalid_seed", "seed"), (b"prompt=a\nseed[a][b]=5", "invalid_seed", "seed"),
        (b"prompt=a\nseed[=5", "unknown_parameter", "seed["), (b"prompt=a\nseed]=5", "unknown_parameter", "seed]"),
        (b"prompt=a\n[]=5", "unknown_parameter", "[]"), (b"prompt=a\nno_such[x]=5", "unknown_parameter", "no_such"),
        (b"prompt=a\nextra_body[seed]=5", "invalid_type", "extra_body"))),
    *(field("B4", "prompt", prompt, "empty_prompt", path=path) for path in GENERATING for prompt in ZERO_WIDTH),
    *(form("B13", text, b"prompt=a\n" + text.encode(), 400, code, param) for text, code, param in (
        ("seed=1_000", "invalid_seed", "seed"), ("seed= \u0663 ", "invalid_seed", "seed"),
        ("seed[]=1_0", "invalid_seed", "seed"), ("seed=0x5", "invalid_seed", "seed"),
        ("guidance_scale=1_0", "invalid_type", "guidance_scale"),
        ("guidance_scale= 1", "invalid_type", "guidance_scale"),
        ("guidance_scale=\uff11", "invalid_type", "guidance_scale"), ("fps=1e1", "invalid_fps", "fps"))),
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
        "-64x64", "0x64", "8x64", "64", "axb", "64x64x64", " 64 x 64 ", [64, 64])),
    *(field("B7", "size", "65x67", "invalid_size", path=path) for path in GENERATING),
    *(field("B8", name, value, "size_above_maximum", path=path) for path in GENERATING for name, value in (
        ("size", "99999x99999"), ("width", 10**9), ("height", 10**400))),
    *(field("B10", "n", n, "invalid_n") for n in (0, -1, 11, 1e12, 1.5, "2", True)),
    *(field("B11", "num_inference_steps", steps, "invalid_steps", path=path) for path in GENERATING
      for steps in (0, -1, 10**9, 1.5)),
    *(field("B12", name, value, code, path=path) for path in GENERATING for name in ("guidance_scale", "flow_shift")
      for value, code in ((float("nan"), "number_not_finite"), (float("inf"), "number_not_finite"),
                          (-1, "out_of_range"), (1e308, "out_of_range"))),
    *(field("B12", name, 1e308, "out_of_range") for name in NUMBERS),
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
    *(field("B16", "quality", quality, "invalid_value") for quality in ("low", "high", "hd")),
    field("B17", "partial_images", 4, "invalid_value"),
    *(field("B17", name, value, "unsupported_parameter", path=path) for path in (VIDEOS, VIDEO_EDITS, EXTENSIONS)
      for name, value in (("stream", True), ("stream", False), ("partial_images", 2))),
    *(field("B16", "input_fidelity", fidelity, "invalid_value", path=EDITS) for fidelity in ("low", "medium")),
    *(field(row, name, value, code, path=path) for path in (EDITS, VIDEO_EDITS, EXTENSIONS)
      for row, name, value, code in OF_ANY_CALL),
    *(field("B10", "n", n, "invalid_n", path=EDITS) for n in (0, 11, True)),
    *(field("B10", "n", 2, "unsupported_parameter", path=path) for path in (VIDEO_EDITS, EXTENSIONS)),
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
        ("limit=abc", "invalid_type", "limit"), ("limit=1_0", "invalid_type", "limit"),
        ("limit=%D9%A3", "invalid_type", "limit"), ("limit=%201", "invalid_type", "limit"),
        ("order=bad", "invalid_value", "order"),
        ("after=video_none", "invalid_cursor", "after"))),
    get("B29", "unknown", UNKNOWN_VIDEO, 404, "video_not_found", "video_id", "DELETE"),
    *(get("B15", f"{method} query", f"{path}?no_such=1", 400, "unknown_parameter", "no_such", method)
      for method, path in (
        *(("POST", path) for path in (IMAGES, *TAKING_FORMS, REMIX)),
        ("GET", UNKNOWN_VIDEO), ("DELETE", UNKNOWN_VIDEO), ("GET", f"/v1/images/img_{'0' * 32}/content"),
        ("GET", "/v1/models"), ("GET", "/server_info"), ("GET", "/metrics"))),
    body("B15", "query", b'{"prompt": "a"}', 400, "unknown_parameter", param="seed", path=f"{IMAGES}?seed=1"),
    get("B31", "characters", f"{VIDEOS}/characters", 404, "unsupported", None, "POST"),
    get("B31", "character", f"{VIDEOS}/characters/char_1", 404, "unsupported", None),
    get("B31", "route", "/v2/images", 404, "not_found", None),
    get("B31", "method", IMAGES, 405, "method_not_allowed", None, "PUT"),
    get("B31", "method", "/server_info", 405, "method_not_allowed", None, "DELETE"),
    body("B32", "1.2 MB", b'{"prompt": "' + b"a" * 1_200_000 + b'"}', 413, "body_too_large"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_input_is_refused_at_the_door(server: RunningServer, case: Bad) -> None:
    headers = {"content-type": case.content_type, "content-encoding": case.coding}
    headers = {name: value for name, value in headers.items() if value is not None}
    files = sorted(server.files_dir.rglob("*"))
    reply = server.client.request(case.method, case.path, content=case.content, headers=headers)
    error = error_of(reply, case.status)
    assert (error["code"], error["param"]) == (case.code, case.param), error["message"]
    assert not server.engine.submitted, "the engine does not hear of it"
    assert sorted(server.files_dir.rglob("*")) == files, "nothing is left on disk"
    assert "x-should-retry" not in reply.headers, "no client repeats a 4xx of these"
    if case.status == 405:
        assert reply.headers["allow"]


@pytest.fixture(scope="module")
def finished_video(shared_server: RunningServer) -> str:
    """The path of a video that is there."""
    shared_server.engine.held, shared_server.engine.state = False, READY
    path = f"{VIDEOS}/{shared_server.post_video().json()['id']}"
    wait_for(lambda: shared_server.client.get(path).json()["status"] == "completed")
    return path


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [*(case[1:] for case in OF_ANY_CALL), ("prompt", "", "empty_prompt"), ("stream", True, "unsupported_parameter")],
)
def test_b11_to_b18_a_bad_field_of_a_remix_is_refused(
    server: RunningServer, finished_video: str, name: str, value: Any, code: str
) -> None:
    content = json.dumps({"prompt": "a", name: value})
    server.engine.state = FROM_CLIPS
    reply = server.client.post(f"{finished_video}/remix", content=content, headers={"content-type": JSON})
    assert_error(reply, 400, code, name)
    assert not server.engine.submitted


def test_b16_a_choice_that_is_not_there_is_refused_with_its_reason(server: RunningServer) -> None:
    assert "num_inference_steps" in error_of(server.post_image(quality="hd"), 400)["message"]
    reply = server.client.post(EDITS, json={"prompt": "a", "input_fidelity": "low"})
    assert "`strength` says how far" in error_of(reply, 400)["message"]
    assert server.post_image(quality="standard").status_code == 200, "what OpenAI's client has as its default"


def test_b31_a_405_names_all_methods_of_the_path(server: RunningServer) -> None:
    for path, methods in ((VIDEOS, "GET, POST"), (UNKNOWN_VIDEO, "DELETE, GET"), (IMAGES, "POST"), ("/health", "GET")):
        assert server.client.put(path).headers["allow"] == methods


@pytest.mark.parametrize("name", ["seed", "output_format", "size", "guidance_scale"])
@pytest.mark.parametrize("path", [VIDEOS, EDITS])
def test_a_text_that_spells_null_is_no_value(server: RunningServer, path: str, name: str) -> None:
    server.engine.state = EDITING
    files: dict[str, Any] = {"prompt": (None, "a"), name: (None, "null")}
    if path == EDITS:
        files |= {"image": ("f", PNG), "response_format": (None, "url")}
    reply = server.client.post(path, files=files)
    if name == "size":  # any text is a value here
        assert_error(reply, 400, "invalid_size", "size")
        return
    assert reply.status_code == 200, reply.text
    [params] = server.engine.submitted.values()
    assert params.output_format == ("mp4" if path == VIDEOS else "png")
    assert params.guidance_scale == 3.0 and isinstance(params.seed, int)


@pytest.mark.parametrize("path", [EDITS, VIDEOS, VIDEO_EDITS])
@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"size": "4096x4096"}, "size_above_maximum", "size"),
        ({"size": "65x64"}, "invalid_size", "size"),
        ({"size": "512x512", "num_inference_steps": "900"}, "cost_above_maximum", "num_inference_steps"),
        ({"size": "64x64", "prompt": "\u200b"}, "empty_prompt", "prompt"),
    ],
)
def test_what_no_input_can_make_acceptable_is_refused_before_one_is_decoded(
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    fields: dict[str, str],
    code: str,
    param: str,
) -> None:
    server.engine.state = EDITING if path == EDITS else FROM_CLIPS
    name = {EDITS: "image", VIDEOS: "video", VIDEO_EDITS: "video"}[path]
    decoded: list[Any] = []
    monkeypatch.setattr(media_reading, "read_sources", decoded.append)
    reply = server.client.post(path, data={"prompt": "a", **fields}, files={name: ("f", PNG)})
    assert_error(reply, 400, code, param)
    assert not decoded and not server.engine.submitted


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
            server.client.post(EDITS, json={"prompt": "a", "image": PNG_URL, "mask": {"image_url": url}}),
            server.client.post(EDITS, files={"prompt": (None, "a"), "image": (None, url)}),
            *(server.client.post(VIDEOS, json={"prompt": "a", name: url}) for name in ("last_image", "video")),
            *(server.client.post(path, json={"prompt": "a", "video": {"video_url": url}})
              for path in (VIDEO_EDITS, EXTENSIONS)),
            server.client.post(VIDEOS, files={"prompt": (None, "a"), "input_reference[image_url]": (None, url)}),
        ]  # fmt: skip
        assert {error_of(reply, 400)["code"] for reply in replies} == {"url_not_allowed"}
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


def test_b27_a_range_of_10_000_parts_that_a_head_may_hold_costs_no_more_than_the_file(
    server: RunningServer, finished_video: str
) -> None:
    many = "bytes=" + ",".join(["0-"] * 10_000)
    began = time.perf_counter()
    reply = server.client.get(f"{finished_video}/content", headers={"range": many})
    assert (reply.status_code, reply.content) == (200, bytes(range(200)))
    assert time.perf_counter() - began < 0.5


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


CHUNKED = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_b32_a_bad_chunk_after_the_reply_ends_the_connection(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(CHUNKED % b"text/plain" + b"2\r\n{}\r\n")
        reply = b""
        while not reply.endswith(b"}}"):
            reply += connection.recv(65536)
        assert reply.startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"nonsense\r\n")
        assert connection.recv(65536) == b"", "nothing follows a reply that was sent"
    assert server.client.get("/liveness").status_code == 200
    assert not errors_in(caplog)


def test_b32_a_bad_chunk_before_the_reply_is_answered_once(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    answer = server.exchange(CHUNKED % JSON.encode() + b"2\r\n{}\r\nnonsense\r\n")
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(content)["error"]["code"] == "invalid_http"
    assert server.client.get("/liveness").status_code == 200
    assert not errors_in(caplog)


def test_b32_a_bad_chunk_during_the_reply_cuts_it_short(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that has begun before all of the body has come; the rest of the body is no body."""
    server.engine.held = True
    video_id = server.post_video().json()["id"]
    head = f"GET {VIDEOS}/{video_id}/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode())
        reply = b""
        while b"video.in_progress" not in reply:
            reply += connection.recv(65536)
        connection.sendall(b"nonsense\r\n")
        rest = b"".join(iter(lambda: connection.recv(65536), b""))
    assert not (reply + rest).endswith(b"0\r\n\r\n"), "no clean end"
    assert server.client.get("/liveness").status_code == 200
    server.engine.held = False
    assert not errors_in(caplog)


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
