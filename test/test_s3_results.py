"""A real server whose results go to a real S3 server, and OpenAI's own client."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image

from server_process import ServerProcess, running_server
from sglang.multimodal_gen.test.s3_server import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    Proxy,
    S3Server,
    proxy_to,
    s3_server,
    store_variables,
)

# OpenAI's own service for videos ends; its client goes on speaking the format.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")

SGLANG = str(Path(sys.executable).with_name("sglang"))
STEPS = {"num_inference_steps": 1}
SMALL = {**STEPS, "num_frames": 5}


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[S3Server, Proxy]]:
    with s3_server() as server, proxy_to(server) as proxy:
        yield server, proxy


@pytest.fixture
def s3(store: tuple[S3Server, Proxy]) -> Iterator[S3Server]:
    store[0].clear()
    yield store[0]
    store[1].reset()


@pytest.fixture(scope="module")
def served(store: tuple[S3Server, Proxy], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    env = {**os.environ, **store_variables(store[1].url, key_prefix="made", upload_timeout="2")}
    command = [SGLANG, "serve", "--port", "0", "--state-dir", str(tmp_path_factory.mktemp("state"))]
    with running_server(command, env=env) as running:
        yield running
    log = "".join(running.log)
    assert f"results go to the bucket {BUCKET}, prefix 'made', at {store[1].url}" in log
    assert SECRET_KEY not in log and ACCESS_KEY not in log and "X-Amz-Signature" not in log


@pytest.fixture(scope="module")
def client(served: ServerProcess) -> Iterator[openai.OpenAI]:
    # Its key is not the store's: a request to the store that carried it would be refused.
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", timeout=60, max_retries=0) as made:
        yield made


def test_an_image_url_is_presigned_and_its_bytes_are_in_the_store_alone(client: openai.OpenAI, s3: S3Server) -> None:
    reply = client.images.generate(
        prompt="a star", n=2, size="64x64", response_format="url", output_format="webp", extra_body={"seed": 1, **STEPS}
    )
    assert reply.data is not None
    for image in reply.data:
        assert image.b64_json is None and image.url is not None
        with urllib.request.urlopen(image.url) as fetched, Image.open(io.BytesIO(fetched.read())) as picture:
            assert fetched.headers["content-type"] == "image/webp"
            assert (picture.format, picture.size) == ("WEBP", (64, 64))
    assert len(s3.contents()) == 2 and all(key.startswith("made/img_") for key in s3.contents())


def test_an_image_in_the_reply_leaves_the_store_alone(client: openai.OpenAI, s3: S3Server) -> None:
    reply = client.images.generate(prompt="a star", size="64x64", extra_body=STEPS)
    assert reply.data is not None and base64.b64decode(reply.data[0].b64_json or "")
    assert s3.contents() == []


def test_a_video_is_downloaded_from_the_store_and_deleted_there(
    client: openai.OpenAI, served: ServerProcess, s3: S3Server
) -> None:
    video = client.videos.create_and_poll(prompt="a red circle", size="64x64", extra_body=SMALL)
    assert (video.status, video.error) == ("completed", None)
    stem = f"made/{video.id}"
    for variant, key in (
        ("video", f"{stem}.mp4"),
        ("thumbnail", f"{stem}.thumb.webp"),
        ("spritesheet", f"{stem}.sheet.jpg"),
    ):
        content = client.videos.download_content(video.id, variant=variant).content  # type: ignore[arg-type]
        assert content == s3.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        part = urllib.request.Request(f"{served.url}/v1/videos/{video.id}/content?variant={variant}")
        part.add_header("range", "bytes=3-9")
        with urllib.request.urlopen(part) as reply:
            assert (reply.status, reply.read()) == (206, content[3:10])
    state = Path(served.process.args[-1])  # type: ignore[index]
    assert not [path for path in state.rglob("*") if video.id in path.name], "nothing stays on the server's disk"
    assert client.videos.delete(video.id).deleted is True
    assert s3.contents() == []


def test_a_store_that_fails_ends_a_job_and_an_image_with_its_code(
    client: openai.OpenAI, store: tuple[S3Server, Proxy], s3: S3Server
) -> None:
    store[1].faults.failures = 10_000
    video = client.videos.create_and_poll(prompt="a red circle", size="64x64", extra_body=SMALL)
    assert video.status == "failed" and video.error is not None and video.error.code == "storage_error"
    with pytest.raises(openai.InternalServerError) as raised:
        client.images.generate(prompt="a star", size="64x64", response_format="url", extra_body=STEPS)
    assert (raised.value.status_code, raised.value.code) == (507, "storage_error")
    assert raised.value.response.headers["x-should-retry"] == "false"
    store[1].reset()
    assert s3.contents() == []
    assert client.images.generate(prompt="a star", size="64x64", response_format="url", extra_body=STEPS).data


def test_a_video_that_is_deleted_while_it_is_uploaded_leaves_nothing(
    client: openai.OpenAI, store: tuple[S3Server, Proxy], s3: S3Server
) -> None:
    faults = store[1].faults
    faults.gate.clear()
    video = client.videos.create(prompt="a red circle", size="64x64", extra_body=SMALL)
    assert faults.waiting.wait(60)
    assert client.videos.delete(video.id).deleted is True
    faults.gate.set()
    deadline = time.monotonic() + 30
    while faults.attempts < 3 or s3.contents():  # its three files, which were complete in the end, are removed again
        assert time.monotonic() < deadline, s3.contents()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("changed", "status", "sentence"),
    [
        ({"bucket_name": "no-such-bucket"}, 1, "SGLANG_S3_BUCKET_NAME: got no-such-bucket, accepted is the name of a"),
        ({"url_lifetime": "for ever"}, 2, "SGLANG_S3_URL_LIFETIME: got for ever, accepted is seconds from 1 to 604800"),
    ],
)
def test_a_server_that_could_not_upload_does_not_start(
    s3: S3Server, changed: dict[str, str], status: int, sentence: str
) -> None:
    env = {**os.environ, **store_variables(s3.url, **changed)}
    ended = subprocess.run([SGLANG, "serve", "--port", "0"], env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == status and ended.stderr.count("\n") == 1, ended.stderr
    assert sentence in ended.stderr and SECRET_KEY not in ended.stderr
