"""`sglang bench serve` against a peer with OpenAI's fields alone: the report must say what the peer saw."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from sglang.cli.main import main
from sglang.multimodal_gen import envs
from sglang.multimodal_gen.errors import BenchmarkFailed, LoadRefused, MissingPackage, ServerNotReachable, UsageError
from sglang.multimodal_gen.runtime.bench.load.generator import LoadGenerator
from sglang.multimodal_gen.runtime.bench.load.observation import RequestFailure, failure_of, json_object
from sglang.multimodal_gen.runtime.bench.load.plan import Plan, read_size_mix
from sglang.multimodal_gen.runtime.bench.load.plot import draw
from sglang.multimodal_gen.runtime.bench.load.prompts import PROMPTS
from sglang.multimodal_gen.runtime.bench.load.result import LoadResult, Target, load_result
from sglang.multimodal_gen.runtime.bench.load.samples import Sample
from sglang.multimodal_gen.runtime.bench.load.server_metrics import server_side
from sglang.multimodal_gen.runtime.bench.load.sse import EventDecoder
from sglang.multimodal_gen.runtime.bench.load.tables import load_sections
from sglang.multimodal_gen.runtime.bench.serve import measure_serve
from sglang.multimodal_gen.runtime.bench.statistics import distribution
from sglang.multimodal_gen.runtime.bench.tables import as_text
from sglang.multimodal_gen.runtime.entrypoints.cli import bench
from sglang.multimodal_gen.runtime.observability.metrics import EngineMetrics, EngineSnapshot
from sglang.multimodal_gen.test.scripted_peer import CLIP, FILE_S, IMAGE, MODEL, Peer, running_peer
from sglang.multimodal_gen.test.test_cli import sentence_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(envs.BENCH_API_KEY, raising=False)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running_peer() as made:
        yield made


def options(**changes: Any) -> dict[str, Any]:
    """The options of a run with the defaults for what is not said."""
    job = bench.configure(["serve"])
    assert isinstance(job, bench.BenchJob)
    return {**job.options, **changes}


def plan(**changes: Any) -> Plan:
    return Plan.from_options(options(**changes))


def prompts(*texts: str) -> str:
    """A file with these prompts."""
    Path("prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    return "prompts.txt"


def measured(peer: Peer, **changes: Any) -> LoadResult:
    return measure_serve(options(base_url=peer.url, **changes))


# --- what is sent, and when ---


def test_arrivals_are_random_with_the_wanted_mean_and_the_same_for_the_same_seed() -> None:
    due = [planned.due_s or 0.0 for planned in plan(request_rate=50.0, num_requests=4000).requests()]
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    # Of an exponential distribution the standard deviation is the mean; evenly spaced ones would have none.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
    again = [planned.due_s for planned in plan(request_rate=50.0, num_requests=4000).requests()]
    other = [planned.due_s for planned in plan(request_rate=50.0, num_requests=4000, seed=1).requests()]
    assert again == due and other != due


def test_a_duration_bounds_the_moments_and_a_number_bounds_the_requests() -> None:
    both = list(plan(request_rate=100.0, duration=1.0, num_requests=10).requests())
    assert len(both) == 10
    timed = list(plan(request_rate=100.0, duration=1.0).requests())
    assert 60 < len(timed) < 140 and max(planned.due_s or 0.0 for planned in timed) <= 1.0
    assert len(list(plan().requests())) == 20


def test_sizes_come_in_their_shares_and_another_rate_leaves_them_as_they_are() -> None:
    def sizes(**changes: Any) -> list[str]:
        made = plan(size_mix="64x64:0.7,128x64:0.3", num_requests=2000, **changes)
        return [planned.body["size"] for planned in made.requests()]

    assert sizes().count("64x64") / 2000 == pytest.approx(0.7, abs=0.04)
    assert sizes(request_rate=3.0) == sizes()
    assert [planned.body["size"] for planned in plan(size_mix="8x8,4x4").warm_ups(3)] == ["8x8", "4x4", "8x8"]


def test_prompts_are_taken_in_turn_and_say_more_than_the_options() -> None:
    Path("p.jsonl").write_text('{"prompt": "a", "size": "8x8", "model": null}\n\n{"prompt": "b", "x": [1]}\n')
    made = plan(
        prompts_file="p.jsonl", size_mix="4x4", model="m", extra_body={"seed": 7, "x": 1}, num_inference_steps=3,
        num_requests=3,
    )  # fmt: skip
    bodies = [planned.body for planned in made.requests()]
    assert bodies[0] == {"prompt": "a", "size": "8x8", "seed": 7, "x": 1, "num_inference_steps": 3}
    assert bodies[1] == {"prompt": "b", "size": "4x4", "model": "m", "seed": 7, "x": [1], "num_inference_steps": 3}
    assert bodies[2] == bodies[0]
    assert [planned.prompt for planned in made.requests()] == [0, 1, 0]
    assert [planned.body for planned in plan(num_requests=2).requests()] == [{"prompt": text} for text in PROMPTS[:2]]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.txt", b"\n \n", "--prompts-file: p.txt has no prompt"),
        ("p.jsonl", b"\n", "--prompts-file: p.jsonl has no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"size": "8x8"}', "--prompts-file: p.jsonl, line 2: has no prompt"),
        ("p.jsonl", b'{"prompt": " "}', "--prompts-file: p.jsonl, line 1: has no prompt"),
        ("p.jsonl", b"[1]", "--prompts-file: p.jsonl, line 1: not a JSON object"),
        ("p.jsonl", b"a prompt", "--prompts-file: p.jsonl, line 1: not a JSON object"),
        ("p.txt", b"\xff", "--prompts-file: p.txt, line 1: not UTF-8 text"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(name: str, content: bytes, problem: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UsageError, match=problem.replace(".", r"\.")):
        bench.configure(["serve", "--prompts-file", name])


@pytest.mark.parametrize(
    "text", ["", "64", "64x64:", "64x64:0", "64x64:-1", "0x64", "64x64,64x64", "64x64:a", "64x64,,"]
)
def test_what_is_no_mix_of_sizes_is_refused(text: str) -> None:
    assert read_size_mix(text) == ()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--request-rate 1 --max-concurrency 2", "request_rate: arrivals at a rate wait for nothing, accepted is "),
        ("--endpoint videos --partial-images 2", "partial_images: only images have them"),
        ("--prompts-file no.txt", "--prompts-file: cannot read no.txt: No such file or directory"),
        ("--size-mix 64", "--size-mix: got 64, accepted is sizes with their shares"),
        ("--base-url localhost:30000", "--base-url: got localhost:30000, accepted is an address such as http://"),
        ("--base-url http://h:99999", "--base-url: got http://h:99999, accepted is an address"),
        ("--base-url http://key@h", "--base-url: got http://key@h, accepted is an address"),
        ("--plot a.svg", "--plot: got a.svg, accepted is a name that ends with .png"),
        ("--extra-body [1]", "--extra-body: got [1], accepted is a JSON object"),
        ("--request-rate 0", "--request-rate: got 0.0, accepted is a number from 0.001 to 100000"),
        ("--model-path demo", "unknown flag --model-path"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(capsys: Capture, command: str, sentence: str) -> None:
    assert sentence_of(capsys, "bench", "serve", *command.split()).startswith(sentence)


# --- replies ---


def test_events_are_cut_wherever_the_body_is() -> None:
    body = "﻿event: a\r\ndata: 1\r\ndata: 2\r\n\r\n: ping\n\nid: 3\ndata:ä\n\ndata\n\nevent: lost\n\n".encode()
    expected = [("a", "1\n2"), ("", "ä"), ("", "")]
    for step in (1, 2, 3, len(body)):
        decoder = EventDecoder()
        chunks = [body[at : at + step] for at in range(0, len(body), step)]
        assert [event for chunk in chunks for event in decoder.feed(chunk)] == expected


@pytest.mark.parametrize(
    ("status", "data", "key", "detail"),
    [
        (429, b'{"error": {"message": "too\\nmany", "code": "queue_full"}}', "429 queue_full", "too many"),
        (400, b'{"error": {"message": "m", "code": null, "type": "t"}}', "400 t", "m"),
        (404, b'{"detail": "Not Found"}', "404", "Not Found"),
        (422, b'{"detail": [{"loc": ["body"]}]}', "422", "[{'loc': ['body']}]"),
        (500, b"<html>", "500", "status 500"),
        (502, b'{"error": "plain"}', "502", "plain"),
    ],
)
def test_failures_are_counted_by_status_and_code(status: int, data: bytes, key: str, detail: str) -> None:
    failure = failure_of(status, data)
    assert (failure.key, failure.detail, failure.status) == (key, detail, status)
    with pytest.raises(RequestFailure, match="no JSON object"):
        json_object(b"[1]")


# --- what the samples say ---


def sample(number: int, **changes: Any) -> Sample:
    """One of a request a second that takes half of it, 10 by 10 pixels."""
    values: dict[str, Any] = {
        "number": number, "prompt": 0, "size": "10x10", "due_s": float(number), "sent_s": float(number),
        "end_s": number + 0.5, "outcome": "ok", "detail": "", "latency_s": 0.5, "queue_s": None, "execution_s": None,
        "download_s": None, "first_preview_s": None, "bytes_received": 100, "num_outputs": 1, "pixels": 100,
    }  # fmt: skip
    return Sample(**{**values, **changes})


def result_of(samples: list[Sample], **changes: Any) -> LoadResult:
    target = Target(api="http://h/v1", endpoint="images", model=None, follows_events=None, poll_interval_s=None)
    values: dict[str, Any] = {
        "target": target, "request_rate": 1.0, "max_concurrency": None, "delays": [0.0], "slo_s": None, "server": None,
        "was_interrupted": False,
    }  # fmt: skip
    return load_result(samples, **{**values, **changes})


FAILED = {"outcome": "500", "detail": "why", "latency_s": None, "num_outputs": 0, "pixels": None}


def test_rates_and_goodput_are_those_counted_by_hand() -> None:
    slow = sample(2, size="20x10", end_s=4.0, latency_s=2.0, pixels=200)
    cut = sample(4, outcome="interrupted", latency_s=None, num_outputs=0, pixels=None)
    result = result_of([slow, sample(0), sample(1), sample(3, **FAILED), cut], slo_s=0.5, was_interrupted=True)
    assert [one.number for one in result.samples] == [0, 1, 2, 3, 4]
    assert (result.num_sent, result.num_ok, result.num_interrupted, result.errors) == (5, 3, 1, {"500": 1})
    assert result.duration_s == 4.5
    assert result.requests_per_second == result.outputs_per_second == pytest.approx(3 / 4.5)
    assert result.pixels_per_second == pytest.approx(400 / 4.5)
    assert result.bytes_received == 500
    assert result.goodput is not None
    assert (result.goodput.num_within, result.goodput.share) == (2, 0.5)
    assert result.goodput.requests_per_second == pytest.approx(2 / 4.5)
    assert result.latency_s == distribution([0.5, 0.5, 2.0])
    assert {size: found.count for size, found in result.latency_s_by_size.items()} == {"10x10": 2, "20x10": 1}
    assert result.arrivals.sent_rate == 1.0


def test_what_nobody_told_is_said_to_be_unknown() -> None:
    names = ["time in the queue", "time of execution", "time to the first preview", "requests per forward"]
    assert list(result_of([sample(0)]).unknown) == names
    assert list(result_of([sample(0), sample(1, pixels=None)]).unknown) == [*names, "pixels a second"]
    told = sample(0, queue_s=0.1, execution_s=0.4, first_preview_s=0.2)
    assert list(result_of([told]).unknown) == ["requests per forward"]
    assert result_of([sample(0, **FAILED)]).unknown == {}, "without a result there is nothing to know"


@pytest.mark.parametrize(
    ("late_s", "rate", "latency_s", "kept_up"),
    [(0.009, 100.0, 0.01, True), (0.02, 100.0, 0.01, False), (0.02, 100.0, 0.5, True), (0.05, 1.0, 0.01, True)],
)
def test_a_generator_that_is_late_is_told_unless_it_makes_no_difference(
    late_s: float, rate: float, latency_s: float, kept_up: bool
) -> None:
    """No difference make 10 ms, a tenth of the mean gap, and a tenth of what a request takes."""
    late = [sample(n, due_s=n / rate, sent_s=n / rate + late_s, latency_s=latency_s) for n in range(5)]
    result = result_of(late, request_rate=rate)
    assert result.arrivals.lateness is not None and result.arrivals.lateness.p99 == pytest.approx(late_s)
    assert result.arrivals.kept_up is kept_up
    text = "".join(map(as_text, load_sections(result)))
    assert ("COULD NOT KEEP UP" in text, "kept up" in text) == (not kept_up, kept_up)


def test_a_run_without_a_single_request_can_be_shown_and_drawn() -> None:
    result = result_of([], request_rate=None, max_concurrency=1, delays=[])
    assert "0 sent, 0 done, 0 failed" in "".join(map(as_text, load_sections(result)))
    assert draw(result).startswith(b"\x89PNG")


def test_the_server_s_own_numbers_are_the_rise_between_two_scrapes() -> None:
    nothing = EngineSnapshot(
        ready=True, num_queued=0, num_running=0, num_workers=1, num_worker_restarts=0, budget_bytes=0,
        reserved_bytes=0, allocated_bytes=None,
    )  # fmt: skip
    metrics = EngineMetrics(lambda: nothing)
    metrics.lane_done("denoise", stage="denoise", batch_size=8, seconds=1.0)
    before = metrics.text()
    for batch_size in (1, 3, 4, 4):
        metrics.lane_done("denoise", stage="denoise", batch_size=batch_size, seconds=1.0)
    metrics.lane_done("decode", stage="decode", batch_size=1, seconds=1.0)
    metrics.request_started(0.5, priority=0)
    metrics.request_started(1.5, priority=1)
    found = server_side(before, metrics.text())
    assert found is not None
    assert found.requests_per_forward == {"decode": 1.0, "denoise": 3.0}
    assert found.steps_by_batch_size == {"up to 1": 1, "up to 4": 3}
    assert found.mean_queue_s == 1.0
    assert server_side(metrics.text(), before) is None, "counters that fall are another scheduler's"
    for other in (None, "", "<html>", "up 1\n", before):
        assert server_side(other, other) is None


# --- against a peer ---


def test_latencies_are_those_that_the_server_made(peer: Peer) -> None:
    """Each latency holds the time between the server's own two moments, which hold its delay."""
    file = prompts("delay-300", "delay-50 x", "delay-150 x y")
    outside = time.perf_counter()
    result = measured(peer, prompts_file=file, num_requests=6, max_concurrency=2)
    outside = time.perf_counter() - outside
    by_prompt = {text: [] for text in ("delay-300", "delay-50 x", "delay-150 x y")}
    for one in peer.of("POST", "/v1/images")[1:]:  # after the warm-up
        by_prompt[one.body["prompt"]].append(one.answered - one.received)
    for index, (text, took) in enumerate(by_prompt.items()):
        delay_s = int(text.split()[0].removeprefix("delay-")) / 1000
        latencies = [one.latency_s or 0.0 for one in result.samples if one.prompt == index]
        assert len(latencies) == len(took) == 2
        assert all(latency >= delay_s for latency in latencies)
        assert sum(latencies) >= sum(took) - 0.005, "the server takes its last moment when the bytes are on their way"
    assert sum(one.latency_s or 0.0 for one in result.samples) <= 2 * outside
    assert result.latency_s is not None and result.latency_s.maximum >= 0.3


def test_a_peer_gets_openai_s_fields_and_what_it_does_not_tell_is_unknown(peer: Peer) -> None:
    result = measured(peer, model=MODEL, size_mix="32x16", num_requests=3, extra_body={"n": 2})
    assert (result.num_ok, result.errors) == (3, {})
    for one in peer.of("POST", "/v1/images"):
        assert one.body.keys() == {"prompt", "model", "size", "n"}
        assert "authorization" not in one.headers
    assert {one.num_outputs for one in result.samples} == {2}
    assert {one.pixels for one in result.samples} == {2 * 32 * 16}
    assert all(one.bytes_received > 2 * len(IMAGE) for one in result.samples)
    assert list(result.unknown) == [
        "time in the queue", "time of execution", "time to the first preview", "requests per forward",
    ]  # fmt: skip
    assert (result.queue_s, result.execution_s, result.first_preview_s, result.server) == (None,) * 4


def test_arrivals_do_not_wait_for_replies(peer: Peer) -> None:
    """The peer answers none before all eight are under way."""
    result = measured(peer, prompts_file=prompts("together-8"), request_rate=60.0, num_requests=8, warmup_requests=0)
    assert result.num_ok == 8
    assert peer.most_open == 8
    assert [one.number for one in result.samples] == list(range(8))
    first_end = min(one.end_s for one in result.samples)
    assert all(one.due_s is not None and one.due_s <= one.sent_s < first_end for one in result.samples)
    assert result.arrivals.lateness is not None and result.arrivals.max_concurrency is None


def test_a_closed_loop_has_so_many_under_way_and_never_more(peer: Peer) -> None:
    file = prompts("together-3 delay-20")
    result = measured(peer, prompts_file=file, max_concurrency=3, num_requests=9, warmup_requests=0)
    assert (peer.most_open, result.num_ok) == (3, 9)
    assert result.arrivals.lateness is None and result.arrivals.kept_up


def test_a_duration_ends_the_sending_and_waits_for_what_is_under_way(peer: Peer) -> None:
    result = measured(peer, prompts_file=prompts("delay-150"), duration=0.4, max_concurrency=2)
    assert result.num_ok == result.num_sent >= 2
    assert max(one.sent_s for one in result.samples) < 0.4 < result.duration_s


def test_warm_up_requests_are_not_counted(peer: Peer) -> None:
    result = measured(peer, num_requests=2, warmup_requests=3)
    assert (len(peer.of("POST", "/v1/images")), result.num_sent) == (5, 2)


def test_previews_of_a_stream_are_timed(peer: Peer) -> None:
    result = measured(peer, prompts_file=prompts("delay-80"), partial_images=2, num_requests=2)
    body = peer.of("POST", "/v1/images")[0].body
    assert (body["stream"], body["partial_images"]) == (True, 2)
    for one in result.samples:
        assert one.is_ok and one.first_preview_s is not None and one.latency_s is not None
        assert 0.08 <= one.first_preview_s < one.latency_s >= 3 * 0.08, "two previews come before the image"
        assert (one.size, one.pixels) == ("32x32", 32 * 32)
        assert one.bytes_received > 3 * len(IMAGE)
    assert "time to the first preview" not in result.unknown


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ("status-503", "503 as_told"),
        ("status-404", "404 as_told"),
        ("garbage", "invalid reply"),
        ("nothing", "invalid reply"),
        ("cut", "connection"),
        ("hang", "timeout"),
    ],
)
def test_failures_are_counted_and_leave_the_others_alone(peer: Peer, prompt: str, key: str) -> None:
    result = measured(peer, prompts_file=prompts("fine", prompt), num_requests=4, timeout_s=1.0, max_concurrency=4)
    assert (result.num_ok, result.errors) == (2, {key: 2})
    failed = [one for one in result.samples if not one.is_ok]
    assert all(one.latency_s is None and one.detail for one in failed)
    assert result.latency_s is not None and result.latency_s.count == 2
    text = "".join(map(as_text, load_sections(result)))
    assert "failures" in text and failed[0].detail[:100] in text


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_images_behind_urls_are_fetched_before_a_request_ends(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, is_elsewhere: bool
) -> None:
    """From another server without the key of this one, which is none of its business."""
    monkeypatch.setenv(envs.BENCH_API_KEY, "secret")
    peer.key = "secret"
    with running_peer() as other:
        peer.files_url = other.url if is_elsewhere else ""
        extra = {"response_format": "url", "n": 2}
        result = measured(
            peer, prompts_file=prompts("fine", "lost"), extra_body=extra, num_requests=4, warmup_requests=0
        )
        fetched = (other if is_elsewhere else peer).of("GET", "/files/")
    assert (result.num_ok, result.errors) == (2, {"404": 2})
    assert {one.headers.get("authorization") for one in fetched} == {None if is_elsewhere else "Bearer secret"}
    assert len([one for one in fetched if "found" in one.path]) == 4
    for one in result.samples:
        if one.is_ok:
            assert one.latency_s is not None and one.latency_s >= FILE_S and one.bytes_received > 2 * len(CLIP)


@pytest.mark.parametrize(("word", "key"), [("stream-error", "server_overloaded"), ("stream-ends", "invalid reply")])
def test_a_stream_that_fails_is_a_failure(peer: Peer, word: str, key: str) -> None:
    result = measured(peer, prompts_file=prompts("fine", word), partial_images=1, num_requests=2)
    assert (result.num_ok, result.errors) == (1, {key: 1})


def test_videos_are_created_as_forms_polled_fetched_and_deleted(peer: Peer) -> None:
    result = measured(peer, endpoint="videos", size_mix="32x16", extra_body={"seconds": "4"}, num_requests=2)
    assert result.num_ok == 2
    [first, *_] = created = peer.of("POST", "/v1/videos")
    assert first.headers["content-type"].startswith("multipart/form-data")
    assert first.body == {"prompt": PROMPTS[0], "size": "32x16", "seconds": "4"}
    assert len(peer.of("GET", "/v1/videos/video%2F1")) == 3  # twice its status, then the content
    assert len(peer.of("DELETE", "/v1/videos/")) == len(created) == 3
    assert len([one for one in peer.seen if one.path.endswith("/events")]) == 1, "a server without events is asked once"
    assert (result.target.follows_events, result.target.poll_interval_s) == (False, 0.005)
    for one in result.samples:
        assert one.queue_s is not None and one.execution_s is not None and one.download_s is not None
        assert one.latency_s == pytest.approx(one.queue_s + one.execution_s + one.download_s)
        assert one.bytes_received > len(CLIP)
    assert list(result.unknown) == ["time to the first preview", "requests per forward", "pixels a second"]


def test_videos_are_followed_by_events_where_there_are_some(peer: Peer) -> None:
    peer.events = [
        {"type": "video.queued", "sequence_number": 0, "video": {"status": "queued"}},
        {"type": "video.in_progress", "sequence_number": 1, "video": {"status": "in_progress"}},
        {"type": "video.preview", "sequence_number": 2, "step": 1, "b64_json": IMAGE},
        {"type": "video.completed", "sequence_number": 3,
         "video": {"status": "completed", "num_frames": 5, "queue_time_s": 0.25, "inference_time_s": 0.5}},
    ]  # fmt: skip
    result = measured(peer, endpoint="videos", num_requests=2)
    assert result.target.follows_events is True
    assert not [one for one in peer.of("GET", "/v1/videos/") if one.path.endswith(("0", "1", "2"))], "nobody polls"
    for one in result.samples:
        assert (one.queue_s, one.execution_s, one.pixels) == (0.25, 0.5, 32 * 16 * 5)
        assert one.first_preview_s is not None and one.latency_s is not None and one.first_preview_s < one.latency_s
    assert list(result.unknown) == ["requests per forward"]


def test_a_video_whose_events_break_off_is_polled_to_its_end(peer: Peer) -> None:
    peer.events = [{"type": "video.queued", "sequence_number": 0, "video": {"status": "queued"}}]
    assert measured(peer, endpoint="videos", num_requests=2).num_ok == 2


def test_a_video_that_fails_is_counted_under_its_code(peer: Peer) -> None:
    result = measured(peer, endpoint="videos", prompts_file=prompts("fine", "fail-job"), num_requests=2)
    assert (result.num_ok, result.errors) == (1, {"moderation_blocked": 1})
    assert result.samples[1].detail == "not this one"


# --- servers that cannot be measured ---


def test_a_server_that_is_not_there_is_one_sentence(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["bench", "serve", "--base-url", f"http://127.0.0.1:{port}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"sglang: error: base_url: no answer from http://127.0.0.1:{port}/v1 (Connection refused); "
        "accepted is the address of a running server\n"
    )


def test_a_name_that_does_not_exist_and_a_server_of_something_else_are_not_reachable() -> None:
    with pytest.raises(ServerNotReachable, match=r"no answer from http://no\.such\.host\.invalid/v1"):
        measure_serve(options(base_url="http://no.such.host.invalid"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        child = subprocess.Popen(
            [sys.executable, "-c", "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])).accept()[0]; "
             "s.recv(99); s.sendall(b'SSH-2.0-x\\r\\n'); s.close()", str(other.fileno())], pass_fds=[other.fileno()],
        )  # fmt: skip
        with pytest.raises(ServerNotReachable, match=r"Bad status line|Expected HTTP"):
            measure_serve(options(base_url=f"http://127.0.0.1:{other.getsockname()[1]}"))
        assert child.wait(10) == 0


@pytest.mark.parametrize("warmup_requests", [0, 1])
@pytest.mark.parametrize(
    ("changes", "status", "sentence"),
    [
        ({"model": "other"}, 404, "/v1/images/generations answered 404 (The model 'other' does not exist.); see that "),
        (
            {"base": "/other/v1"},
            404,
            "/other/v1/images/generations answered 404 (Not Found); see that --base-url, --en",
        ),
        ({"num_inference_steps": 3}, 400, "answered 400 (Unknown parameter: 'num_inference_steps'.); see that the opt"),
    ],
)
def test_a_server_that_would_refuse_every_request_ends_it_in_one_sentence(
    peer: Peer, changes: dict[str, Any], status: int, sentence: str, warmup_requests: int
) -> None:
    url = peer.url + changes.get("base", "")
    body = {name: value for name, value in changes.items() if name != "base"}
    with pytest.raises(LoadRefused) as caught:
        measure_serve(options(base_url=url, warmup_requests=warmup_requests, **body))
    assert sentence in str(caught.value) and caught.value.status == status
    assert len(peer.of("POST", "/")) == 1, "nothing is sent after it"


def test_a_warm_up_that_fails_for_now_ends_it(peer: Peer) -> None:
    peer.refuses_all = True
    with pytest.raises(BenchmarkFailed, match=r"a warm-up request failed: 429 rate_limit_exceeded \(Slow down\.\)"):
        measured(peer)


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    peer.key = "a-secret-of-the-peer"
    with pytest.raises(LoadRefused, match=r"answered 401 .*give the server's key as SGLANG_BENCH_API_KEY"):
        measured(peer)
    monkeypatch.setenv(envs.BENCH_API_KEY, peer.key)
    assert measured(peer, num_requests=1).num_ok == 1
    monkeypatch.delenv(envs.BENCH_API_KEY)
    line = ["bench", "serve", "--base-url", peer.url, "--api-key", peer.key, "--num-requests", "1"]
    assert main([*line, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["options"]["api_key"] == "***"
    assert peer.key not in out + err


def test_the_server_s_key_stays_out_of_the_reports_of_other_benchmarks(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv(envs.option_variable("admin_api_key"), "another-secret-of-16")
    line = ["bench", "engine", "--repeats", "1", "--warmup-runs", "0", "--steps", "2", "--concurrency", "1"]
    assert main([*line, "--json", "-"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["options"]["engine"]["http"]["admin_api_key"] == "***"
    assert "another-secret-of-16" not in out


def test_without_the_http_client_the_command_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingPackage, match="bench serve: needs the package aiohttp"):
        measure_serve(options())


def test_a_bug_of_ours_is_not_taken_for_a_failure_of_the_server(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LoadGenerator, failure: RequestFailure) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LoadGenerator, "_consider", broken)
    with pytest.raises(ZeroDivisionError):
        measured(peer, prompts_file=prompts("status-500"), warmup_requests=0, request_rate=50.0, num_requests=3)


# --- command lines ---


def test_the_command_line_shows_tables_writes_every_sample_and_draws(peer: Peer, capsys: Capture) -> None:
    line = ["--base-url", peer.url, "--request-rate", "40", "--num-requests", "12", "--size-mix", "16x16,32x32"]
    file = prompts("delay-20", "delay-60", "status-500")
    arguments = ["--prompts-file", file, "--slo-s", "0.05", "--json", "load.json", "--plot", "load.png"]
    assert main(["bench", "serve", *line, *arguments]) == 0
    out, err = capsys.readouterr()
    for words in ("12 sent, 8 done, 4 failed", "goodput", "latency by size", "500 as_told", "not known", "open loop"):
        assert words in out
    assert "measuring 12 requests, 40 a second" in err
    report = json.loads(Path("load.json").read_text())
    assert report["benchmark"] == "serve" and "engine" not in report["options"]
    result = msgspec.convert(report["result"], LoadResult)
    assert len(result.samples) == 12 and result.latency_s is not None and result.latency_s.count == 8
    with Image.open("load.png") as picture:
        assert picture.format == "PNG" and picture.size == (1500, 720)
        colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert {(47, 111, 176), (199, 58, 52)} <= colours, "requests that were done, and those that failed"


def test_a_run_in_which_nothing_succeeds_has_exit_status_1(peer: Peer, capsys: Capture) -> None:
    line = ["--base-url", peer.url, "--prompts-file", prompts("status-500"), "--warmup-requests", "0"]
    assert main(["bench", "serve", *line, "--num-requests", "2"]) == 1
    assert "2 sent, 0 done, 2 failed" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_is_known_before_anything_runs(peer: Peer, capsys: Capture) -> None:
    assert main(["bench", "serve", "--base-url", peer.url, "--plot", "no/such/a.png"]) == 1
    assert capsys.readouterr().err.startswith("sglang: error: plot: cannot write no/such/a.png")
    assert not peer.seen


@pytest.mark.parametrize("endpoint", ["images", "videos"])
def test_ctrl_c_reports_what_there_is_and_leaves_no_video(peer: Peer, endpoint: str) -> None:
    # As on a terminal, also where the tests run in the background.
    code = (
        "import signal, sys; from sglang.cli.main import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"
    )
    line = ["bench", "serve", "--base-url", peer.url, "--endpoint", endpoint, "--duration", "60", "--json", "load.json"]
    more = ["--request-rate", "20", "--prompts-file", prompts("fine", "hang"), "--warmup-requests", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *line, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    deadline = time.monotonic() + 60
    while len([one for one in peer.seen if one.method == "POST"]) < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # for the replies to those that do not hang
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    result = msgspec.convert(json.loads(Path("load.json").read_text())["result"], LoadResult)
    assert result.was_interrupted and result.num_ok >= 1 and result.num_interrupted >= 1
    assert f"{result.num_interrupted} interrupted" in out
    assert result.errors == {}
    deleted = {one.path for one in peer.of("DELETE", "/v1/videos/")}
    assert endpoint == "images" or len(deleted) >= result.num_ok + 1, "the warm-up's and every one that was done"
