"""Runs a benchmark by name and reports: a table for people, JSON for everything else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang.multimodal_gen.configs.declare import HIDDEN, parameters
from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.bench.attention import measure_attention
from sglang.multimodal_gen.runtime.bench.component import measure_component
from sglang.multimodal_gen.runtime.bench.engine import measure_engine
from sglang.multimodal_gen.runtime.bench.load.plot import draw
from sglang.multimodal_gen.runtime.bench.load.result import LoadResult
from sglang.multimodal_gen.runtime.bench.machine import Machine, describe_machine
from sglang.multimodal_gen.runtime.bench.options import BENCHMARKS
from sglang.multimodal_gen.runtime.bench.parallel import measure_parallel
from sglang.multimodal_gen.runtime.bench.pipeline import measure_pipeline
from sglang.multimodal_gen.runtime.bench.report import Result, show
from sglang.multimodal_gen.runtime.bench.serve import measure_serve
from sglang.multimodal_gen.runtime.bench.startup import measure_startup
from sglang.multimodal_gen.runtime.server_args import ServerArgs, option_groups

SCHEMA_VERSION = 1
_TO_STDOUT = "-"

_INTERRUPTED = 130


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json writes. `options` are all of them with their values, the engine's by group; secrets are not."""

    schema_version: int
    benchmark: str
    started_at: str
    machine: Machine
    options: dict[str, Any]
    result: Result


def run_benchmark(name: str, options: Mapping[str, Any], args: ServerArgs) -> int:
    """Measure and report; the exit status. Raises ServingError."""
    target, picture = options["json"], options.get("plot")
    for param, path in (("json", target), ("plot", picture)):
        if path not in (None, _TO_STDOUT):
            _write(param, path, b"")  # a file that cannot be written should not wait for the end
    started_at, machine = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), describe_machine()
    report = Report(
        schema_version=SCHEMA_VERSION,
        benchmark=name,
        started_at=started_at,
        machine=machine,
        options=_shown_options(name, options, args),
        result=_measure(name, options, args),
    )
    text = msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
    if picture is not None:
        assert isinstance(report.result, LoadResult), "no other benchmark draws"
        _write("plot", picture, draw(report.result))
    if target == _TO_STDOUT:
        sys.stdout.write(text.decode())
    else:
        if target is not None:
            _write("json", target, text)
        show(name, machine, report.result)
    return _exit_status(report.result)


def _exit_status(result: Result) -> int:
    """A load test may report and still not be what was asked for."""
    if not isinstance(result, LoadResult):
        return 0
    return _INTERRUPTED if result.was_interrupted else int(result.num_ok == 0)


def _shown_options(name: str, options: Mapping[str, Any], args: ServerArgs) -> dict[str, Any]:
    """All options but the values of secrets; the engine's only where there is one."""
    shown = _without_secrets(BENCHMARKS[name].own, options)
    if not BENCHMARKS[name].engine_options():
        return shown
    values: dict[str, dict[str, Any]] = msgspec.to_builtins(args)
    groups = option_groups()
    return shown | {"engine": {group: _without_secrets(groups[group], value) for group, value in values.items()}}


def _without_secrets(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    secret = [name for name, option in parameters(owner).items() if option.declaration.secret]
    return {name: HIDDEN if name in secret and value is not None else value for name, value in values.items()}


def _measure(name: str, options: Mapping[str, Any], args: ServerArgs) -> Result:
    if name == "pipeline":
        return measure_pipeline(options, args)
    if name == "engine":
        return measure_engine(options, args)
    if name == "startup":
        return measure_startup(options, args)
    if name == "attention":
        return measure_attention(options, args)
    if name == "parallel":
        return measure_parallel(options, args)
    if name == "serve":
        return measure_serve(options)
    return measure_component(name, options, args)


def _write(param: str, path: str, data: bytes) -> None:
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise StorageError(f"{param}: cannot write {path}: {error.strerror}", param=param) from None
