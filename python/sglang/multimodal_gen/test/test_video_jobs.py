"""Video jobs over a server's death: the store, who goes on, what is forgotten, who is told. The engine is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openai
import pytest

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InsufficientStorage, InvalidValue, StateDirInUse, StorageError
from sglang.multimodal_gen.errors_http import VideoNotFound
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import Clip, DecodedInputs
from sglang.multimodal_gen.runtime.entrypoints.openai import job_shelf
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import JobSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.kept_inputs import load_inputs, save_inputs
from sglang.multimodal_gen.runtime.entrypoints.openai.results import Results
from sglang.multimodal_gen.runtime.entrypoints.openai.video_api import frames_for, video_object
from sglang.multimodal_gen.runtime.entrypoints.openai.video_jobs import VideoJobs
from sglang.multimodal_gen.runtime.entrypoints.openai.webhooks import WebhookTarget
from sglang.multimodal_gen.runtime.managers.job_store import JobStore, KeptReply, VideoJob
from sglang.multimodal_gen.runtime.managers.messages import EngineState
from sglang.multimodal_gen.runtime.managers.state_dir import StateDir, claimed
from sglang.multimodal_gen.test.scripted_server import (
    MODEL,
    RunningServer,
    ScriptedEngine,
    Start,
    assert_error,
    wait_for,
)

VIDEOS = "/v1/videos"
SECRET = "whsec_" + "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"


def job(number: int = 0, **changes: Any) -> VideoJob:
    values: dict[str, Any] = {
        "id": f"video_{number:032x}",
        "model": "tiny",
        "params": SamplingParams(prompt="a", seed=number, output_format="mp4"),
        "created_at": 1000 + number,
        "file_name": f"video_{number:032x}.mp4",
    }
    return VideoJob(**(values | changes))


# --- the store ---


def test_what_was_inserted_and_updated_is_there_after_the_process(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    reply = KeptReply(key="k", fingerprint=b"f", reply=b"{}")
    jobs = [job(2), job(0), job(1)]
    for one in jobs:
        store.insert(one, reply if one.id == jobs[0].id else None)
    store.update(job(0, status="failed", progress=7))
    store.delete(job(1).id)
    other = JobStore(tmp_path / "jobs")  # the first one was never closed: as after a kill
    assert other.load() == ([jobs[0], job(0, status="failed", progress=7)], [])
    assert other.replies() == [reply]
    store.delete(jobs[0].id)
    assert other.replies() == []
    store.update(jobs[0])
    assert [found.id for found in other.load()[0]] == [job(0).id], "what was deleted stays so"


def test_a_job_and_its_reply_are_kept_both_or_not_at_all(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    store.insert(job(0))
    with pytest.raises(StorageError):
        store.insert(job(0), KeptReply(key="k", fingerprint=b"f", reply=b"{}"))
    assert (len(store.load()[0]), store.replies()) == (1, [])


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be taken for one" * 20, None])
def test_a_database_that_is_none_of_ours_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "jobs"
    if content is None:
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version=99")
        connection.close()
    else:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=r"state_dir: .*jobs"):
        JobStore(path)


def test_a_full_disk_is_said_so_and_the_jobs_before_stay(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    store.insert(job(0))
    [pages] = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(InsufficientStorage):
        for number in range(1, 100):
            store.insert(job(number, notes=("x" * 500,)))
    store._connection.execute("PRAGMA max_page_count=1000000")
    before = len(store.load()[0])
    store.insert(job(1000))
    assert [found.id for found in store.load()[0]][:: before or 1] == [job(0).id, job(1000).id]


def test_a_row_of_another_release_is_left_alone(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    store.insert(job(0))
    store.insert(job(1))
    store._connection.execute("UPDATE jobs SET record = x'81' WHERE id = ?", (job(0).id,))
    assert store.load() == ([job(1)], [job(0).id])


def test_inputs_come_back_as_they_were(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)
    inputs = DecodedInputs(
        images=tuple(pixels[:11]), mask=pixels[0, :, :, 0], last_image=pixels[11], video=Clip(frames=pixels, fps=12.5)
    )
    assert inputs.num_bytes == 24 * 5 * 4 * 3 + 5 * 4
    save_inputs(tmp_path / "a.npz", inputs)
    found = load_inputs(tmp_path / "a.npz")
    assert [np.array_equal(a, b) for a, b in zip(found.images, inputs.images, strict=True)] == [True] * 11
    assert np.array_equal(found.mask, inputs.mask) and np.array_equal(found.last_image, inputs.last_image)
    assert found.video is not None and found.video.fps == 12.5 and np.array_equal(found.video.frames, pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(StorageError):
        load_inputs(tmp_path / "a.npz")


def test_a_state_directory_belongs_to_one_server(tmp_path: Path) -> None:
    holder = r"belongs to the server on http://127\.0\.0\.1:1234 \(pid \d+\)"
    with (
        claimed(tmp_path / "s", address="http://127.0.0.1:1234"),
        pytest.raises(StateDirInUse, match=holder),
        claimed(tmp_path / "s", address="http://127.0.0.1:9"),
    ):
        pass
    with claimed(tmp_path / "s", address="http://127.0.0.1:9"):
        pass


# --- over restarts ---


def restarted(start_server: Start, server: RunningServer, **options: Any) -> RunningServer:
    """A new server, and engine, on the state directory of one that has gone."""
    server.end()
    return start_server(state=StateDir(server.files_dir.parent), **options)


def test_finished_videos_are_served_after_a_restart(start_server: Start) -> None:
    server = start_server()
    created = server.post_video(prompt="a").json()
    wait_for(lambda: server.client.get(f"{VIDEOS}/{created['id']}").json()["status"] == "completed")
    before = server.client.get(f"{VIDEOS}/{created['id']}").json()
    content = server.client.get(f"{VIDEOS}/{created['id']}/content").content
    again = restarted(start_server, server)
    assert again.client.get(f"{VIDEOS}/{created['id']}").json() == before
    assert again.client.get(f"{VIDEOS}/{created['id']}/content").content == content
    assert [video["id"] for video in again.client.get(VIDEOS).json()["data"]] == [created["id"]]
    assert again.engine.submitted == {}
    assert before["expires_at"] == before["completed_at"] + 7 * 24 * 3600


def test_unfinished_videos_go_on_after_a_restart_in_their_order(start_server: Start) -> None:
    server = start_server()
    server.engine.held = True
    ids = [server.post_video(prompt=f"p{number}", seed=number).json()["id"] for number in range(5)]
    assert server.client.delete(f"{VIDEOS}/{ids[3]}").status_code == 200
    again = restarted(start_server, server)
    expected = [ids[0], ids[1], ids[2], ids[4]]
    for video_id in expected:
        wait_for(lambda video_id=video_id: again.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")
    assert list(again.engine.submitted) == expected
    assert [params.seed for params in again.engine.submitted.values()] == [0, 1, 2, 4]
    assert again.engine.durable == set(expected)
    assert_error(again.client.get(f"{VIDEOS}/{ids[3]}"), 404, "video_not_found", "video_id")


def test_one_idempotency_key_is_one_job_over_a_restart(start_server: Start) -> None:
    server = start_server()
    headers = {"idempotency-key": "once"}
    first = server.client.post(VIDEOS, json={"prompt": "a"}, headers=headers)
    again = restarted(start_server, server)
    assert again.client.post(VIDEOS, json={"prompt": "a"}, headers=headers).content == first.content
    other = again.client.post(VIDEOS, json={"prompt": "b"}, headers=headers)
    assert_error(other, 400, "idempotency_mismatch", "idempotency-key")
    assert len(again.client.get(VIDEOS).json()["data"]) == 1


@pytest.mark.parametrize("over_a_restart", [False, True])
def test_the_key_of_a_deleted_video_makes_a_new_one(start_server: Start, over_a_restart: bool) -> None:
    server = start_server()
    headers = {"idempotency-key": "once"}
    first = server.client.post(VIDEOS, json={"prompt": "a"}, headers=headers).json()["id"]
    assert server.client.delete(f"{VIDEOS}/{first}").status_code == 200
    if over_a_restart:
        server = restarted(start_server, server)
    second = server.client.post(VIDEOS, json={"prompt": "b"}, headers=headers).json()["id"]
    assert second != first and server.client.get(f"{VIDEOS}/{second}").status_code == 200
    again = restarted(start_server, server)
    assert again.client.post(VIDEOS, json={"prompt": "b"}, headers=headers).json()["id"] == second


def test_what_belongs_to_a_row_of_another_release_stays(start_server: Start) -> None:
    server = start_server()
    headers = {"idempotency-key": "once"}
    video_id = server.client.post(VIDEOS, json={"prompt": "a"}, headers=headers).json()["id"]
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")
    server.end()
    state = StateDir(server.files_dir.parent)
    (state.inputs / f"{video_id}.npz").touch()
    (state.checkpoints / f"job-{video_id}.safetensors").touch()
    store = JobStore(state.jobs)
    [row] = store._connection.execute("SELECT record FROM jobs").fetchone()
    store._connection.execute("UPDATE jobs SET record = x'81'")
    again = start_server(state=state)
    assert_error(again.client.get(f"{VIDEOS}/{video_id}"), 404, "video_not_found", "video_id")
    assert len(list((state.files / "videos").iterdir())) == 3
    assert len([*state.inputs.iterdir(), *state.checkpoints.iterdir()]) == 2
    other = again.client.post(VIDEOS, json={"prompt": "a"}, headers=headers).json()["id"]
    assert other != video_id, "a reply that tells of a video that is not found is of no use"
    store._connection.execute("UPDATE jobs SET record = ? WHERE id = ?", (row, video_id))
    store.close()
    third = restarted(start_server, again)
    assert third.client.get(f"{VIDEOS}/{video_id}/content").content == bytes(range(200))


def test_files_that_no_job_knows_are_removed_at_the_start(start_server: Start) -> None:
    server = start_server()
    created = server.post_video(prompt="a").json()
    wait_for(lambda: server.client.get(f"{VIDEOS}/{created['id']}").json()["status"] == "completed")
    state = StateDir(server.files_dir.parent)
    strangers = [
        state.files / "videos" / "video_x.mp4",
        state.inputs / "y.npz",
        state.checkpoints / "job-z.safetensors",
    ]
    for path in strangers:
        path.touch()
    restarted(start_server, server)
    assert not any(path.exists() for path in strangers)
    assert len(list((state.files / "videos").iterdir())) == 3


def test_an_engine_that_dies_does_not_end_the_jobs_it_held(start_server: Start) -> None:
    server = start_server()
    server.engine.held = True
    video_id = server.post_video(prompt="a").json()["id"]
    server.engine.interrupt()
    wait_for(lambda: server.engine.num_submits[video_id] == 2)
    assert server.client.get(f"{VIDEOS}/{video_id}").json()["status"] in ("queued", "in_progress")
    server.engine.held = False
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")


def test_a_job_waits_for_the_next_server_when_the_engine_has_failed(start_server: Start) -> None:
    server = start_server()
    server.engine.held = True
    video_id = server.post_video(prompt="a").json()["id"]
    server.engine.state = EngineState(state="failed")
    server.engine.interrupt()
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "queued")
    again = restarted(start_server, server)
    wait_for(lambda: again.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")


def test_a_deadline_counts_from_the_first_server_on(start_server: Start) -> None:
    server = start_server()
    server.engine.held = True
    late, early = (server.post_video(prompt="a", deadline_s=seconds).json()["id"] for seconds in (600, 0.5))
    server.end()
    time.sleep(1.6)
    again = start_server(state=StateDir(server.files_dir.parent))
    wait_for(lambda: again.client.get(f"{VIDEOS}/{late}").json()["status"] == "completed")
    assert again.engine.submitted[late].deadline_s < 599.5
    failed = again.client.get(f"{VIDEOS}/{early}").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "deadline_exceeded")
    assert "0.5 s" in failed["error"]["message"] and early not in again.engine.submitted


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_deadline_within_one_server_does_not_follow_the_wall_clock(
    start_server: Start, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    server = start_server()
    server.engine.held = True
    video_id = server.post_video(prompt="a", deadline_s=600).json()["id"]
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + jump_s)
    server.engine.interrupt()
    wait_for(lambda: server.engine.num_submits[video_id] == 2)
    left = server.engine.submitted[video_id].deadline_s
    assert left is not None and 580 < left < 600
    server.engine.held = False
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "completed")


def test_progress_never_falls_over_a_restart_and_who_waits_again_is_queued(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    server.engine.held = True
    video_id = server.post_video(prompt="a").json()["id"]
    seen: list[dict[str, Any]] = []

    def poll(server: RunningServer) -> dict[str, Any]:
        seen.append(server.client.get(f"{VIDEOS}/{video_id}").json())
        return seen[-1]

    wait_for(lambda: poll(server)["progress"] == 50)
    monkeypatch.setattr(ScriptedEngine, "waiting", True)
    again = restarted(start_server, server)
    wait_for(lambda: poll(again)["queue_position"] == 0)
    assert (seen[-1]["status"], seen[-1]["progress"]) == ("queued", 50)
    monkeypatch.setattr(ScriptedEngine, "waiting", False)
    wait_for(lambda: poll(again)["status"] == "completed")
    progress = [video["progress"] for video in seen]
    assert progress == sorted(progress) and progress[-1] == 100
    assert all(video["queue_position"] is None for video in seen if video["status"] != "queued")


# --- how they end ---


def test_a_video_that_the_engine_cancels_has_failed_through_no_fault_of_the_server(start_server: Start) -> None:
    server = start_server()
    server.engine.held = True
    video_id = server.post_video(prompt="a").json()["id"]
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["progress"] == 50)
    cancels = []
    server.call(lambda: cancels.append(asyncio.ensure_future(server.engine.cancel(video_id))))
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").json()["status"] == "failed")
    error = server.client.get(f"{VIDEOS}/{video_id}").json()["error"]
    assert (error["code"], error["type"]) == ("cancelled", "invalid_request_error")


@contextlib.asynccontextmanager
async def held_jobs(directory: Path) -> AsyncIterator[tuple[VideoJobs, ScriptedEngine]]:
    """Jobs without a server, whose engine holds all."""
    engine = ScriptedEngine()
    engine.held = True
    jobs = VideoJobs(engine, StateDir(directory), JobSettings(), Results(None))
    await jobs.start()
    try:
        yield jobs, engine
    finally:
        await jobs.close()


def params(**changes: Any) -> SamplingParams:
    values = {"prompt": "a", "seed": 1, "width": 32, "height": 32, "num_frames": 5, "fps": 16, "output_format": "mp4"}
    return SamplingParams(**(values | changes), save_output=True)


@pytest.mark.parametrize("is_final", [False, True])
def test_of_two_deletions_at_once_one_finds_nothing(tmp_path: Path, is_final: bool) -> None:
    async def deleted() -> list[Any]:
        async with held_jobs(tmp_path) as (jobs, engine):
            video_id = (await jobs.create(params(), model="tiny")).id
            while is_final and not jobs.get(video_id).is_final:
                engine.held = False
                await asyncio.sleep(0.005)
            return await asyncio.gather(jobs.delete(video_id), jobs.delete(video_id), return_exceptions=True)

    outcomes = {type(outcome) for outcome in asyncio.run(deleted())}
    assert outcomes == {type(None), VideoNotFound}


def test_a_video_that_ends_while_it_is_deleted_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deleted() -> None:
        async with held_jobs(tmp_path) as (jobs, engine):
            video_id = (await jobs.create(params(), model="tiny")).id
            forget = jobs._keeper.delete

            async def slowly(job_id: str) -> None:
                await forget(job_id)
                engine.held = False
                while not jobs.get(video_id).is_final or video_id in jobs._watchers:
                    await asyncio.sleep(0.005)

            monkeypatch.setattr(jobs._keeper, "delete", slowly)
            await jobs.delete(video_id)

    asyncio.run(deleted())
    assert list((tmp_path / "files" / "videos").iterdir()) == []


def test_who_follows_a_video_that_ended_or_went_meanwhile_is_told(tmp_path: Path) -> None:
    async def followed() -> list[Any]:
        async with held_jobs(tmp_path) as (jobs, engine):
            ends, goes = [await jobs.create(params(seed=seed), model="tiny") for seed in (1, 2)]
            await jobs.delete(goes.id)
            engine.held = False
            while not jobs.get(ends.id).is_final:
                await asyncio.sleep(0.005)
            with pytest.raises(VideoNotFound):
                async with jobs.feeds.follow(goes.id, previews=False):
                    pass
            async with asyncio.timeout(2), jobs.feeds.follow(ends.id, previews=False) as follower:
                return [change async for change in follower]

    [change] = asyncio.run(followed())
    assert change.status == "completed"


# --- how long they are ---


@pytest.mark.parametrize(("stride", "most"), [(1, 97), (4, 129), (8, 257), (4, 130)])
def test_the_length_in_a_reply_gives_the_same_number_of_frames_again(stride: int, most: int) -> None:
    limits = msgspec.structs.replace(MODEL.limits, frame_stride=stride, max_frames=most)
    model = msgspec.structs.replace(MODEL, limits=limits)
    for fps in (1, 7, 8, 10, 12, 15, 16, 24, 25, 30, 60, 120, 240):
        for num_frames in range(1 + stride, most + 1, stride):
            told = job(params=params(num_frames=num_frames, fps=fps))
            seconds = video_object(told)["seconds"]
            for given in (seconds, float(seconds)):
                assert frames_for(given, {"fps": fps}, model) == num_frames, (seconds, fps)
        with pytest.raises(InvalidValue) as refusal:
            frames_for(10_000, {"fps": fps}, model)
        accepted = refusal.value.accepted.split()[6]
        assert frames_for(accepted, {"fps": fps}, model) == (most - 1) // stride * stride + 1


# --- whose they are ---


def test_a_video_belongs_to_the_key_that_it_was_made_with(start_server: Start) -> None:
    keys = {name: {"authorization": f"Bearer {name * 20}"} for name in "abm"}
    options: dict[str, Any] = {"api_keys": ("a" * 20, "b" * 20), "admin_api_key": "m" * 20}
    server = start_server(**options)
    video_id = server.client.post(VIDEOS, json={"prompt": "a"}, headers=keys["a"]).json()["id"]
    again = restarted(start_server, server, **options)
    url = f"{VIDEOS}/{video_id}"
    wait_for(lambda: again.client.get(url, headers=keys["a"]).json()["status"] == "completed")
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", ""), ("POST", "/remix")):
        reply = again.client.request(method, url + path, headers=keys["b"], json={"prompt": "x"})
        assert_error(reply, 404, "video_not_found", "video_id")
    listed = {name: again.client.get(VIDEOS, headers=key).json()["data"] for name, key in keys.items()}
    assert [len(videos) for videos in listed.values()] == [1, 0, 1]
    reply = again.client.get(VIDEOS, params={"after": video_id}, headers=keys["b"])
    assert_error(reply, 400, "invalid_cursor", "after")
    assert again.client.delete(url, headers=keys["m"]).status_code == 200
    assert again.client.get(VIDEOS, params={"after": video_id}, headers=keys["a"]).json()["data"] == []
    reply = again.client.get(VIDEOS, params={"after": video_id}, headers=keys["b"])
    assert_error(reply, 400, "invalid_cursor", "after")


# --- what is forgotten ---


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # OpenAI's own service ends, its client works
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_list_goes_on_from_a_video_that_was_deleted(start_server: Start, order: Any) -> None:
    server = start_server()
    ids = [server.post_video(prompt="a", seed=seed).json()["id"] for seed in range(5)]
    client = openai.OpenAI(api_key="unused", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0)
    found = []
    for video in client.videos.list(limit=2, order=order):
        found.append(video.id)
        client.videos.delete(video.id)
    assert found == (ids if order == "asc" else ids[::-1])
    assert server.client.get(VIDEOS).json()["data"] == []
    reply = server.client.get(VIDEOS, params={"after": "video_" + "0" * 32})
    assert_error(reply, 400, "invalid_cursor", "after")


def test_a_list_goes_on_from_a_video_whose_time_is_over(start_server: Start) -> None:
    server = start_server(jobs=JobSettings(lifetime_s=1.0))
    old = server.post_video(prompt="a").json()["id"]
    wait_for(lambda: server.client.get(f"{VIDEOS}/{old}").status_code == 404)
    server.engine.held = True
    new = server.post_video(prompt="a").json()["id"]
    page = server.client.get(VIDEOS, params={"after": old, "order": "asc"}).json()
    assert [video["id"] for video in page["data"]] == [new]


def test_only_the_newest_of_the_jobs_that_went_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_shelf, "_MAX_GONE", 2)
    shelf = job_shelf.JobShelf(capacity=10, max_output_bytes=1)
    for number in range(4):
        shelf.put(job(number))
        shelf.pop(job(number).id)
    assert [shelf.place(job(number).id) is None for number in range(4)] == [True, True, False, False]


def test_a_video_expires_with_its_bytes(start_server: Start) -> None:
    server = start_server(jobs=JobSettings(lifetime_s=1.0))
    video_id = server.post_video(prompt="a").json()["id"]
    wait_for(lambda: server.client.get(f"{VIDEOS}/{video_id}").status_code == 404)
    assert list((server.files_dir / "videos").iterdir()) == []
    assert server.client.get(VIDEOS).json()["data"] == []


def test_the_oldest_results_go_when_the_disk_budget_is_spent(start_server: Start) -> None:
    server = start_server(jobs=JobSettings(max_output_bytes=2 * 250))  # a scripted result takes some 220 bytes
    ids = []
    for number in range(4):
        ids.append(server.post_video(prompt="a", seed=number).json()["id"])
        wait_for(lambda: server.client.get(f"{VIDEOS}/{ids[-1]}").json()["status"] == "completed")
    assert [video["id"] for video in server.client.get(VIDEOS).json()["data"]] == ids[:1:-1]
    assert len(list((server.files_dir / "videos").iterdir())) == 2 * 3


def test_a_refused_video_leaves_nothing(start_server: Start) -> None:
    server = start_server()
    server.engine.refusal = StorageError("no room")
    assert_error(server.post_video(prompt="a"), 507, "storage_error")
    again = restarted(start_server, server)
    assert again.client.get(VIDEOS).json()["data"] == []


# --- webhooks ---


class Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps what it is told; refuses the first `refusals` times."""

    calls: list[tuple[dict[str, str], bytes]]
    refusals: int

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).calls.append((dict(self.headers), body))
        refused = len(type(self).calls) <= type(self).refusals
        self.send_response(503 if refused else 204)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def receiver() -> Iterator[Callable[[int], tuple[str, list[tuple[dict[str, str], bytes]]]]]:
    servers = []

    def start(refusals: int) -> tuple[str, list[tuple[dict[str, str], bytes]]]:
        handler = type("Handler", (Receiver,), {"calls": [], "refusals": refusals})
        listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(listener)
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{listener.server_port}/hook?a=b", handler.calls

    yield start
    for listener in servers:
        listener.shutdown()
        listener.server_close()


def test_a_webhook_is_signed_as_openais_client_checks_it_and_sent_until_it_is_taken(
    start_server: Start, receiver: Callable[[int], tuple[str, list[tuple[dict[str, str], bytes]]]]
) -> None:
    url, calls = receiver(2)
    target = WebhookTarget(url=url, secret=SECRET, delays_s=(0.05,) * 3)
    server = start_server(jobs=JobSettings(webhook=target))
    done = server.post_video(prompt="a").json()["id"]
    wait_for(lambda: len(calls) == 3)
    client = openai.OpenAI(api_key="unused", base_url="http://unused", webhook_secret=SECRET)
    for headers, body in calls:
        client.webhooks.verify_signature(body, headers)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body + b" ", headers)
    event = json.loads(calls[-1][1])
    assert (event["type"], event["data"], event["object"]) == ("video.completed", {"id": done}, "event")
    assert len({headers["webhook-id"] for headers, _ in calls}) == 1
    failed = server.post_video(prompt="fail").json()["id"]
    wait_for(lambda: len(calls) == 4)
    assert json.loads(calls[3][1])["data"] == {"id": failed}
    assert json.loads(calls[3][1])["type"] == "video.failed"


def test_a_webhook_that_was_not_taken_is_sent_after_a_restart_and_one_that_was_is_not(
    start_server: Start, receiver: Callable[[int], tuple[str, list[tuple[dict[str, str], bytes]]]]
) -> None:
    url, calls = receiver(1)
    target = WebhookTarget(url=url, secret=SECRET, delays_s=(60.0,))
    server = start_server(jobs=JobSettings(webhook=target))
    server.post_video(prompt="a")
    wait_for(lambda: len(calls) == 1)
    again = restarted(start_server, server, jobs=JobSettings(webhook=target))
    wait_for(lambda: len(calls) == 2)
    first, second = ((headers["webhook-id"], body) for headers, body in calls)
    assert first == second, "who took it and could not say so must know it again"
    time.sleep(0.2)
    third = restarted(start_server, again, jobs=JobSettings(webhook=target))
    time.sleep(0.5)
    assert len(calls) == 2 and third.client.get(VIDEOS).json()["data"] != []
