"""Results in an object store behind the HTTP API: served, missing, removed, and what happens while the store is away.

The S3 server and the HTTP server are real; the engine is scripted_server's, so the tests upload what it saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import JobSettings
from sglang.multimodal_gen.runtime.postprocess import object_store
from sglang.multimodal_gen.runtime.postprocess.object_store import ObjectStore
from sglang.multimodal_gen.test.s3_server import BUCKET, Proxy, S3Server, proxy_to, s3_server, store_variables
from sglang.multimodal_gen.test.scripted_server import RunningServer, error_of, servers, wait_for

VIDEO, THUMBNAIL, SHEET = bytes(range(200)), b"thumbnail", b"contact sheet"


@pytest.fixture(scope="module")
def store_server() -> Iterator[tuple[S3Server, Proxy]]:
    with s3_server() as server, proxy_to(server) as proxy:
        yield server, proxy


@pytest.fixture
def s3(store_server: tuple[S3Server, Proxy]) -> Iterator[S3Server]:
    yield store_server[0]
    store_server[0].clear()


@pytest.fixture
def faults(store_server: tuple[S3Server, Proxy]) -> Iterator[Any]:
    yield store_server[1].faults
    store_server[1].reset()


@pytest.fixture
def store(store_server: tuple[S3Server, Proxy], monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Through the proxy; it gives up soon."""
    monkeypatch.setattr(object_store, "_MAX_RETRIES", 1)
    settings = envs.store_settings(store_variables(store_server[1].url, key_prefix="videos"))
    assert settings is not None
    return ObjectStore(settings)


@pytest.fixture
def server(tmp_path: Path, store: ObjectStore) -> Iterator[RunningServer]:
    with servers(lambda: tmp_path) as start:
        yield start(object_store=store, jobs=JobSettings(capacity=2))


def uploaded_video(server: RunningServer, store: ObjectStore) -> str:
    """The id of a complete job whose files are in the store and no longer here."""
    video_id = server.post_video().json()["id"]
    wait_for(lambda: server.client.get(f"/v1/videos/{video_id}").json()["status"] == "completed")
    for path in (server.files_dir / "videos").glob(f"{video_id}*"):
        store.put(path.name, path)
        path.unlink()
    return str(video_id)


def test_every_form_of_an_uploaded_video_is_served_with_the_headers_of_a_file(
    server: RunningServer, store: ObjectStore, s3: S3Server
) -> None:
    video_id = uploaded_video(server, store)
    assert s3.contents() == [f"videos/{video_id}.{ending}" for ending in ("mp4", "sheet.jpg", "thumb.webp")]
    for variant, expected, media_type in (
        ("video", VIDEO, "video/mp4"),
        ("thumbnail", THUMBNAIL, "image/webp"),
        ("spritesheet", SHEET, "image/jpeg"),
    ):
        reply = server.client.get(f"/v1/videos/{video_id}/content", params={"variant": variant})
        assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, expected, media_type)
        assert reply.headers["content-disposition"].startswith(f'attachment; filename="{video_id}.')
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "private, no-store"
        assert reply.headers["content-security-policy"] == "default-src 'none'; sandbox"


@pytest.mark.parametrize(
    ("asked", "expected", "content_range"),
    [
        ("bytes=0-9", VIDEO[:10], "bytes 0-9/200"),
        ("bytes=190-", VIDEO[190:], "bytes 190-199/200"),
        ("bytes=-7", VIDEO[-7:], "bytes 193-199/200"),
        ("bytes=-500", VIDEO, "bytes 0-199/200"),
        ("bytes=150-100000", VIDEO[150:], "bytes 150-199/200"),
        ("bytes=0-1,5-6", VIDEO, None),
        ("bytes=9-5", VIDEO, None),
        ("lines=1-2", VIDEO, None),
    ],
)
@pytest.mark.parametrize("where", ["in the store", "here"])
def test_a_range_is_served_alike_from_both(
    server: RunningServer, store: ObjectStore, s3: S3Server, where: str, asked: str, expected: bytes, content_range: Any
) -> None:
    video_id = uploaded_video(server, store)
    if where == "here":
        (server.files_dir / "videos" / f"{video_id}.mp4").write_bytes(VIDEO)
    reply = server.client.get(f"/v1/videos/{video_id}/content", headers={"range": asked})
    assert (reply.status_code, reply.content) == (200 if content_range is None else 206, expected)
    assert reply.headers.get("content-range") == content_range
    assert reply.headers["content-length"] == str(len(expected)) and reply.headers["accept-ranges"] == "bytes"


def test_a_range_after_the_end_is_refused_and_one_of_another_version_ignored(
    server: RunningServer, store: ObjectStore, s3: S3Server
) -> None:
    url = f"/v1/videos/{uploaded_video(server, store)}/content"
    refused = server.client.get(url, headers={"range": "bytes=200-"})
    assert error_of(refused, 416)["code"] == "range_not_satisfiable"
    assert refused.headers["content-range"] == "bytes */200"
    etag = server.client.get(url).headers["etag"]
    for condition, status in ((etag, 206), ('"another"', 200)):
        reply = server.client.get(url, headers={"range": "bytes=0-9", "if-range": condition})
        assert reply.status_code == status


def test_a_video_whose_object_is_gone_is_not_found(server: RunningServer, store: ObjectStore, s3: S3Server) -> None:
    video_id = uploaded_video(server, store)
    store.remove([f"videos/{video_id}.mp4"])
    assert error_of(server.client.get(f"/v1/videos/{video_id}/content"), 404)["code"] == "video_not_found"


def test_a_delete_removes_the_objects(server: RunningServer, store: ObjectStore, s3: S3Server) -> None:
    video_id = uploaded_video(server, store)
    assert server.client.delete(f"/v1/videos/{video_id}").json()["deleted"] is True
    assert s3.contents() == []


def test_a_job_that_makes_room_takes_its_objects_along(server: RunningServer, store: ObjectStore, s3: S3Server) -> None:
    first, second, third = (uploaded_video(server, store) for _ in range(3))
    wait_for(lambda: not any(first in key for key in s3.contents()))
    assert {key.partition(".")[0] for key in s3.contents()} == {f"videos/{second}", f"videos/{third}"}


def test_while_the_store_is_away_a_video_is_unavailable_and_not_lost(
    server: RunningServer, store: ObjectStore, s3: S3Server, faults: Any
) -> None:
    video_id = uploaded_video(server, store)
    for method, ours in (("HEAD", "GET"), ("DELETE", "DELETE")):
        faults.method, faults.failures = method, 1000
        path = f"/v1/videos/{video_id}" + ("/content" if ours == "GET" else "")
        reply = server.client.request(ours, path)
        assert error_of(reply, 503)["code"] == "storage_unavailable"
        assert reply.headers["x-should-retry"] == "true"
        assert BUCKET not in reply.json()["error"]["message"] and "127.0.0.1" not in reply.text
    faults.failures = 0
    assert server.client.get(f"/v1/videos/{video_id}/content").content == VIDEO
    assert server.client.delete(f"/v1/videos/{video_id}").status_code == 200
    assert s3.contents() == []


def test_a_connection_that_breaks_in_the_middle_is_seen_by_the_client(
    server: RunningServer, store: ObjectStore, s3: S3Server, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_PIECE_BYTES", 50)
    video_id = uploaded_video(server, store)
    pieces = ObjectStore.read

    async def read_and_fail(*args: Any, **kwargs: Any) -> Any:
        async for piece in pieces(*args, **kwargs):
            yield piece
            faults.method, faults.failures = "GET", 1000

    monkeypatch.setattr(ObjectStore, "read", read_and_fail)
    with pytest.raises(httpx.RemoteProtocolError):
        server.client.get(f"/v1/videos/{video_id}/content")


def test_an_image_that_was_uploaded_goes_when_its_call_fails(
    server: RunningServer, store: ObjectStore, s3: S3Server, tmp_path: Path
) -> None:
    """As when the first of two images is done and the second fails."""
    (tmp_path / "image").write_bytes(b"an image")
    server.engine.held = True
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.post_image, prompt="fail", n=2, response_format="url")
        wait_for(lambda: len(server.engine.submitted) == 2)
        for params in server.engine.submitted.values():
            assert params.save_output and not params.return_encoded and params.output_file_name is not None
            store.put(params.output_file_name, tmp_path / "image")
        assert len(s3.contents()) == 2 and all(key.startswith("videos/img_") for key in s3.contents())
        server.engine.held = False
        assert error_of(call.result(), 500)["code"] == "out_of_memory"
    wait_for(lambda: s3.contents() == [])


def test_an_image_in_the_reply_is_not_uploaded(server: RunningServer, s3: S3Server) -> None:
    assert server.post_image().json()["data"][0]["b64_json"]
    [params] = server.engine.submitted.values()
    assert params.return_encoded and not params.save_output
