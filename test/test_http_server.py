"""A real server, the embedded model and OpenAI's own client."""

from __future__ import annotations

import base64
import io
import time
import urllib.request
from collections.abc import Iterator

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


def test_liveness_answers_within_two_seconds_of_the_command(server: ServerProcess) -> None:
    """The figure of the issue, with half a second for a test machine that does other things too."""
    assert server.live_after_s <= 2.5


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
    with pytest.raises(openai.APITimeoutError):
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
