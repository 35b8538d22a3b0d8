"""A disk that is full or fails, and how much of it a server takes; over HTTP, with a scripted engine."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from sglang.multimodal_gen.configs.model_info import InputLimits
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import JobSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.image_store import ImageStore
from sglang.multimodal_gen.runtime.postprocess.object_store import StoredFile
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    READY,
    RunningServer,
    ScriptedEngine,
    Start,
    assert_error,
    wait_for,
)
from sglang.multimodal_gen.test.test_media_inputs import encoded

VIDEOS = "/v1/videos"
INPUTS = InputLimits(min_images=1, max_images=1)
ANIMATOR = msgspec.structs.replace(
    READY, model=msgspec.structs.replace(MODEL, limits=msgspec.structs.replace(MODEL.limits, inputs=INPUTS))
)
PICTURE = np.full((16, 32, 3), 7, np.uint8)
FULL = {errno.ENOSPC, errno.EDQUOT}
FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.EACCES]


@pytest.fixture(scope="module")
def shared_server(start_server: Start) -> RunningServer:
    server = start_server()
    server.engine.state = ANIMATOR
    return server


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the next call of a function fail."""

    def fail_once(owner: Any, name: str, number: int, *, of: Callable[..., bool] = lambda *_: True) -> None:
        real, faults = getattr(owner, name), [OSError(number, os.strerror(number), "/a/path/of/this/machine")]

        def call(*args: Any, **options: Any) -> Any:
            if faults and of(*args):
                raise faults.pop()
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    return fail_once


def animate(server: RunningServer) -> httpx.Response:
    """A video that starts from a picture."""
    files = [("prompt", (None, "a")), ("input_reference", ("f", encoded(PICTURE).getvalue()))]
    return server.client.post(VIDEOS, files=files)


def refused(reply: httpx.Response, number: int) -> None:
    assert_error(reply, 507, "insufficient_storage" if number in FULL else "storage_error")
    assert os.strerror(number) in reply.text and "/a/path" not in reply.text


@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_an_upload_that_cannot_be_written_is_refused_and_the_next_one_is_not(
    shared_server: RunningServer, fault: Callable[..., None], number: int
) -> None:
    fault(tempfile.SpooledTemporaryFile, "write", number)
    refused(animate(shared_server), number)
    assert animate(shared_server).status_code == 200


@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_an_image_that_cannot_be_written_is_refused_and_the_next_one_is_not(
    start_server: Start, fault: Callable[..., None], number: int
) -> None:
    server = start_server()
    fault(Path, "write_bytes", number, of=lambda path, _: path.name.startswith("img_"))
    refused(server.post_image(response_format="url"), number)
    assert server.post_image(response_format="url").status_code == 200
    assert len(list((server.files_dir / "images").iterdir())) == 1


@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_inputs_that_cannot_be_kept_are_refused_and_the_next_ones_are_not(
    shared_server: RunningServer, fault: Callable[..., None], number: int
) -> None:
    before = len(shared_server.client.get(VIDEOS).json()["data"])
    fault(os, "fsync", number)
    refused(animate(shared_server), number)
    reply = animate(shared_server)
    assert reply.status_code == 200
    wait_for(lambda: shared_server.client.get(f"{VIDEOS}/{reply.json()['id']}").json()["status"] == "completed")
    assert len(shared_server.client.get(VIDEOS).json()["data"]) == before + 1
    assert list((shared_server.files_dir.parent / "inputs").iterdir()) == []


def test_what_unfinished_videos_start_from_has_half_of_the_room(start_server: Start) -> None:
    server = start_server(jobs=JobSettings(max_output_bytes=2 * 2 * PICTURE.nbytes))
    server.engine.state = ANIMATOR
    server.engine.held = True
    first, second = (animate(server).json()["id"] for _ in range(2))
    assert_error(animate(server), 507, "insufficient_storage")
    assert len(list((server.files_dir.parent / "inputs").iterdir())) == 2
    assert server.client.delete(f"{VIDEOS}/{first}").status_code == 200
    assert animate(server).status_code == 200
    server.engine.held = False
    wait_for(lambda: server.client.get(f"{VIDEOS}/{second}").json()["status"] == "completed")
    assert animate(server).status_code == 200


def test_results_go_to_make_room_for_what_videos_start_from(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 2 * PICTURE.nbytes
    server = start_server(jobs=JobSettings(max_output_bytes=budget))
    server.engine.state = ANIMATOR
    stored = {"output": StoredFile(key="k", url="u", num_bytes=budget - 100)}
    monkeypatch.setattr(ScriptedEngine, "stored_files", stored)
    old = animate(server).json()["id"]
    wait_for(lambda: server.client.get(f"{VIDEOS}/{old}").json()["status"] == "completed")
    server.engine.held = True
    assert animate(server).status_code == 200
    assert_error(server.client.get(f"{VIDEOS}/{old}"), 404, "video_not_found", "video_id")


def test_uploaded_results_count_as_much_as_they_take_in_the_bucket(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {name: StoredFile(key=name, url="u", num_bytes=1000) for name in ("output", "thumbnail")}
    monkeypatch.setattr(ScriptedEngine, "stored_files", stored)
    server = start_server(jobs=JobSettings(max_output_bytes=5000))
    ids = []
    for seed in range(3):
        ids.append(server.post_video(seed=seed).json()["id"])
        wait_for(lambda: server.client.get(f"{VIDEOS}/{ids[-1]}").json()["status"] == "completed")
    assert [video["id"] for video in server.client.get(VIDEOS).json()["data"]] == ids[:0:-1]


def test_the_oldest_images_go_when_their_room_is_full(tmp_path: Path) -> None:
    async def kept() -> list[str]:
        store = ImageStore(tmp_path, capacity=10, max_bytes=100, lifetime_s=60)
        return [await store.put(bytes(size), file_format="png") for size in (40, 40, 40, 20)]

    ids = asyncio.run(kept())
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(ids[1:])


def test_images_take_no_more_than_their_room_but_the_newest_stays(start_server: Start) -> None:
    server = start_server(jobs=JobSettings(max_output_bytes=1))
    urls = [server.post_image(response_format="url").json()["data"][0]["url"] for _ in range(2)]
    assert [server.client.get(httpx.URL(url).path).status_code for url in urls] == [404, 200]
    assert len(list((server.files_dir / "images").iterdir())) == 1
