"""What the engine tells of itself: log lines, metrics, times, performance dumps, profiles. Real processes."""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    IncompatibleParameters,
    InvalidValue,
    RemoteError,
    RequestCancelled,
    ServingError,
    StorageError,
)
from sglang.multimodal_gen.runtime.entrypoints import perf_dump
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.entrypoints.request_builder import expand
from sglang.multimodal_gen.runtime.managers.dispatcher import Dispatcher
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.fair_share import Account
from sglang.multimodal_gen.runtime.managers.messages import Progress, Started
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.timing import UNLEARNED_DEADLINE_S
from sglang.multimodal_gen.runtime.managers.worker_group import WorkerGroup
from sglang.multimodal_gen.runtime.managers.worker_messages import Admitted
from sglang.multimodal_gen.runtime.managers.worker_profiling import WorkerProfiler
from sglang.multimodal_gen.runtime.observability.logging_setup import JsonFormatter, TextFormatter, fields, log_refusal
from sglang.multimodal_gen.runtime.observability.metrics import (
    EngineMetrics,
    EngineSnapshot,
    HttpMetrics,
    wants_open_metrics,
)
from sglang.multimodal_gen.runtime.observability.private_texts import MARK, PRIVATE_TEXTS, PrivateTexts
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.test import null_family

null_family.register()
PREFIX = "sglang_diffusion_"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def engine(outputs: Path) -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("null-model", batching_max_size=4, output_path=str(outputs)) as generator:
        yield generator


def one(result: GenerationResult | list[GenerationResult]) -> GenerationResult:
    assert isinstance(result, GenerationResult)
    return result


# --- log lines ---


def record(text: str, *args: object, level: int = logging.INFO, **facts: Any) -> logging.LogRecord:
    made = logging.LogRecord("sglang.multimodal_gen.runtime.managers.scheduler", level, "f.py", 1, text, args, None)
    made.__dict__.update(fields(**facts))
    return made


def test_a_json_line_has_the_fields_beside_the_message() -> None:
    line = JsonFormatter(blot=True).format(record("done in %d", 3, request_id="req_1", message="no", pages=[1]))
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z")
    logger = "sglang.multimodal_gen.runtime.managers.scheduler"
    assert entry == {"level": "info", "logger": logger, "message": "done in 3", "request_id": "req_1", "pages": [1]}


def test_a_text_line_has_the_ids_in_brackets() -> None:
    line = TextFormatter(blot=True).format(record("lost", level=logging.ERROR, request_ids=["a", "b"], other=1))
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] ERROR scheduler: \[a b\] lost", line)
    assert TextFormatter(blot=True).format(record("idle")).endswith("INFO scheduler: idle")


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("a fox", "cannot draw 'a fox' here", f"cannot draw '{MARK}' here"),
        ("fox", "foxtrot, fox.", f"foxtrot, {MARK}."),
        ("a red fox in the snow", "got a red fox in th…, wanted", f"got {MARK}…, wanted"),
        ("a red fox in the snow", "KeyError: ' fox in the snow and more'", f"KeyError: '{MARK} and more'"),
        ("a red fox in the snow", "a red herring", "a red herring"),
        ("  ", "two  spaces", "two  spaces"),
    ],
)
def test_private_texts_and_long_parts_of_them_are_blotted_out(text: str, line: str, expected: str) -> None:
    texts = PrivateTexts()
    texts.keep("req_1", [text, None])
    assert texts.blot(line) == expected
    texts.forget("req_1")
    assert texts.blot(line) == line


@pytest.mark.parametrize("formatter", [JsonFormatter, TextFormatter])
def test_a_traceback_loses_the_prompt_unless_prompts_are_asked_for(formatter: Any) -> None:
    secret = "ünbelievable purple elephants"
    failed = record("cannot show %r", secret, level=logging.ERROR)
    try:
        raise RuntimeError(f"bad token in {secret!r}")
    except RuntimeError:
        failed.exc_info = sys.exc_info()
    PRIVATE_TEXTS.keep("test", [secret])
    try:
        public, frank = formatter(blot=True).format(failed), formatter(blot=False).format(failed)
    finally:
        PRIVATE_TEXTS.forget("test")
    assert secret not in public and public.count(MARK) == 2 and "RuntimeError: bad token in" in public
    assert frank.count(secret) >= 2


@pytest.mark.parametrize(
    ("error", "level", "message"),
    [
        (InvalidValue("prompt", "a secret", "another"), "info", "invalid_value"),
        (StorageError("no space"), "warning", "storage_error: no space"),
    ],
)
def test_a_clients_mistake_is_logged_by_its_code_alone(
    error: ServingError, level: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log_refusal(logging.getLogger("test"), error, fields(request_id="req_1"))
    [line] = [json.loads(JsonFormatter(blot=True).format(made)) for made in caplog.records]
    assert (line["level"], line["message"], line["request_id"]) == (level, message, "req_1")


def test_an_engine_that_may_log_prompts_tells_them(capfd: pytest.CaptureFixture[str]) -> None:
    prompt = "a lighthouse at dusk"
    with DiffGenerator.from_pretrained(
        "null-model", log_prompts=True, log_level="info", log_format="json"
    ) as generator:
        generator.generate({"prompt": prompt})
        with pytest.raises(RemoteError, match="an internal error"):
            generator.generate({"prompt": f"crash {prompt}"})
    entries = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [e["prompt"] for e in entries if "prompt" in e] == [prompt, f"crash {prompt}"]
    [crash] = [e for e in entries if "exception" in e]
    assert f"cannot tokenise 'crash {prompt}'" in crash["exception"]


# --- metrics ---


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name without the prefix, and label values in order of the labels' names."""
    found = {}
    for family in parse_text(text):
        for sample in family.samples:
            values = tuple(value for _, value in sorted(sample.labels.items()))
            assert sample.name.startswith(PREFIX)
            found[sample.name.removeprefix(PREFIX), values] = sample.value
    return found


def test_the_metrics_agree_with_what_was_asked_of_the_engine(engine: DiffGenerator) -> None:
    before = samples(engine.metrics())
    results = engine.generate({"prompt": ["sleep-5 a", "sleep-5 b"], "num_inference_steps": 6})
    assert isinstance(results, list)
    with pytest.raises(RemoteError):
        engine.generate({"prompt": "fail"})
    for item in engine.stream({"prompt": "sleep-20", "num_inference_steps": 500}):
        if isinstance(item.event, Progress) and item.event.step == 2:
            engine.cancel(item.request_id)
    after = samples(engine.metrics())

    def rise(name: str, *labels: str) -> float:
        return after.get((name, labels), 0.0) - before.get((name, labels), 0.0)

    assert rise("requests_received_total") == 4
    outcomes = ("finished", "failed", "cancelled", "refused")
    assert [rise("requests_total", outcome) for outcome in outcomes] == [2, 1, 1, 0]
    assert rise("request_errors_total", "invalid_value") == 1
    assert [rise("request_latency_seconds_count", outcome) for outcome in outcomes[:3]] == [2, 1, 1]
    assert rise("queue_time_seconds_count", "0") == 4
    assert (rise("frames_total"), rise("pixels_total")) == (2 * 5, 2 * 5 * 16 * 16)
    assert rise("stage_seconds_count", "denoise") == 2
    in_results = sum(result.metrics["stage_seconds"]["denoise"] for result in results)
    assert rise("stage_seconds_sum", "denoise") == pytest.approx(in_results)
    # Six of each of the two, one of the one that fails in its second, two of the cancelled one.
    assert rise("steps_total", "denoise") >= 2 * 6 + 1 + 2
    shared = rise("generation_batch_size_sum", "denoise") / rise("generation_batch_size_count", "denoise")
    assert 1 < shared <= 2
    assert rise("step_seconds_count", "denoise") == rise("generation_batch_size_count", "denoise")
    assert (after["ready", ()], after["num_queue_reqs", ()], after["num_running_reqs", ()]) == (1, 0, 0)
    assert (after["workers", ()], after["worker_restarts_total", ()]) == (1, 0)
    assert after["memory_peak_bytes", ()] >= results[-1].peak_memory_mb * 2**20 > 0
    assert (after["memory_budget_bytes", ()], after["memory_reserved_bytes", ()]) == (1000 * 2**30, 0)
    assert after["model_info", ("cpu", "null-model", "FaultyPipeline", "fp32")] == 1


def test_the_memory_that_the_worker_holds_is_told(engine: DiffGenerator) -> None:
    deadline = time.monotonic() + 5  # it comes with the worker's heartbeat, once a second
    while ("memory_allocated_bytes", ()) not in samples(engine.metrics()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert samples(engine.metrics())["memory_allocated_bytes", ()] > 0


def test_a_scrape_never_waits_for_a_generation(engine: DiffGenerator) -> None:
    running = engine.stream({"prompt": "sleep-300", "num_inference_steps": 20})
    for item in running:
        if isinstance(item.event, Progress) and item.event.step == 1:
            now = samples(engine.metrics())
            assert (now["num_running_reqs", ()], engine.status().num_running) == (1, 1)
            break
    running.close()


def test_a_refused_request_is_counted_with_its_reason(engine: DiffGenerator) -> None:
    async def twice() -> str:
        client = engine._engine.client
        params = SamplingParams(prompt="sleep-30", width=16, height=16, num_frames=5, fps=8, seed=1,
                                num_inference_steps=4, guidance_scale=1.0)  # fmt: skip
        await client.submit(params, request_id="same")
        second = await client.submit(params, request_id="same")  # hears the events of both
        events = [event async for event in second]
        return type(events[-1]).__name__

    before = samples(engine.metrics())
    assert engine._engine.call(twice()) == "Failed"
    after = samples(engine.metrics())
    key = ("requests_total", ("refused",))
    assert after[key] - before[key] == 1


def snapshot() -> EngineSnapshot:
    return EngineSnapshot(
        ready=True,
        num_queued=3,
        num_running=2,
        num_workers=1,
        num_worker_restarts=4,
        budget_bytes=7,
        reserved_bytes=5,
        allocated_bytes=None,
    )


def test_both_formats_are_valid_and_say_the_same() -> None:
    engine, http = EngineMetrics(snapshot), HttpMetrics()
    engine.request_stopped("failed", 0.5, code="out_of_memory")
    engine.lane_done("denoise", stage="denoise", batch_size=3, seconds=0.25)
    http.answered("GET", route="/v1/videos/{video_id}", status=200, seconds=0.1)
    plain = http.text(engine.text())
    opened = http.text(engine.text(open_metrics=True), open_metrics=True)
    assert opened.endswith("# EOF\n") and opened.count("# EOF") == 1
    as_open = {
        (s.name, tuple(sorted(s.labels.items()))): s.value for f in parse_open_metrics(opened) for s in f.samples
    }
    as_text = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in parse_text(plain) for s in f.samples}
    assert as_open == as_text
    assert as_text[PREFIX + "worker_restarts_total", ()] == 4
    assert as_text[PREFIX + "scheduler_up", ()] == 1
    assert samples(http.text(None))["scheduler_up", ()] == 0


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain; version=0.0.4", False),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3", True),
    ],
)
def test_the_accept_header_picks_the_format(accept: str, expected: bool) -> None:
    assert wants_open_metrics(accept) is expected


def test_no_label_can_take_any_value() -> None:
    http = HttpMetrics()
    for number in range(20):
        http.answered(f"BREW{number}", route=None, status=405, seconds=0.1)
    counted = [s for s in samples(http.text(None)) if s[0] == "http_requests_total"]
    assert counted == [("http_requests_total", ("other", "none", "405"))]


# --- times ---


def test_times_add_up(engine: DiffGenerator, outputs: Path) -> None:
    wish = {"prompt": "sleep-20", "num_inference_steps": 5, "save_output": True, "output_format": "gif"}
    result = one(engine.generate(wish))
    stages = result.metrics["stage_seconds"]
    assert list(stages) == ["admission", "encode", "denoise", "decode", "encode_file"]
    assert all(seconds > 0 for seconds in stages.values())
    in_worker = sum(seconds for stage, seconds in stages.items() if stage != "encode_file")
    assert in_worker + result.metrics["waiting_seconds"] == pytest.approx(result.generation_time)
    assert sum(result.metrics["step_ms"]) / 1000 == pytest.approx(stages["denoise"], abs=1e-4)
    assert len(result.metrics["step_ms"]) == 5
    assert 0 < result.metrics["queue_seconds"] < 5


# --- the performance dump ---


def test_a_performance_dump_has_the_peers_shape_and_the_results_numbers(engine: DiffGenerator, tmp_path: Path) -> None:
    file = tmp_path / "new" / "perf.json"
    result = one(engine.generate({"prompt": "sleep-2 ü", "perf_dump_path": str(file)}))
    dump = json.loads(file.read_text(encoding="utf-8"))
    assert set(dump) == {"timestamp", "request_id", "commit_hash", "tag", "total_duration_ms", "steps",
                         "denoise_steps_ms", "memory_checkpoints", "meta"}  # fmt: skip
    assert dump["request_id"].startswith("req_")
    assert dump["total_duration_ms"] == pytest.approx(result.generation_time * 1000, abs=0.001)
    assert [step["name"] for step in dump["steps"]] == ["admission", "encode", "denoise", "decode"]
    assert [step["duration_ms"] for step in dump["denoise_steps_ms"]] == result.metrics["step_ms"]
    assert [step["step"] for step in dump["denoise_steps_ms"]] == [0, 1, 2, 3]
    assert set(dump["memory_checkpoints"]) == {"encode", "denoise", "decode", "peak"}
    assert dump["memory_checkpoints"]["peak"]["peak_host_rss_mb"] == pytest.approx(result.peak_memory_mb, abs=0.001)
    assert (dump["meta"]["prompt"], dump["meta"]["model"]) == ("sleep-2 ü", "null-model")
    assert [path.name for path in file.parent.iterdir()] == ["perf.json"]


def test_several_outputs_number_their_dumps(engine: DiffGenerator, tmp_path: Path) -> None:
    wish = {"prompt": ["a", "b"], "num_outputs_per_prompt": 2, "perf_dump_path": str(tmp_path / "perf.json")}
    engine.generate(wish)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["perf_0.json", "perf_1.json", "perf_2.json", "perf_3.json"]
    prompts = [json.loads((tmp_path / name).read_text())["meta"]["prompt"] for name in names]
    assert prompts == ["a", "a", "b", "b"]


def test_a_dump_that_cannot_be_written_is_known_before_anything_runs(engine: DiffGenerator, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "perf.json"):
        with pytest.raises(InvalidValue, match="perf_dump_path"):
            engine.generate({"prompt": "a", "perf_dump_path": str(path)})


def test_a_dump_that_fails_to_be_written_costs_no_result(engine: DiffGenerator, tmp_path: Path) -> None:
    """The directory is fine when it is looked at, and gone when the result is there."""
    directory = tmp_path / "gone"
    wish = {"prompt": "sleep-20", "perf_dump_path": str(directory / "perf.json")}
    for item in engine.stream(wish):
        if isinstance(item.event, Started):
            directory.rmdir()
        if isinstance(item.event, GenerationResult):
            assert item.event.notes[-1].startswith("perf_dump_path: ") and "cannot be written" in item.event.notes[-1]
            break
    else:
        raise AssertionError("there was no result")


# --- profiles ---


def trace_names(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [event["name"] for event in json.load(stream)["traceEvents"]]


def test_a_profile_is_a_chrome_trace_of_the_wanted_steps(engine: DiffGenerator, outputs: Path) -> None:
    wish = {"prompt": "a", "profile": True, "num_profiled_timesteps": 2, "num_inference_steps": 6}
    path = Path(one(engine.generate(wish)).metrics["profile_path"])
    assert path.parent == outputs / "profiles" and path.name.endswith("-rank0.trace.json.gz")
    steps = sorted(name for name in trace_names(path) if name.startswith("denoise "))
    assert steps == ["denoise 1", "denoise 2"]  # step 0 warms up
    assert "aten::add" in trace_names(path)
    assert [p for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_all_stages_can_be_profiled_and_the_first_output_alone_is(engine: DiffGenerator) -> None:
    wish = {"prompt": ["a", "b"], "profile": True, "profile_all_stages": True, "num_inference_steps": 2}
    results = engine.generate(wish)
    assert isinstance(results, list)
    assert "profile_path" not in results[1].metrics
    names = trace_names(Path(results[0].metrics["profile_path"]))
    steps = [name for name in names if name.startswith(("encode 0", "denoise 1", "decode 1"))]
    assert {step.split()[0] for step in steps} == {"encode", "denoise", "decode"}


def test_a_second_profile_at_once_is_refused_and_results_are_not_disturbed(engine: DiffGenerator) -> None:
    frames = one(engine.generate({"prompt": "a", "return_frames": True, "seed": 1})).frames
    profiled = engine.stream({"prompt": "sleep-30", "profile": True, "num_inference_steps": 60})
    for item in profiled:
        if isinstance(item.event, Progress) and item.event.step == 2:
            break
    with pytest.raises(RemoteError) as caught:
        engine.generate({"prompt": "a", "profile": True})
    assert (caught.value.code, caught.value.retryable) == ("profiler_busy", True)
    beside = one(engine.generate({"prompt": "a", "return_frames": True, "seed": 1})).frames
    assert frames is not None and beside is not None and (frames == beside).all()
    profiled.close()  # cancelled in the middle of its profile: the next one finds the profiler free
    assert "profile_path" in one(engine.generate({"prompt": "a", "profile": True})).metrics


def test_a_cancelled_profile_leaves_no_file(engine: DiffGenerator, outputs: Path) -> None:
    before = set((outputs / "profiles").glob("*"))
    for item in engine.stream({"prompt": "sleep-20", "profile": True, "num_inference_steps": 100,
                               "num_profiled_timesteps": 90}):  # fmt: skip
        if isinstance(item.event, Progress) and item.event.step == 3:
            engine.cancel(item.request_id)
        if isinstance(item.event, RequestCancelled):
            break
    engine.generate({"prompt": "a"})
    assert set((outputs / "profiles").glob("*")) == before


@pytest.mark.parametrize(("profile", "expected_s"), [(False, 2 * 0.5 + 5.0), (True, UNLEARNED_DEADLINE_S)])
def test_a_profiled_tick_may_take_as_long_as_one_of_a_kind_never_seen(profile: bool, expected_s: float) -> None:
    """Beginning a profile imports for seconds, and writing a large one takes as long; the worker is not stuck."""
    params = SamplingParams(prompt="a", profile=profile)
    record = RequestRecord(request_id="req_1", client=b"c", params=params, order=1, max_attempts=1, reserved=True)
    phases = (Phase(name="denoise", lane="denoise", units=3, batch_key="k", cost=1.0, peak_bytes=1),)
    record.begin(Admitted(request_id="req_1", phases=phases), Account())
    workers = WorkerGroup(EngineConfig(args=ServerArgs(), run_dir=""), ready=True, budget_bytes=10)
    dispatcher = Dispatcher(ServerArgs().execution, workers)
    dispatcher.learned.record("k", 0.5, 1)
    dispatcher.issue({"req_1": record}, depth=1)
    assert [flight.deadline_s for flight in workers.in_flight.values()] == [expected_s]


def test_a_profile_directory_that_cannot_be_written_fails_the_request_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    profiler = WorkerProfiler(tmp_path / "file" / "profiles", cuda=False)
    phases = [Phase(name="denoise", lane="denoise", units=3, batch_key="k", cost=1.0, peak_bytes=1)]
    with pytest.raises(StorageError, match="profile_dir"):
        profiler.admit("req_1", SamplingParams(prompt="a", profile=True), phases)


def test_a_profile_that_cannot_be_written_becomes_a_note(engine: DiffGenerator, outputs: Path) -> None:
    """The directory is fine when the request is admitted, and gone when the profile is complete."""
    for item in engine.stream({"prompt": "sleep-30", "profile": True}):
        if isinstance(item.event, Started):
            shutil.rmtree(outputs / "profiles")
        if isinstance(item.event, GenerationResult):
            assert item.event.notes == ("no profile was written: No such file or directory",)
            assert "profile_path" not in item.event.metrics
            break
    else:
        raise AssertionError("there was no result")


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"num_profiled_timesteps": 3}, "num_profiled_timesteps: says what to profile"),
        ({"profile_all_stages": True}, "profile_all_stages: says what to profile"),
        ({"profile": True, "profile_all_stages": True, "num_profiled_timesteps": 3}, "accepted is one of them"),
    ],
)
def test_what_to_profile_without_a_profile_is_refused(wish: dict[str, Any], says: str, engine: DiffGenerator) -> None:
    with pytest.raises(IncompatibleParameters, match=says):
        expand({"prompt": "a", **wish}, model=engine.wait_ready(), surface="admin")


def test_a_gpus_dump_names_the_allocators_peak() -> None:
    result = GenerationResult(
        prompt="a", prompt_index=0, output_index=0, seed=1, size=(16, 32, 5), output_file_path=None,
        generation_time=1.5, peak_memory_mb=12.5,
        metrics={"stage_seconds": {"denoise": 1.0}, "step_ms": [1000.0], "queue_seconds": 0.1, "waiting_seconds": 0.5,
                 "stage_peak_mb": {"denoise": 12.5}, "computed_steps": 1},
    )  # fmt: skip
    model = ModelInfo(
        name="m", pipeline_class="P", tasks=(), precision="bf16", device="cuda:0", num_parameters=1, weight_bytes=2,
        load_seconds=1.0, limits=null_family.NullPipeline.limits(None), defaults=SamplingParams(),  # type: ignore[arg-type]
    )  # fmt: skip
    dump = perf_dump.perf_record(result, request_id="req_1", model=model)
    peak = {"peak_allocated_mb": 12.5}
    assert dump["memory_checkpoints"] == {"denoise": peak, "peak": peak}
    assert (dump["meta"]["width"], dump["meta"]["height"], dump["total_duration_ms"]) == (32, 16, 1500.0)
