"""An engine whose results go to a real S3 server: what is there in the end, and what is not."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang.multimodal_gen.errors import InvalidValue, RemoteError, RequestCancelled
from sglang.multimodal_gen.runtime.entrypoints.cli.reporting import LineDisplay, Reporter
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import (
    DiffGenerator,
    GenerationEvent,
    GenerationResult,
)
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.s3_server import BUCKET, Proxy, S3Server, proxy_to, s3_server, store_variables

null_family.register()

PREFIX = "made/here"


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[S3Server, Proxy, DiffGenerator]]:
    """The engine reaches the server through the proxy."""
    with s3_server() as server, proxy_to(server) as proxy, pytest.MonkeyPatch.context() as patch:
        # 2 s: as long as an upload that fails for good is tried again.
        for name, value in store_variables(proxy.url, key_prefix=PREFIX, upload_timeout="2").items():
            patch.setenv(name, value)
        with DiffGenerator.from_pretrained("null-model") as engine:
            yield server, proxy, engine


@pytest.fixture
def engine(running: tuple[S3Server, Proxy, DiffGenerator]) -> DiffGenerator:
    return running[2]


@pytest.fixture
def server(running: tuple[S3Server, Proxy, DiffGenerator]) -> S3Server:
    running[0].clear()
    return running[0]


@pytest.fixture
def faults(running: tuple[S3Server, Proxy, DiffGenerator], server: S3Server) -> Iterator[Any]:
    proxy = running[1]
    proxy.reset()
    yield proxy.faults
    proxy.reset()


def save(engine: DiffGenerator, directory: Path, **wishes: Any) -> GenerationResult:
    result = engine.generate({"prompt": "x", "seed": 7, "save_output": True, "output_path": directory, **wishes})
    assert isinstance(result, GenerationResult)
    return result


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def test_a_result_is_uploaded_with_its_images_and_stays_where_it_was_asked_for(
    engine: DiffGenerator, server: S3Server, tmp_path: Path
) -> None:
    result = save(engine, tmp_path, output_file_name="clip.mp4", thumbnail=True, contact_sheet=True)
    paths = {
        "output": result.output_file_path,
        "thumbnail": result.thumbnail_path,
        "contact_sheet": result.contact_sheet_path,
    }
    assert result.stored.keys() == paths.keys()
    for what, stored in result.stored.items():
        content = Path(paths[what] or "").read_bytes()
        assert stored.key == f"{PREFIX}/{Path(paths[what] or '').name}"
        assert server.client.get_object(Bucket=BUCKET, Key=stored.key)["Body"].read() == content
        with urllib.request.urlopen(stored.url) as reply:
            assert reply.read() == content
    assert len(server.contents()) == 3
    assert result.metrics["stage_seconds"].keys() >= {"encode_file", "upload"}


def test_a_name_that_is_taken_here_or_there_is_not_used_again(
    engine: DiffGenerator, server: S3Server, tmp_path: Path
) -> None:
    first = save(engine, tmp_path / "a", num_frames=1)
    stem = Path(first.output_file_path or "").stem
    elsewhere = save(engine, tmp_path / "b", num_frames=1)  # as on another machine
    assert Path(elsewhere.output_file_path or "").name == f"{stem}-1.png"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"{stem}-2.png").touch()
    save(engine, tmp_path / "c", num_frames=1)
    assert server.contents() == [f"{PREFIX}/{stem}{number}.png" for number in ("-1", "-3", "")]


def test_a_name_that_was_given_is_overwritten(engine: DiffGenerator, server: S3Server, tmp_path: Path) -> None:
    for seed in (1, 2):
        result = save(engine, tmp_path, num_frames=1, output_file_name="x.png", seed=seed)
    assert server.contents() == [f"{PREFIX}/x.png"]
    found = server.client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/x.png")["Body"].read()
    assert found == Path(result.output_file_path or "").read_bytes()


def test_frames_and_latents_alone_are_not_uploaded(engine: DiffGenerator, server: S3Server) -> None:
    result = engine.generate({"prompt": "x", "return_frames": True})
    assert isinstance(result, GenerationResult) and result.frames is not None
    assert (result.stored, server.contents()) == ({}, [])


def test_a_busy_store_delays_a_result(engine: DiffGenerator, server: S3Server, faults: Any, tmp_path: Path) -> None:
    faults.failures = 2
    save(engine, tmp_path, output_file_name="x.png", num_frames=1)
    assert (faults.attempts, server.contents()) == (3, [f"{PREFIX}/x.png"])


def test_a_store_that_fails_for_good_ends_the_request_and_leaves_nothing(
    engine: DiffGenerator, server: S3Server, faults: Any, tmp_path: Path
) -> None:
    (tmp_path / "x.mp4").write_bytes(b"an older one")
    faults.failures = 10_000
    with pytest.raises(RemoteError) as raised:
        save(engine, tmp_path, output_file_name="x.mp4", thumbnail=True)
    assert (raised.value.code, raised.value.http_status, raised.value.retryable) == ("storage_error", 507, False)
    assert str(raised.value) == "the object store did not take the result: SlowDown"
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"] and server.contents() == []
    assert (tmp_path / "x.mp4").read_bytes() == b"an older one"
    faults.failures = 0
    save(engine, tmp_path, output_file_name="x.mp4")
    assert server.contents() == [f"{PREFIX}/x.mp4"]


def test_what_was_uploaded_goes_when_the_next_of_its_files_fails(
    engine: DiffGenerator, server: S3Server, faults: Any, tmp_path: Path
) -> None:
    faults.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(save, engine, tmp_path, output_file_name="x.mp4", thumbnail=True)
        assert faults.waiting.wait(30)
        faults.failures = 10_000  # but not for the thumbnail, which is waiting
        faults.gate.set()
        with pytest.raises(RemoteError):
            running.result()
    assert faults.attempts > 2 and server.contents() == [] and not list(tmp_path.iterdir())


def test_an_upload_holds_up_nobody(engine: DiffGenerator, server: S3Server, faults: Any, tmp_path: Path) -> None:
    faults.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(save, engine, tmp_path, output_file_name="x.png", num_frames=1)
        assert faults.waiting.wait(30)
        assert isinstance(engine.generate({"prompt": "y", "return_frames": True}), GenerationResult)
        assert not running.done() and engine.status().num_running == 1
        faults.gate.set()
        assert running.result().stored


def test_a_request_that_is_cancelled_while_it_is_uploaded_leaves_nothing(
    engine: DiffGenerator, server: S3Server, faults: Any, tmp_path: Path
) -> None:
    faults.gate.clear()
    events: list[GenerationEvent] = []
    wish = {"prompt": "x", "save_output": True, "output_path": tmp_path, "output_file_name": "x.png", "num_frames": 1}
    with contextlib.closing(engine.stream(wish)) as stream:
        events.append(next(stream))
        assert faults.waiting.wait(30)
        engine.cancel(events[0].request_id)
        events.extend(stream)
    assert isinstance(events[-1].event, RequestCancelled), "whoever cancels does not wait for the upload"
    faults.method, faults.attempts = "DELETE", 0
    faults.gate.set()
    wait_until(lambda: faults.attempts == 1)  # it was complete, and then it was removed
    wait_until(lambda: server.contents() == [])
    wait_until(lambda: not list(tmp_path.iterdir()))


def test_the_command_line_says_where_a_result_went(
    engine: DiffGenerator, server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = {"prompt": "x", "save_output": True, "output_path": tmp_path, "output_file_name": "x.mp4", "thumbnail": True}
    with Reporter(LineDisplay(), several=False) as reporter:
        for event in engine.stream(wish):
            reporter.event(event)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"saved to {tmp_path}/x.mp4, seed ") for line in lines)
    [url] = [line.split(": ", 1)[1] for line in lines if line.startswith(f"output uploaded as {PREFIX}/x.mp4: ")]
    with urllib.request.urlopen(url) as reply:
        assert reply.read() == (tmp_path / "x.mp4").read_bytes()
    assert any(line.startswith(f"thumbnail uploaded as {PREFIX}/x.thumb.webp: ") for line in lines)


def test_an_engine_does_not_start_for_a_bucket_that_is_not_there(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_S3_BUCKET_NAME", "no-such-bucket")
    with pytest.raises(InvalidValue, match=r"^SGLANG_S3_BUCKET_NAME: got no-such-bucket"):
        DiffGenerator.from_pretrained("null-model")
