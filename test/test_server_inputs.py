"""A real server whose model takes images, and OpenAI's own client: what is uploaded is what the worker sees."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from server_process import ServerProcess, running_server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")

# A family that does nothing but show, in the first pixels of its frames, what it was given.
SERVE = """
import sys
from sglang.multimodal_gen.test import null_family
null_family.register()
from sglang.cli.main import main
sys.exit(main(["serve", "--model-path", "image-model", "--port", "0"]))
"""


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def running(temporary: Path) -> Iterator[ServerProcess]:
    with running_server([sys.executable, "-c", SERVE], env=os.environ | {"TMPDIR": str(temporary)}) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", timeout=60, max_retries=0) as made:
        yield made


def png(value: int, *, alpha: int | None = None) -> bytes:
    pixels = np.full((64, 64, 3 if alpha is None else 4), value, np.uint8)
    if alpha is not None:
        pixels[..., 3] = alpha
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_edit_starts_from_what_was_uploaded_and_leaves_nothing_behind(
    client: openai.OpenAI, temporary: Path
) -> None:
    reply = client.images.edit(image=[png(40), png(80)], mask=png(0, alpha=55), prompt="x", n=2)
    assert reply.data is not None and len(reply.data) == 2 and reply.size == "64x64"
    for image in reply.data:
        with Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))) as made:
            assert np.asarray(made)[0, :3, 0].tolist() == [40, 80, 200]
    with pytest.raises(openai.InternalServerError):
        client.images.edit(image=png(40), prompt="bug")
    assert in_run_directories(temporary) == []


def test_a_video_starts_from_its_input_reference(client: openai.OpenAI, temporary: Path) -> None:
    video = client.videos.create_and_poll(prompt="x", input_reference=png(120))
    assert (video.status, video.size) == ("completed", "64x64")
    with pytest.raises(openai.BadRequestError) as raised:
        client.videos.create(prompt="x", input_reference=b"no image")
    assert (raised.value.code, raised.value.param) == ("invalid_image", "input_reference")
    assert in_run_directories(temporary) == []


def in_run_directories(temporary: Path) -> list[str]:
    """Arrays on their way between processes."""
    runs = [path.name for path in temporary.glob("sglang-run-*")]
    assert len(runs) == 1, "the server's own"
    places = [temporary / runs[0], Path("/dev/shm") / runs[0]]
    return [file.name for place in places if place.is_dir() for file in place.glob("m-*")]
