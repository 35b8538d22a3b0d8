"""A real server's JSON log and /metrics: one id through all processes, no prompt, numbers that agree."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server_process import ServerProcess, running_server

ADMIN_KEY = "zebra-zebra-zebra-zebra"
# The family that does nothing, served as `sglang serve` serves a model.
SERVE = """
import sys
from sglang.multimodal_gen.test import null_family
null_family.register()
from sglang.cli.main import main
sys.exit(main(["serve", "--model-path", "null-model", "--port", "0", "--log-format", "json", *sys.argv[1:]]))
"""
SENTINEL = "Xylophon unter Palmen"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def server(outputs: Path) -> Iterator[ServerProcess]:
    """One server for all tests here."""
    variables = {"SGLANG_DIFFUSION_ADMIN_API_KEY": ADMIN_KEY, "SGLANG_DIFFUSION_PROT": "1"}
    command = [sys.executable, "-c", SERVE, "--output-path", str(outputs)]
    with running_server(command, env=os.environ | variables) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as made:
        yield made


def entries(server: ServerProcess) -> list[dict[str, Any]]:
    """Every line of the log so far; each must be JSON."""
    return [json.loads(line) for line in list(server.log)]


def about(server: ServerProcess, text: str, *, until: str) -> list[dict[str, Any]]:
    """The lines in which `text` stands, as `grep` finds them, once one of their messages begins with `until`."""
    deadline = time.monotonic() + 10
    while True:
        found = [json.loads(line) for line in list(server.log) if text in line]
        if any(entry["message"].startswith(until) for entry in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def post_image(client: httpx.Client, prompt: str, *, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return client.post("/v1/images/generations", json={"prompt": prompt, **fields}, headers=headers)


def test_one_search_for_the_clients_id_finds_the_request_in_every_process(
    server: ServerProcess, client: httpx.Client
) -> None:
    reply = post_image(client, f"crash {SENTINEL}", headers={"x-request-id": "trace-77"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "trace-77")
    found = about(server, "trace-77", until="method=POST")
    by_process: dict[str, list[dict[str, Any]]] = {}
    for entry in found:
        by_process.setdefault(entry["logger"].rpartition(".")[2], []).append(entry)
    assert set(by_process) == {"http", "scheduler", "gpu_worker"}
    [access] = by_process["http"]
    assert (access["request_id"], access["status"], access["path"]) == ("trace-77", 500, "/v1/images/generations")
    [engine_id] = access["request_ids"]
    assert engine_id.startswith("trace-77-")
    scheduler = by_process["scheduler"]
    assert [entry["message"].split()[0].strip(",") for entry in scheduler] == ["received", "started", "failed"]
    assert all(entry["request_id"] == engine_id for entry in scheduler)
    assert (scheduler[-1]["outcome"], scheduler[-1]["code"]) == ("failed", "internal_error")
    [worker] = by_process["gpu_worker"]
    assert (worker["level"], worker["request_ids"]) == ("error", [engine_id])
    assert "RuntimeError: cannot tokenise '[private]'" in worker["exception"]


def test_a_videos_id_leads_from_its_creation_to_its_end(server: ServerProcess, client: httpx.Client) -> None:
    created = client.post("/v1/videos", json={"prompt": SENTINEL, "negative_prompt": f"no {SENTINEL}"})
    video = created.json()["id"]
    lines = about(server, video, until="Pixel data")
    [access] = [entry for entry in lines if entry.get("method") == "POST"]
    assert (access["request_id"], access["request_ids"]) == (created.headers["x-request-id"], [video])
    messages = [entry["message"] for entry in lines if entry.get("request_id") == video]
    assert messages[0] == "received, 0 before it"
    assert messages[1].startswith("started after ")
    [finished] = [entry for entry in lines if entry.get("outcome") == "finished"]
    assert (finished["steps"], finished["batch"], finished["attempts"], finished["pixels"]) == (4, 1.0, 1, 16 * 16 * 5)
    assert set(finished["stage_seconds"]) == {"admission", "encode", "denoise", "decode", "encode_file"}
    assert messages[-1] == f"Pixel data generated successfully in {finished['seconds']:.4f} seconds"


def test_no_line_repeats_what_a_user_wrote(server: ServerProcess, client: httpx.Client) -> None:
    """Also when it is wrong, and when it is in a place where it does not belong."""
    assert post_image(client, f"fail {SENTINEL}").status_code == 400
    assert post_image(client, SENTINEL * 2000).status_code == 400
    assert post_image(client, "a", size=SENTINEL).status_code == 400
    assert post_image(client, "a", negative_prompt=[SENTINEL]).status_code == 400
    assert post_image(client, "a", **{SENTINEL: 1}).status_code == 400
    assert post_image(client, "a", model=SENTINEL).status_code == 404
    assert client.get("/v1/videos", params={"after": SENTINEL}).status_code == 400
    assert client.post("/v1/videos", files={"prompt": ("a.txt", SENTINEL.encode())}).status_code == 400
    about(server, "", until="method=POST path=/v1/videos status=400")
    assert "Xylophon" not in "".join(server.log)
    assert ADMIN_KEY not in "".join(server.log)


def scrape(client: httpx.Client) -> dict[str, float]:
    """Each sample's value by its name without the prefix and its labels' values."""
    reply = client.get("/metrics")
    assert reply.status_code == 200
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            labels = ",".join(value for _, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("sglang_diffusion_") + f"({labels})"] = sample.value
    return found


def test_metrics_over_http_count_what_was_asked(client: httpx.Client) -> None:
    before = scrape(client)
    assert post_image(client, "a", n=2).status_code == 200
    assert post_image(client, "fail").status_code == 400
    long = client.post("/v1/videos", json={"prompt": "sleep-20", "num_inference_steps": 1000}).json()["id"]
    while client.get(f"/v1/videos/{long}").json()["status"] == "queued":
        time.sleep(0.01)
    assert scrape(client)["num_running_reqs()"] == 1
    assert client.delete(f"/v1/videos/{long}").status_code == 200
    after = scrape(client)
    rise = {name: value - before.get(name, 0.0) for name, value in after.items()}
    outcomes = [rise[f"requests_total({outcome})"] for outcome in ("finished", "failed", "cancelled", "refused")]
    assert outcomes == [2, 1, 1, 0]
    assert rise["http_requests_total(POST,/v1/images/generations,200)"] == 1
    assert rise["http_requests_total(POST,/v1/images/generations,400)"] == 1
    assert rise["http_requests_total(DELETE,/v1/videos/{video_id},200)"] == 1
    assert rise["http_request_duration_seconds_count(POST,/v1/images/generations)"] == 2
    assert rise["pixels_total()"] == 2 * 16 * 16
    assert (after["scheduler_up()"], after["ready()"]) == (1, 1)


def test_metrics_answer_while_the_scheduler_does_not(server: ServerProcess, client: httpx.Client) -> None:
    children = psutil.Process(server.process.pid).children()
    [scheduler] = [child for child in children if any("managers.scheduler" in part for part in child.cmdline())]
    scheduler.suspend()
    try:
        found = scrape(client)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it was replaced
            scheduler.resume()
    assert found["scheduler_up()"] == 0
    assert "ready()" not in found
    assert found["http_requests_total(GET,/metrics,200)"] > 0
    deadline = time.monotonic() + 30
    while scrape(client).get("ready()") != 1:
        assert time.monotonic() < deadline, "nobody took its place"
        time.sleep(0.05)


def test_a_profile_over_http_is_a_file_name_and_the_file_is_on_the_server(client: httpx.Client, outputs: Path) -> None:
    assert post_image(client, "a", profile=True).json()["error"]["code"] == "admin_required"
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    reply = post_image(client, "a", headers=headers, profile=True, num_profiled_timesteps=1)
    assert reply.status_code == 200, reply.text
    name = reply.json()["data"][0]["profile"]
    with gzip.open(outputs / "profiles" / name, "rt", encoding="utf-8") as stream:
        names = [event["name"] for event in json.load(stream)["traceEvents"]]
    assert "denoise 1" in names and "denoise 2" not in names


def test_every_line_is_json_also_those_about_options_and_those_of_libraries(server: ServerProcess) -> None:
    """After all that the tests above made the server say, the profiler's library included."""
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries(server))
    [warning] = [entry for entry in entries(server) if "SGLANG_DIFFUSION_PROT" in entry["message"]]
    assert warning["level"] == "warning"
