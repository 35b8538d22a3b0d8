"""OpenAI's own client, in both its forms, against a scripted engine: what it is given, raises, follows and retries."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest
from PIL import Image

from sglang.multimodal_gen.configs.model_info import STARTS_FROM_A_CLIP
from sglang.multimodal_gen.errors import QueueFull
from sglang.multimodal_gen.test.clips import clip, save
from sglang.multimodal_gen.test.scripted_server import MODEL, READY, RunningServer, Start, wait_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # variations
]

KEY = "a-key-of-some-user"
LIMITS = msgspec.structs.replace(MODEL.limits, inputs=STARTS_FROM_A_CLIP)
FROM_CLIPS = msgspec.structs.replace(READY, model=msgspec.structs.replace(MODEL, limits=LIMITS))
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    return start_server(api_keys=(KEY,))


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    shared_server.client.headers["authorization"] = f"Bearer {KEY}"
    shared_server.engine.refusal, shared_server.engine.state = None, FROM_CLIPS
    shared_server.engine.submitted.clear()
    return shared_server


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, server: RunningServer) -> Call:
    """`call(work, **options)` is what `work(client)` gives: of a page or a stream, all that comes."""

    def call_sync(work: Callable[[Any], Any], **options: Any) -> Any:
        with openai.OpenAI(**_options(server, options)) as client:
            found = work(client)
            return list(found) if isinstance(found, openai.Stream) or hasattr(found, "has_next_page") else found

    async def await_it(work: Callable[[Any], Any], options: dict[str, Any]) -> Any:
        async with openai.AsyncOpenAI(**_options(server, options)) as client:
            found = work(client)
            if inspect.isawaitable(found) and not hasattr(found, "__aiter__"):
                found = await found
            return [each async for each in found] if hasattr(found, "__aiter__") else found

    return call_sync if request.param == "sync" else lambda work, **options: asyncio.run(await_it(work, options))


def _options(server: RunningServer, options: dict[str, Any]) -> dict[str, Any]:
    base_url = f"http://127.0.0.1:{server.port}/v1"
    return {"base_url": base_url, "api_key": KEY, "max_retries": 0, "timeout": 10, **options}


def test_a_wrong_key_is_an_authentication_error(call: Call) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        call(lambda client: client.images.generate(prompt="a"), api_key="a-key-of-nobody")
    assert (raised.value.code, raised.value.type) == ("invalid_api_key", "invalid_request_error")
    assert raised.value.request_id and "nobody" not in raised.value.message


def test_a_full_queue_is_a_rate_limit_error_which_the_client_retries(server: RunningServer, call: Call) -> None:
    server.engine.refusal = QueueFull(3, retry_after_s=1)
    with pytest.raises(openai.RateLimitError) as raised:
        call(lambda client: client.images.generate(prompt="a"))
    assert (raised.value.code, raised.value.type) == ("queue_full", "rate_limit_error")
    assert raised.value.response.headers["retry-after"] == "1"
    before = server.engine.num_submits.total()
    with pytest.raises(openai.RateLimitError):
        call(lambda client: client.videos.create(prompt="a"), max_retries=1)
    assert server.engine.num_submits.total() - before == 2, "tried again once"


def test_variations_and_characters_are_not_found(call: Call) -> None:
    for work in (
        lambda client: client.images.create_variation(image=b"anything"),
        lambda client: client.videos.create_character(name="a", video=b"anything"),
        lambda client: client.videos.get_character("char_1"),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            call(work)
        assert raised.value.code == "unsupported"


def test_a_refused_field_is_named(call: Call) -> None:
    wrong: dict[str, Any] = {"style": "vivid", "quality": "hd", "background": "transparent", "size": "1x2", "n": 11}
    for name, value in wrong.items():
        with pytest.raises(openai.BadRequestError) as raised:
            call(lambda client, fields={name: value}: client.images.generate(prompt="a", **fields))
        assert raised.value.param == name


def test_webp_is_given_as_it_was_wished(server: RunningServer, call: Call) -> None:
    wish = {"output_format": "webp", "output_compression": 40, "quality": "standard", "size": "64x48", "user": "u"}
    reply = call(lambda client: client.images.generate(prompt="a", **wish))
    assert (reply.output_format, reply.size, reply.quality) == ("webp", "64x48", None)
    with Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json))) as picture:
        assert (picture.format, picture.size) == ("WEBP", (64, 48))
    assert [params.output_compression for params in server.engine.submitted.values()] == [40]


def test_a_stream_that_fails_in_the_middle_raises_with_the_code(call: Call) -> None:
    with pytest.raises(openai.APIError) as raised:
        call(lambda client: client.images.generate(prompt="fail", stream=True, partial_images=1))
    assert (raised.value.code, raised.value.type) == ("out_of_memory", "server_error")


def test_a_stream_is_the_clients_own_events(call: Call) -> None:
    *partial, last = call(lambda client: client.images.generate(prompt="a", stream=True, partial_images=2))
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert last.type == "image_generation.completed" and last.usage.total_tokens == 0


def test_a_key_of_the_callers_makes_one_video_of_two_calls(
    server: RunningServer, call: Call, request: pytest.FixtureRequest
) -> None:
    headers = {"Idempotency-Key": request.node.name}
    videos = [call(lambda client: client.videos.create(prompt="a", extra_headers=headers)) for _ in range(2)]
    assert videos[0].id == videos[1].id and len(server.engine.submitted) == 1
    with pytest.raises(openai.BadRequestError) as raised:
        call(lambda client: client.videos.create(prompt="b", extra_headers=headers))
    assert (raised.value.code, raised.value.param) == ("idempotency_mismatch", "idempotency-key")


def test_a_list_is_followed_page_by_page(server: RunningServer, call: Call) -> None:
    made = [server.post_video().json()["id"] for _ in range(3)]
    listed = call(lambda client: client.videos.list(limit=2, order="desc"))
    assert [video.id for video in listed][:3] == made[::-1]
    assert (
        len(listed)
        == len({video.id for video in listed})
        == server.client.get("/v1/videos?limit=100").text.count('"object":"video"')
    )


def test_a_video_is_made_polled_remixed_and_deleted(
    server: RunningServer, call: Call, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wish: dict[str, Any] = {"prompt": "a", "size": "64x48", "seconds": "0.5", "poll_interval_ms": 10}
    video = call(lambda client: client.videos.create_and_poll(**wish))
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "64x48", "0.5")
    path = server.files_dir / "videos" / f"{video.id}.mp4"
    path.write_bytes(save(clip(9), tmp_path_factory.mktemp("clip"), output_format="mp4").read_bytes())
    remixed = call(lambda client: client.videos.remix(video.id, prompt="b"))
    assert (remixed.remixed_from_video_id, remixed.prompt, remixed.size) == (video.id, "b", "64x48")
    wait_for(lambda: server.client.get(f"/v1/videos/{remixed.id}").json()["status"] == "completed")
    content = call(lambda client: client.videos.download_content(video.id, variant="thumbnail"))
    assert content.read() == b"thumbnail"
    for made in (video, remixed):
        assert call(lambda client, id_=made.id: client.videos.delete(id_)).deleted is True
    with pytest.raises(openai.NotFoundError) as raised:
        call(lambda client: client.videos.remix(video.id, prompt="b"))
    assert raised.value.code == "video_not_found"
