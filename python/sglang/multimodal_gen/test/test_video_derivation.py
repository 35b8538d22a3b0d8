"""Remixes, edits and extensions over HTTP, on a scripted engine: what reaches the engine, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_CLIP, InputLimits
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import DecodedInputs
from sglang.multimodal_gen.test.clips import clip, save
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    READY,
    RunningServer,
    Start,
    assert_error,
    wait_for,
)

VIDEOS = "/v1/videos"


def state(*tasks: str, inputs: InputLimits) -> Any:
    limits = msgspec.structs.replace(MODEL.limits, inputs=inputs)
    return msgspec.structs.replace(READY, model=msgspec.structs.replace(MODEL, tasks=tasks, limits=limits))


FROM_CLIPS = state("T2V", inputs=STARTS_FROM_A_CLIP)
FROM_IMAGES = state("I2V", inputs=InputLimits(min_images=1, max_images=1))
FROM_TEXT = state("T2V", inputs=InputLimits())
FIRST_AND_LAST = state("I2V", inputs=InputLimits(min_images=1, max_images=1, requires_last_image=True))
EDITS, EXTENSIONS = f"{VIDEOS}/edits", f"{VIDEOS}/extensions"


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    return start_server()


@pytest.fixture(scope="module")
def video_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(clip(9), tmp_path_factory.mktemp("clip"), output_format="mp4").read_bytes()


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    shared_server.engine.state = FROM_CLIPS
    shared_server.engine.held = False
    shared_server.engine.submitted.clear()
    shared_server.engine.inputs.clear()
    return shared_server


@pytest.fixture
def source(server: RunningServer, video_file: bytes) -> str:
    """The id of a completed video whose bytes are a real one's."""
    wish = {"size": "64x48", "num_frames": 9, "num_inference_steps": 7, "seed": 5, "negative_prompt": "rain"}
    video_id = str(server.post_video(**wish).json()["id"])
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")
    path = server.files_dir / "videos" / f"{video_id}.mp4"
    path.write_bytes(video_file)
    return video_id


def sent(server: RunningServer, reply: httpx.Response) -> tuple[dict[str, Any], Any, DecodedInputs | None]:
    """The reply, and what the engine got."""
    assert reply.status_code == 200, reply.text
    video = reply.json()
    return video, server.engine.submitted[video["id"]], server.engine.inputs.get(video["id"])


def test_a_remix_has_the_parameters_and_the_pictures_of_its_source(server: RunningServer, source: str) -> None:
    reply = server.client.post(f"{VIDEOS}/{source}/remix", json={"prompt": "a blue star"})
    video, params, inputs = sent(server, reply)
    assert video["remixed_from_video_id"] == source
    assert server.client.get(f"{VIDEOS}/{video['id']}").json()["remixed_from_video_id"] == source
    assert (params.prompt, params.negative_prompt, params.width, params.height) == ("a blue star", "rain", 64, 48)
    assert (params.num_frames, params.num_inference_steps, params.strength) == (9, 7, 0.7)
    assert inputs is not None and inputs.video is not None
    assert inputs.video.frames.shape == (9, 48, 64, 3)
    assert np.abs(inputs.video.frames.astype(int) - clip(9)).mean() < 6


def test_a_remix_may_change_more_than_the_prompt(server: RunningServer, source: str) -> None:
    changes = {"prompt": "x", "seed": 11, "strength": 0.25, "num_inference_steps": 3, "seconds": "0.25"}
    _, params, _ = sent(server, server.client.post(f"{VIDEOS}/{source}/remix", json=changes))
    assert (params.seed, params.strength, params.num_inference_steps, params.num_frames) == (11, 0.25, 3, 5)


def test_an_edit_takes_a_file_or_a_video_of_this_server(server: RunningServer, source: str, video_file: bytes) -> None:
    file = {"video": ("v", video_file, "application/octet-stream")}
    _, params, inputs = sent(server, server.client.post(EDITS, data={"prompt": "x", "size": "64x48"}, files=file))
    assert params.strength == 0.7 and inputs is not None and inputs.video is not None
    reply = server.client.post(EDITS, json={"prompt": "x", "video": {"id": source}})
    _, params, inputs = sent(server, reply)
    assert (params.width, params.num_inference_steps) == (64, 7)
    assert inputs is not None and inputs.video is not None and len(inputs.video.frames) == 9


def test_a_multipart_edit_names_a_video_by_its_id(server: RunningServer, source: str) -> None:
    boundary = "b"
    parts = "".join(
        f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in (("prompt", "x"), ("video[id]", source))
    )
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    reply = server.client.post(EDITS, content=f"{parts}--{boundary}--\r\n".encode(), headers=headers)
    _, _, inputs = sent(server, reply)
    assert inputs is not None and inputs.video is not None


def test_an_extension_goes_on_from_the_last_frame(server: RunningServer, source: str) -> None:
    server.engine.state = FROM_IMAGES
    reply = server.client.post(EXTENSIONS, json={"prompt": "x", "video": {"id": source}, "seconds": "0.5"})
    _, params, inputs = sent(server, reply)
    assert params.num_frames == 9 and params.strength is None
    assert inputs is not None and inputs.video is None
    [image] = inputs.images
    assert np.abs(image.astype(int) - clip(9)[-1]).mean() < 6


@pytest.mark.parametrize(
    ("engine_state", "path", "code"),
    [
        (FROM_TEXT, EDITS, "unsupported_parameter"),
        (FROM_IMAGES, EDITS, "unsupported_parameter"),
        (FROM_TEXT, EXTENSIONS, "unsupported_parameter"),
        (FROM_CLIPS, EXTENSIONS, "unsupported_parameter"),
        (FIRST_AND_LAST, EXTENSIONS, "unsupported_parameter"),
    ],
)
def test_a_model_that_cannot_is_refused_with_the_reason(
    server: RunningServer, source: str, engine_state: Any, path: str, code: str
) -> None:
    server.engine.state = engine_state
    assert_error(server.client.post(path, json={"prompt": "x", "video": {"id": source}}), 400, code, "video")


def test_a_remix_by_a_model_that_works_from_text_is_refused(server: RunningServer, source: str) -> None:
    server.engine.state = FROM_TEXT
    reply = server.client.post(f"{VIDEOS}/{source}/remix", json={"prompt": "x"})
    assert_error(reply, 400, "unsupported_parameter", "video")


def test_bad_sources_are_refused(server: RunningServer, source: str, video_file: bytes) -> None:
    unknown = "video_" + "0" * 32
    for reply in (
        server.client.post(f"{VIDEOS}/{unknown}/remix", json={"prompt": "x"}),
        server.client.post(f"{VIDEOS}/..%2F..%2Fx/remix", json={"prompt": "x"}),
        server.client.post(EDITS, json={"prompt": "x", "video": {"id": unknown}}),
    ):
        assert_error(reply, 404, "video_not_found", "video_id")
    assert_error(server.client.post(EDITS, json={"prompt": "x"}), 400, "missing_required_parameter", "video")
    both = {"video": ("v", video_file)}
    reply = server.client.post(EDITS, data={"prompt": "x", "video_id": source}, files=both)
    assert_error(reply, 400, "incompatible_parameters", "video")
    junk = {"video": ("v", b"no video at all")}
    assert_error(server.client.post(EDITS, data={"prompt": "x"}, files=junk), 400, "invalid_video", "video")
    assert_error(server.client.post(f"{VIDEOS}/{source}/remix", json={}), 400, "missing_required_parameter", "prompt")
    reply = server.client.post(f"{VIDEOS}/{source}/remix", json={"prompt": "x", "video": "data:video/mp4;base64,AA"})
    assert_error(reply, 400, "unknown_parameter", "video")
    server.engine.held = True
    running = server.post_video().json()["id"]
    reply = server.client.post(f"{VIDEOS}/{running}/remix", json={"prompt": "x"})
    assert_error(reply, 400, "video_not_ready", "video_id")
    (Path(server.files_dir) / "videos" / f"{source}.mp4").unlink()
    reply = server.client.post(f"{VIDEOS}/{source}/remix", json={"prompt": "x"})
    assert_error(reply, 404, "video_not_found", "video_id")
