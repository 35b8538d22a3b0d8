"""A real server, the embedded model and OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import openai
import pytest
from PIL import Image

from server_process import ServerProcess

# OpenAI's own service for videos ends; its client goes on speaking the format.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")

PROMPT = "a red circle moving right"
# Few steps: these tests are about the way a request takes, not about how the result looks.
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60) as made:
        yield made


def test_liveness_answers_before_the_model_is_loaded(server: ServerProcess) -> None:
    """How soon is for `sglang bench startup` to say."""
    assert not server.was_ready_when_live


def test_the_served_model_is_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == ("demo", "sglang")
    assert client.models.retrieve("demo").id == "demo"


def test_images_come_as_base64_and_the_same_seed_gives_the_same_image(client: openai.OpenAI) -> None:
    """Equal but for one level of 255: requests that happen to share a forward sum in another order."""

    def generate() -> list[np.ndarray]:
        reply = client.images.generate(prompt="a blue square", n=2, extra_body={**STEPS, "seed": 1})
        assert reply.data is not None and (reply.output_format, reply.size) == ("png", "128x128")
        return [pixels(base64.b64decode(image.b64_json or "")) for image in reply.data]

    first, second = generate()
    assert first.shape == second.shape == (128, 128, 3)
    assert np.abs(first - second).max() > 1, "each image has a seed of its own"
    for again, before in zip(generate(), (first, second), strict=True):
        assert np.abs(again - before).max() <= 1


def pixels(data: bytes) -> np.ndarray:
    """The PNG's values as int16 [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(np.int16)


def test_an_image_can_be_fetched_by_url(client: openai.OpenAI) -> None:
    reply = client.images.generate(
        prompt="a blue square", size="64x64", response_format="url", output_format="jpeg", extra_body=STEPS
    )
    assert reply.data is not None and reply.data[0].url is not None
    with urllib.request.urlopen(reply.data[0].url) as fetched, Image.open(io.BytesIO(fetched.read())) as picture:
        assert fetched.headers["content-type"] == "image/jpeg"
        assert (picture.format, picture.size) == ("JPEG", (64, 64))


def num_frames(video: bytes) -> int:
    """Frames that a decoder finds."""
    with av.open(io.BytesIO(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_created_polled_downloaded_listed_and_deleted(client: openai.OpenAI) -> None:
    created = client.videos.create(prompt=PROMPT, seconds="1", size="64x64", extra_body={**STEPS, "seed": 4})
    assert (created.status, created.seconds, created.size) == ("queued", "1", "64x64")
    video = client.videos.poll(created.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert num_frames(client.videos.download_content(video.id).content) == 17
    for variant, file_format, size in (("thumbnail", "WEBP", (64, 64)), ("spritesheet", "JPEG", (5 * 64, 4 * 64))):
        content = client.videos.download_content(video.id, variant=variant).content  # type: ignore[arg-type]
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.format, picture.size) == (file_format, size)
    assert video.id in [listed.id for listed in client.videos.list()]
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError) as raised:
        client.videos.retrieve(video.id)
    assert raised.value.code == "video_not_found"


def test_create_and_poll_gives_the_models_default_video(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body=STEPS)
    assert (video.status, video.seconds, video.size) == ("completed", "2", "128x128")
    assert num_frames(client.videos.download_content(video.id).content) == 33


def test_a_running_video_can_be_deleted_and_the_server_goes_on(client: openai.OpenAI) -> None:
    created = client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 1000})
    while client.videos.retrieve(created.id).status == "queued":
        time.sleep(0.05)
    with pytest.raises(openai.BadRequestError) as raised:
        client.videos.download_content(created.id)
    assert raised.value.code == "video_not_ready"
    began = time.monotonic()
    assert client.videos.delete(created.id).deleted is True
    assert time.monotonic() - began < 5, "a delete waits for the running step, not for the video"
    assert client.images.generate(prompt="a star", extra_body=STEPS).data


def test_an_abandoned_image_does_not_hold_up_the_next(client: openai.OpenAI) -> None:
    slow = {"num_inference_steps": 1000}
    # The server knows how long the client waits, and may say so just before.
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
        client.with_options(timeout=0.5, max_retries=0).images.generate(prompt="a star", extra_body=slow)
    began = time.monotonic()
    assert client.images.generate(prompt="a star", extra_body=STEPS).data
    assert time.monotonic() - began < 10


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad_size:
        client.images.generate(prompt="a star", size="65x67")
    assert (bad_size.value.code, bad_size.value.param, bad_size.value.type) == (
        "invalid_size",
        "size",
        "invalid_request_error",
    )
    assert bad_size.value.request_id
    with pytest.raises(openai.NotFoundError) as no_model:
        client.images.generate(prompt="a star", model="dall-e-3")
    assert (no_model.value.code, no_model.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.videos.create(prompt="a star", extra_body={"no_such_field": "1"})
    assert unknown.value.code == "unknown_parameter"
    with pytest.raises(openai.BadRequestError) as file:
        client.videos.create(prompt="a star", input_reference=b"\x89PNG")
    assert (file.value.code, file.value.param) == ("invalid_image", "input_reference")
    with pytest.raises(openai.BadRequestError) as empty:
        client.images.generate(prompt="  ")
    assert empty.value.code == "empty_prompt"


# --- streams ---

SMALL: dict[str, Any] = {"prompt": "a red circle", "size": "64x64", "output_format": "png"}


def difference(data: str, result: np.ndarray) -> float:
    """Mean distance of a picture in base64 from the result, in levels of 255."""
    shown = pixels(base64.b64decode(data))
    assert shown.shape == result.shape
    return float(np.abs(shown - result).mean())


def test_a_streamed_image_comes_nearer_to_its_result(client: openai.OpenAI) -> None:
    """After half of the steps it is nearer than after a quarter, and in the end it is the image of the plain call."""
    extra = {"num_inference_steps": 40, "seed": 3}
    stream = client.images.generate(**SMALL, stream=True, partial_images=3, extra_body=extra)
    *partial, completed = list(stream)
    assert completed.type == "image_generation.completed" and completed.usage.total_tokens == 0
    result = pixels(base64.b64decode(completed.b64_json))
    distances = []
    for index, event in enumerate(partial):
        assert event.type == "image_generation.partial_image"
        assert (event.partial_image_index, event.size, event.output_format) == (index, "64x64", "png")
        distances.append(difference(event.b64_json, result))
    assert distances and distances == sorted(distances, reverse=True) and distances[-1] < 20
    plain = client.images.generate(**SMALL, extra_body=extra)
    assert plain.data is not None and difference(plain.data[0].b64_json or "", result) <= 1


def test_an_edited_image_is_streamed_to_asynchronous_clients(server: ServerProcess) -> None:
    async def events() -> list[Any]:
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(picture, format="png")
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60) as client:
            stream = await client.images.edit(
                image=picture.getvalue(),
                **SMALL,
                stream=True,
                partial_images=1,
                extra_body={"num_inference_steps": 20, "strength": 1.0},
            )
            return [event async for event in stream]

    *partial, completed = asyncio.run(events())
    assert {event.type for event in partial} <= {"image_edit.partial_image"}
    assert completed.type == "image_edit.completed"
    assert pixels(base64.b64decode(completed.b64_json)).shape == (64, 64, 3)


def test_a_stream_that_is_left_frees_the_engine_long_before_its_end(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    extra = {"num_inference_steps": 1000}
    with client.images.generate(**SMALL, stream=True, partial_images=3, extra_body=extra):
        wait_for_running(server, 1)
    wait_for_running(server, 0, seconds=5)  # 1000 steps take much longer


def wait_for_running(server: ServerProcess, number: int, *, seconds: float = 30) -> None:
    """Until the scheduler holds so many requests."""
    deadline = time.monotonic() + seconds
    while running_requests(server) != number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running_requests(server: ServerProcess) -> int:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    [value] = [line.split()[-1] for line in lines if line.startswith("sglang_diffusion_num_running_reqs ")]
    return int(float(value))


def test_errors_of_a_stream_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(**SMALL, n=2, stream=True)
    assert (raised.value.code, raised.value.param) == ("incompatible_parameters", "n")


def test_a_video_is_watched_from_its_start_to_its_end(client: openai.OpenAI, server: ServerProcess) -> None:
    created = client.videos.create(prompt=PROMPT, seconds="1", size="64x64", extra_body={"num_inference_steps": 40})
    found = list(events_of(f"{server.url}/v1/videos/{created.id}/events"))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    previews = [event for event in found if event["type"] == "video.preview"]
    assert previews and found[-1]["type"] == "video.completed"
    steps = [preview["step"] for preview in previews]
    assert steps == sorted(set(steps)) and steps[-1] < 40
    with Image.open(io.BytesIO(base64.b64decode(previews[-1]["b64_json"]))) as picture:
        assert (picture.format, picture.size, previews[-1]["media_type"]) == ("WEBP", (64, 64), "image/webp")
    progress = [event["video"]["progress"] for event in found if "video" in event]
    assert progress == sorted(progress) and progress[-1] == 100


def events_of(url: str) -> Iterator[dict[str, Any]]:
    with urllib.request.urlopen(url, timeout=120) as reply:
        for line in reply:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))
