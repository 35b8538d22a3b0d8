"""`bench startup`: from the start of a process to a model that is ready, and to its first result."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sglang.multimodal_gen.configs.declare import parameters
from sglang.multimodal_gen.configs.model_info import ComponentRead
from sglang.multimodal_gen.errors import BenchmarkFailed, StorageError
from sglang.multimodal_gen.runtime.bench.child import BenchChild, tell
from sglang.multimodal_gen.runtime.bench.messages import StartupTask, StartupTimes
from sglang.multimodal_gen.runtime.bench.page_cache import PageCacheRate, page_cache_rate, weight_files
from sglang.multimodal_gen.runtime.bench.startup_timeline import Timeline
from sglang.multimodal_gen.runtime.bench.statistics import Summary, summarise
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.server_args import ServerArgs, option_groups

READY, FIRST_RESULT = "ready", "first result"
_PROCESS = "sglang.multimodal_gen.runtime.bench.startup_process"
_ANSWERS_TO_WORKER = "the engine's processes"
_POLL_S = 0.01
_STOP_GRACE_S = 20.0

Moments = tuple[tuple[str, float], ...]
"""What happened, and when: seconds since the process's start."""
_LOADING = "loading "


class ReadResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reading the weights of one component to the device. `rest_seconds` is the median of what loading it takes
    besides: building the module, joining products, settling.

    `page_cache_ratio` is its part of the rate at which several threads read the same files from the page cache; None of
    weights that are mapped, and of files that are not on this machine.
    """

    num_bytes: int
    seconds: Summary
    bytes_per_second: float
    rest_seconds: float | None
    page_cache_ratio: float | None


class Started(NamedTuple):
    """One start."""

    moments: Moments
    reads: tuple[ComponentRead, ...] = ()


class StartupResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="startup"):
    """`ready_seconds` counts from the process's start; `intervals` are what it is made of, and what follows it.

    `dominant` is the longest interval before `ready`, `dominant_share` its part of the median. `reads` are by
    component, where weights were read to a GPU.
    """

    entry_point: str
    ready_seconds: Summary
    first_result_seconds: Summary | None
    intervals: dict[str, Summary]
    dominant: str
    dominant_share: float
    reads: dict[str, ReadResult] = {}
    page_cache: PageCacheRate | None = None


def measure_startup(options: Mapping[str, Any], args: ServerArgs) -> StartupResult:
    """The result of several starts. Raises ServingError when the model cannot be loaded."""
    start = _start_server if options["entry_point"] == "serve" else _start_generator
    runs: list[Started] = []
    number = itertools.count(1)
    begin = time.monotonic()
    while len(runs) < options["warmup_runs"] + options["repeats"] or time.monotonic() - begin < options["min_seconds"]:
        tell(f"start {next(number)}")
        runs.append(start(args, options["num_inference_steps"]))
    counted, files = runs[options["warmup_runs"] :], _files_of(args)
    tell("reading the checkpoint from the page cache" if files else "no files of weights to compare with")
    try:
        rate = page_cache_rate(files) if files else None
    except OSError as error:
        raise StorageError(f"model_path: cannot read {error.filename}: {error.strerror}", param="model_path") from error
    return with_reads(summarise_runs(options["entry_point"], [run.moments for run in counted]), counted, rate)


def with_reads(result: StartupResult, runs: list[Started], rate: PageCacheRate | None) -> StartupResult:
    """The same with what the workers said of reading weights."""
    seconds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for read in (read for run in runs for read in run.reads):
        seconds.setdefault(read.component, []).append(read.seconds)
        sizes[read.component] = read.num_bytes
    reads = {}
    for component, samples in seconds.items():
        summary, loading = summarise(samples), result.intervals.get(f"{_LOADING}{component}")
        achieved = sizes[component] / summary.median
        reads[component] = ReadResult(
            num_bytes=sizes[component],
            seconds=summary,
            bytes_per_second=achieved,
            rest_seconds=None if loading is None else max(0.0, loading.median - summary.median),
            page_cache_ratio=None if rate is None else achieved / rate.bytes_per_second,
        )
    return msgspec.structs.replace(result, reads=reads, page_cache=rate)


def _files_of(args: ServerArgs) -> list[Path]:
    """Of the model's weights, where it is a directory of this machine and its weights are read."""
    model = args.model
    return [] if model.random_weights else weight_files(Path(model.model_path))


def summarise_runs(entry_point: str, runs: list[Moments]) -> StartupResult:
    """Medians over several starts. What one of them did not tell took it no time."""
    lengths = [_lengths(run) for run in runs]
    names = list(dict.fromkeys(name for run in lengths for name in run))
    intervals = {name: summarise([run.get(name, 0.0) for run in lengths]) for name in names}
    ready = summarise([dict(run)[READY] for run in runs])
    dominant = max(names[: names.index(READY) + 1], key=lambda name: intervals[name].median)
    first_results = [dict(run)[FIRST_RESULT] for run in runs if FIRST_RESULT in dict(run)]
    return StartupResult(
        entry_point=entry_point,
        ready_seconds=ready,
        first_result_seconds=summarise(first_results) if first_results else None,
        intervals=intervals,
        dominant=dominant,
        dominant_share=intervals[dominant].median / ready.median,
    )


def _lengths(run: Moments) -> dict[str, float]:
    """Seconds of each interval by what it was spent on."""
    begins = (0.0, *(moment for _, moment in run))
    return {name: moment - begin for (name, moment), begin in zip(run, begins, strict=False)}


def _start_generator(args: ServerArgs, num_inference_steps: int) -> Started:
    """A fresh interpreter that makes a DiffGenerator."""
    task = StartupTask(engine=EngineConfig.of_this_process(args, run_dir=""), num_inference_steps=num_inference_steps)
    begin = time.monotonic()
    with BenchChild(_PROCESS, task) as child:
        times = child.receive(StartupTimes)
    return Started(tuple((name, moment - begin) for name, moment in times.moments), times.reads)


def _start_server(args: ServerArgs, num_inference_steps: int) -> Started:
    """`sglang serve`, until /health says that it is ready; it is asked for no result."""
    args = dataclasses.replace(args, http=dataclasses.replace(args.http, port=_free_port(args.http.host)))
    with tempfile.TemporaryDirectory(prefix="sglang-bench-") as directory:
        config = Path(directory) / "serve.yaml"
        config.write_text(json.dumps(_plain_options(args)), encoding="utf-8")  # JSON is YAML
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sglang.cli.main", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            answers = _wait(process, lambda: _status(args, "/liveness") == http.client.OK)
            timeline = Timeline(doing=_ANSWERS_TO_WORKER)
            ready = _wait(process, lambda: _is_ready(args, timeline))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    told = [(name, moment) for name, moment in timeline.moments if moment < ready]
    moments = (("the server answers", answers), *told, (timeline.doing, ready), (READY, ready))
    return Started(tuple((name, moment - begin) for name, moment in moments))


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> float:
    """The moment at which the condition holds. Raises BenchmarkFailed when the server ends before."""
    while not condition():
        if process.poll() is not None:
            raise BenchmarkFailed(f"the server ended with status {process.returncode} before it was ready")
        time.sleep(_POLL_S)
    return time.monotonic()


def _is_ready(args: ServerArgs, timeline: Timeline) -> bool:
    connection = http.client.HTTPConnection(args.http.host, args.http.port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        response = connection.getresponse()
        body = json.loads(response.read())
    if body.get("state") == "failed":
        raise BenchmarkFailed(f"the server cannot load the model: {body['error']['message']}")
    reason = str(body.get("reason", ""))
    if reason.endswith(")"):  # what the worker does comes behind the reason
        timeline.begins(reason[reason.rindex("(") + 1 : -1])
    return response.status == http.client.OK


def _status(args: ServerArgs, path: str) -> int | None:
    connection = http.client.HTTPConnection(args.http.host, args.http.port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return None


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _plain_options(args: ServerArgs) -> dict[str, Any]:
    """Every option that is set, as a configuration file says it."""
    values = {
        name: getattr(getattr(args, group), name)
        for group, owner in option_groups().items()
        for name in parameters(owner)
    }
    return {name: value for name, value in values.items() if value is not None}
