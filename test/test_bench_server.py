"""`sglang bench serve` against real servers: of the model that does nothing, and of the embedded one."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server_process import ServerProcess, running_server
from sglang.cli.main import main

IMAGES_S = r'sglang_diffusion_http_request_duration_seconds_sum{method="POST",route="/v1/images/generations"} (\S+)'


@pytest.fixture(scope="module")
def null_server() -> Iterator[ServerProcess]:
    command = [str(Path(sys.executable).with_name("sglang")), "serve", "--model-path", "null-model", "--port", "0"]
    with running_server(command) as running:
        yield running


def measured(capsys: pytest.CaptureFixture[str], server: ServerProcess, line: str) -> dict[str, Any]:
    """The `result` of the report."""
    assert main(["bench", "serve", "--base-url", server.url, *line.split(), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["result"]


def own_seconds(server: ServerProcess) -> float:
    """What the server says that it spent on replies to calls for images."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        found = re.search(IMAGES_S, reply.read().decode())
    return 0.0 if found is None else float(found[1])


def test_images_of_our_server_come_with_times_and_batch_sizes_that_agree(
    null_server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    before = own_seconds(null_server)
    result = measured(
        capsys, null_server, "--request-rate 30 --num-requests 24 --size-mix 32x32:0.5,64x32:0.5 --warmup-requests 0"
    )
    assert (result["num_ok"], result["errors"]) == (24, {})
    latencies = [sample["latency_s"] for sample in result["samples"]]
    assert sum(latencies) >= own_seconds(null_server) - before > 0, "the server's time is part of ours"
    for sample in result["samples"]:
        assert sample["queue_s"] + sample["execution_s"] <= sample["latency_s"] + 0.001  # they are rounded
        assert sample["pixels"] == {"32x32": 1024, "64x32": 2048}[sample["size"]]
    assert result["queue_s"]["mean"] == pytest.approx(result["server"]["mean_queue_s"], abs=0.001)
    steps = sum(result["server"]["steps_by_batch_size"].values())
    assert result["server"]["requests_per_forward"]["denoise"] * steps == pytest.approx(24 * 4)  # four steps each
    assert list(result["unknown"]) == ["time to the first preview"]


def test_videos_of_our_server_are_followed_fetched_and_removed(
    null_server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measured(
        capsys,
        null_server,
        "--endpoint videos --max-concurrency 2 --num-requests 6 --num-frames 9 --poll-interval-s 0.02",
    )
    assert (result["num_ok"], result["errors"]) == (6, {})
    for sample in result["samples"]:
        assert sample["pixels"] == 16 * 16 * 9 and sample["bytes_received"] > 500
        assert 0 < sample["execution_s"] <= sample["latency_s"] and sample["download_s"] > 0
    with urllib.request.urlopen(f"{null_server.url}/v1/videos", timeout=10) as reply:
        assert json.load(reply)["data"] == []


def test_the_embedded_model_is_measured_and_shown(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--model demo --max-concurrency 2 --num-requests 4 --num-inference-steps 2 --size-mix 64x64 --slo-s 60"
    assert main(["bench", "serve", "--base-url", server.url, *line.split()]) == 0
    out = capsys.readouterr().out
    for words in ("4 sent, 4 done, 0 failed", "100.0% within 60 s", "in the queue", "requests per forward, denoise"):
        assert words in out


def test_streamed_images_tell_their_first_preview_and_their_times(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--max-concurrency 1 --num-requests 2 --partial-images 3 --num-inference-steps 16 --size-mix 128x128"
    result = measured(capsys, server, line)
    assert (result["num_ok"], result["errors"]) == (2, {})
    for sample in result["samples"]:
        assert 0 < sample["first_preview_s"] < sample["latency_s"]
        assert sample["queue_s"] is not None and 0 < sample["execution_s"] < sample["latency_s"]
    assert list(result["unknown"]) == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--model nobody", "answered 404 (model: nobody is not served, accepted is null-model); see that --base-url"),
        (
            "--size-mix 33x33",
            "answered 400 (size: got 33x33, accepted are multiples of 16 in width and height; nearest",
        ),
        (
            "--base-url {url}/no/such",
            "/no/such/images/generations answered 404 (path: /no/such/images/generations does",
        ),
    ],
)
def test_what_our_server_refuses_is_told_in_its_words(
    null_server: ServerProcess, capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    words = line.format(url=null_server.url).split()
    assert main(["bench", "serve", "--base-url", null_server.url, *words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and sentence in err.splitlines()[-1]
    assert "Traceback" not in err
