"""Images, masks and videos over HTTP: uploads and data URLs, against a scripted engine."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
from PIL import Image

from sglang.multimodal_gen.configs.model_info import InputLimits, SizeFromImage
from sglang.multimodal_gen.runtime.entrypoints import media_decoding
from sglang.multimodal_gen.runtime.entrypoints.openai import uploads
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import BodyLimits
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    READY,
    RunningServer,
    Start,
    error_of,
)
from sglang.multimodal_gen.test.test_media_inputs import clip, encoded, png_header

EDITS, VIDEOS = "/v1/images/edits", "/v1/videos"


def state(**inputs: Any) -> Any:
    """Ready with a model that takes these inputs; the first image gives the size."""
    rule = SizeFromImage(area=64 * 64, multiple=16, source="first")
    limits = msgspec.structs.replace(MODEL.limits, inputs=InputLimits(**inputs), size_from_image=rule)
    return msgspec.structs.replace(READY, model=msgspec.structs.replace(MODEL, limits=limits))


EDITOR = state(max_images=16, takes_mask=True, takes_strength=True)
ANIMATOR = state(min_images=1, max_images=1, takes_last_image=True, takes_video=True, takes_strength=True)


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    return start_server()


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    shared_server.engine.state = EDITOR
    shared_server.engine.submitted.clear()
    shared_server.engine.inputs.clear()
    return shared_server


@pytest.fixture
def animating(server: RunningServer) -> RunningServer:
    server.engine.state = ANIMATOR
    return server


def assert_error(reply: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """The whole error contract of one reply."""
    error = error_of(reply, status)
    assert (error["code"], error["param"]) == (code, param), error["message"]


def png(value: int = 7, *, width: int = 32, height: int = 16, **options: Any) -> bytes:
    return encoded(np.full((height, width, 3), value, np.uint8), **options).getvalue()


def mask(width: int = 32, height: int = 16) -> bytes:
    """A PNG whose left half is transparent."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, width // 2 :, 3] = 255
    return encoded(pixels).getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def post(server: RunningServer, path: str, files: tuple[tuple[str, bytes], ...], fields: dict[str, Any]) -> Any:
    """As a form, also where no field is a file."""
    texts = [(name, (None, str(value))) for name, value in ({"prompt": "x"} | fields).items()]
    return server.client.post(path, files=[*texts, *((name, ("f", data)) for name, data in files)])


def edit(server: RunningServer, *files: tuple[str, bytes], **fields: Any) -> httpx.Response:
    return post(server, EDITS, files, fields)


def edit_json(server: RunningServer, **fields: Any) -> httpx.Response:
    return server.client.post(EDITS, json={"prompt": "x", **fields})


def animate(server: RunningServer, *files: tuple[str, bytes], **fields: Any) -> httpx.Response:
    return post(server, VIDEOS, files, fields)


# --- edits ---


def test_uploads_reach_the_engine_decoded(server: RunningServer) -> None:
    files = (("image[]", png(1)), ("image[]", png(2, width=64)), ("mask", mask()))
    reply = edit(server, *files, n=2, strength="0.5", seed=3)
    assert reply.status_code == 200, reply.text
    assert (len(reply.json()["data"]), reply.json()["size"]) == (2, "96x48")
    assert [params.strength for params in server.engine.submitted.values()] == [0.5, 0.5]
    assert len(server.engine.inputs) == 2
    for inputs in server.engine.inputs.values():
        assert [image.shape for image in inputs.images] == [(16, 32, 3), (16, 64, 3)]
        assert inputs.mask is not None and inputs.mask[0].tolist() == [255] * 16 + [0] * 16
    assert edit(server, ("image", png()), size="64x64").json()["size"] == "64x64"


@pytest.mark.parametrize("kind", ["cmyk", "16 bits", "animated webp", "apng", "turned"])
def test_b19_a_picture_of_another_mode_is_converted(server: RunningServer, kind: str) -> None:
    picture = Image.fromarray(np.full((16, 32, 3), 200, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    deep = Image.fromarray(np.full((16, 32), 200 * 257, np.uint16))
    files: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "cmyk": (picture.convert("CMYK"), "JPEG", {"quality": 95}),
        "16 bits": (deep, "PNG", {}),
        "animated webp": (picture, "WEBP", {"save_all": True, "append_images": [deep.convert("L").convert("RGB")]}),
        "apng": (picture, "PNG", {"save_all": True, "append_images": [Image.new("RGB", (32, 16), "red")]}),
        "turned": (picture, "JPEG", {"exif": exif}),
    }
    image, file_format, options = files[kind]
    reply = edit(server, ("image", encoded(image, file_format, **options).getvalue()))
    assert reply.status_code == 200, reply.text
    [inputs] = server.engine.inputs.values()
    assert inputs.images[0].shape == ((32, 16, 3) if kind == "turned" else (16, 32, 3))
    assert np.abs(inputs.images[0].astype(int) - 200).max() <= 2


@pytest.mark.parametrize(
    "fields",
    [
        {"image": data_url(png())},
        {"image": {"image_url": data_url(png())}},
        {"images": [{"image_url": data_url(png())}]},
        {"image": [data_url(png())], "images": None, "mask": {"image_url": data_url(mask())}},
        {"extra_body": {"image": data_url(png(), "image/jpeg")}},
    ],
)
def test_json_takes_data_urls(server: RunningServer, fields: dict[str, Any]) -> None:
    reply = edit_json(server, **fields)
    assert reply.status_code == 200, reply.text
    [inputs] = server.engine.inputs.values()
    assert inputs.images[0][0, 0, 0] == 7 and (inputs.mask is not None) == ("mask" in fields)


def test_the_official_client_edits(server: RunningServer) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        one = client.images.edit(image=png(), prompt="x", mask=mask(), size="64x64")
        assert one.size == "64x64" and one.data is not None and one.data[0].b64_json
        several = client.images.edit(image=[png(), png()], prompt="x", extra_body={"strength": 0.25})
        assert several.size == "96x48"
        assert [len(inputs.images) for inputs in server.engine.inputs.values()] == [1, 2]
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.edit(image=b"text", prompt="x")
        assert (raised.value.code, raised.value.param) == ("invalid_image", "image")


def test_variations_are_not_offered(server: RunningServer) -> None:
    reply = server.client.post("/v1/images/variations", files={"image": ("f", png())})
    assert_error(reply, 404, "unsupported")


BIG_MASK = mask() + bytes(4_000_000)
BAD_EDITS = [
    # B19
    ([], {}, 400, "missing_required_parameter", "image"),
    ([("image[]", png())] * 17, {}, 400, "too_many_images", "image"),
    ([("image", b"")], {}, 400, "invalid_image", "image"),
    ([("image", b"this is text")], {}, 400, "invalid_image", "image"),
    ([("image", png(width=512, height=512)[:150])], {}, 400, "invalid_image", "image"),
    ([("image", png(width=8))], {}, 400, "invalid_image", "image"),
    # B20
    ([("image", png_header(14_000, 14_000).getvalue())], {}, 400, "image_too_many_pixels", "image"),
    ([("image[]", png_header(7000, 7000).getvalue())] * 3, {}, 400, "image_too_many_pixels", "image"),
    # B21
    ([("image", png()), ("mask", mask(64))], {}, 400, "invalid_mask", "mask"),
    ([("image", png()), ("mask", png())], {}, 400, "invalid_mask", "mask"),
    ([("image", png()), ("mask", BIG_MASK)], {}, 400, "invalid_mask", "mask"),
    ([("image", png()), ("mask", png(file_format="JPEG"))], {}, 400, "invalid_mask", "mask"),
    # the form
    ([("image", png()), ("image", png())], {}, 400, "duplicate_parameter", "image"),
    ([("image", png()), ("mask[]", mask()), ("mask[]", mask())], {}, 400, "duplicate_parameter", "mask"),
    ([("image[0]", png())], {}, 400, "unknown_parameter", "image"),
    ([("prompt_file", png())], {}, 400, "unknown_parameter", "prompt_file"),
    ([("markup", png())], {}, 400, "unsupported_parameter", "markup"),
    ([("image", png())], {"strength": "1.5"}, 400, "out_of_range", "strength"),
    ([("image", png())], {"width": "64"}, 400, "incompatible_parameters", "height"),
    ([("image", png())], {"input_fidelity": "low"}, 400, "invalid_value", "input_fidelity"),
    ([("image", png())], {"moderation": "low"}, 400, "unknown_parameter", "moderation"),
    ([("image", png())], {"image_path": "/etc/hostname"}, 400, "unknown_parameter", "image_path"),
    ([("image", png())], {"prompt": " "}, 400, "empty_prompt", "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "fields", "status", "code", "param"), BAD_EDITS)
def test_a_bad_edit_is_refused(
    server: RunningServer, files: list[tuple[str, bytes]], fields: dict[str, str], status: int, code: str, param: str
) -> None:
    files_before = sorted(server.files_dir.rglob("*"))
    assert_error(edit(server, *files, **fields), status, code, param)
    assert not server.engine.submitted
    assert sorted(server.files_dir.rglob("*")) == files_before


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        # B22, B23
        *(({"image": url}, "url_not_allowed") for url in (
            "http://127.0.0.1/a.png", "https://example.com/a.png", "file:///etc/hostname", "FTP://x/a",
            "http://169.254.169.254/latest",
        )),
        ({"image": {"image_url": "https://example.com/a.png"}}, "url_not_allowed"),
        ({"image": "/etc/hostname"}, "invalid_image"),
        ({"image": "data:image/png;base64,@@@@"}, "invalid_image"),
        ({"image": "data:image/png;base64,é"}, "invalid_image"),
        ({"image": "data:image/png,abc"}, "invalid_image"),
        ({"image": data_url(png(), "text/html")}, "invalid_image"),
        ({"image": data_url(b"text")}, "invalid_image"),
        ({"image": {"file_id": "file-1"}}, "unsupported_parameter"),
        ({"image": 5}, "invalid_type"),
        ({"image": {"url": "x"}}, "invalid_type"),
        ({"image": data_url(png()) , "images": [data_url(png())]}, "incompatible_parameters"),
        ({"image": [data_url(png())] * 17}, "too_many_images"),
        ({"image": []}, "missing_required_parameter"),
    ],
)  # fmt: skip
def test_a_bad_data_url_is_refused(server: RunningServer, fields: dict[str, Any], code: str) -> None:
    reply = edit_json(server, **fields)
    assert_error(reply, 400, code, "images" if code == "incompatible_parameters" else "image")
    assert "hostname" not in reply.text and not server.engine.submitted


def test_files_and_bodies_of_too_many_bytes_are_refused(
    server: RunningServer, start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are lowered: the way is the same."""
    monkeypatch.setitem(uploads.MAX_FILE_BYTES, "image", 100_000)
    monkeypatch.setitem(uploads.MAX_FILE_BYTES, "video", 100_000)
    large = png() + bytes(3_000_000)
    assert_error(edit(server, ("image", large)), 413, "image_too_large", "image")
    assert_error(edit_json(server, image=data_url(large)), 413, "image_too_large", "image")
    server.engine.state = ANIMATOR
    assert_error(animate(server, ("video", large)), 413, "video_too_large", "video")
    limited = start_server(body=BodyLimits(max_upload_bytes=100_000, max_json_upload_bytes=100_000))
    limited.engine.state = EDITOR
    assert_error(edit(limited, ("image[]", png() + bytes(60_000)), ("image[]", large)), 413, "body_too_large")
    assert_error(edit_json(limited, image=data_url(large)), 413, "body_too_large")
    assert_error(edit(server, ("image", png()), negative_prompt="a" * 2_000_000), 413, "body_too_large")


def test_a_model_without_inputs_says_so(server: RunningServer) -> None:
    server.engine.state = READY
    reply = edit(server, ("image", png()))
    assert_error(reply, 400, "unsupported_parameter", "image")
    assert "the model works from text alone" in reply.json()["error"]["message"]
    assert_error(edit(server), 400, "missing_required_parameter", "image")
    reply = server.client.post("/v1/images/generations", json={"prompt": "x", "strength": 0.5})
    assert_error(reply, 400, "unsupported_parameter", "strength")
    reply = server.client.post("/v1/images/generations", json={"prompt": "x", "image": data_url(png())})
    assert_error(reply, 400, "unknown_parameter", "image")


def test_an_edit_sent_again_with_the_same_key_runs_once_and_other_bytes_are_a_mismatch(server: RunningServer) -> None:
    def send(value: int) -> httpx.Response:
        files = [("image", ("f", png(value)))]
        return server.client.post(EDITS, data={"prompt": "x"}, files=files, headers={"idempotency-key": "edit-1"})

    assert send(1).content == send(1).content
    assert len(server.engine.submitted) == 1
    assert_error(send(2), 400, "idempotency_mismatch", "idempotency-key")


# --- videos ---


def test_a_video_starts_from_uploads(animating: RunningServer) -> None:
    video = clip("mp4", "libx264").getvalue()
    reply = animate(animating, ("input_reference", png(5)), ("last_image", png(6)), ("video", video), seconds="1")
    assert reply.status_code == 200, reply.text
    assert reply.json()["size"] == "96x48"
    [inputs] = animating.engine.inputs.values()
    assert (inputs.images[0][0, 0, 0], inputs.video is not None and inputs.video.fps) == (5, 10.0)
    assert inputs.last_image is not None and inputs.last_image[0, 0, 0] == 6


@pytest.mark.parametrize("form", ["json", "object", "multipart", "bracket"])
def test_a_video_takes_a_data_url(animating: RunningServer, form: str) -> None:
    url = data_url(png(9))
    forms: dict[str, dict[str, Any]] = {
        "json": {"json": {"prompt": "x", "input_reference": url}},
        "object": {"json": {"prompt": "x", "input_reference": {"image_url": url}}},
        "multipart": {"files": {"prompt": (None, "x"), "input_reference": (None, url)}},
        "bracket": {"files": {"prompt": (None, "x"), "input_reference[image_url]": (None, url)}},
    }
    reply = animating.client.post(VIDEOS, **forms[form])
    assert reply.status_code == 200, reply.text
    [inputs] = animating.engine.inputs.values()
    assert inputs.images[0][0, 0, 0] == 9


@pytest.mark.parametrize(
    ("files", "fields", "code", "param"),
    [
        ([], {}, "missing_required_parameter", "input_reference"),
        ([("input_reference", png()), ("input_reference", png())], {}, "duplicate_parameter", "input_reference"),
        ([("input_reference[]", png())] * 2, {}, "duplicate_parameter", "input_reference"),
        ([("input_reference", b"junk")], {}, "invalid_image", "input_reference"),
        ([("input_reference", png()), ("video", b"\0\0\0\0ftypjunk")], {}, "invalid_video", "video"),
        ([("input_reference", png()), ("last_image", b"junk")], {}, "invalid_image", "last_image"),
        ([("input_reference", png())], {"video_path": "/etc/hostname"}, "unknown_parameter", "video_path"),
        ([("input_reference", png())], {"last_image[file_id]": "f"}, "unsupported_parameter", "last_image"),
    ],
)
def test_a_bad_video_upload_is_refused(
    animating: RunningServer, files: list[tuple[str, bytes]], fields: dict[str, str], code: str, param: str
) -> None:
    assert_error(animate(animating, *files, **fields), 400, code, param)
    assert not animating.engine.submitted


def test_b25_a_video_that_is_too_long_is_refused(animating: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered: the way is the same."""
    monkeypatch.setattr(media_decoding, "MAX_VIDEO_FRAMES", 4)
    video = clip("mp4", "libx264", num_frames=5).getvalue()
    reply = animate(animating, ("input_reference", png()), ("video", video))
    assert_error(reply, 400, "video_too_long", "video")
    assert not animating.engine.submitted


@pytest.mark.parametrize("name", ["../../x.png", "/etc/passwd", "..\\x", "a\0b.png", "x" * 4096, ""])
def test_the_name_of_an_upload_is_never_looked_at(server: RunningServer, name: str) -> None:
    files_before = sorted(server.files_dir.rglob("*"))
    body = (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="' + name.encode() + b'"\r\n\r\n' + png()
        + b"\r\n--b--\r\n"
    )  # fmt: skip
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert server.client.post(EDITS, content=body, headers=headers).status_code == 200
    assert sorted(server.files_dir.rglob("*")) == files_before


def test_a_large_upload_is_read_from_disk_as_from_memory(server: RunningServer) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    large = encoded(noise).getvalue()
    assert len(large) > 1_000_000
    assert edit(server, ("image", large)).status_code == 200
    [inputs] = server.engine.inputs.values()
    np.testing.assert_array_equal(inputs.images[0], noise)


def test_the_openapi_page_tells_of_files(server: RunningServer) -> None:
    page = server.client.get("/openapi.json").json()
    content = page["paths"][EDITS]["post"]["requestBody"]["content"]
    form = content["multipart/form-data"]["schema"]["properties"]
    assert (form["image"]["format"], form["image[]"]["items"]["format"]) == ("binary", "binary")
    assert form["mask"]["format"] == "binary" and "strength" in form and "image_path" not in form
    schemas = {media_type: each["schema"] for media_type, each in content.items()}
    assert "base64" in schemas["application/json"]["properties"]["image"]["anyOf"][0]["description"]
    assert set(page["paths"][VIDEOS]["post"]["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert "/v1/images/variations" not in page["paths"]
    assert json.dumps(server.client.get("/v1/models").json()["data"][0]["limits"]["inputs"])


def test_a_lossy_upload_is_what_its_decoder_gives(server: RunningServer) -> None:
    data = png(100, file_format="JPEG")
    edit(server, ("image", data))
    [inputs] = server.engine.inputs.values()
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(inputs.images[0], np.asarray(image))
