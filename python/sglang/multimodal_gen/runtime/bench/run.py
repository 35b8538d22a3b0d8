"""Runs a benchmark by name and reports: a table for people, JSON for everything else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.bench.component import measure_component
from sglang.multimodal_gen.runtime.bench.engine import EngineResult, measure_engine
from sglang.multimodal_gen.runtime.bench.machine import Machine, describe_machine
from sglang.multimodal_gen.runtime.bench.messages import ComponentResult
from sglang.multimodal_gen.runtime.bench.pipeline import measure_pipeline
from sglang.multimodal_gen.runtime.bench.pipeline_result import PipelineResult
from sglang.multimodal_gen.runtime.bench.report import show
from sglang.multimodal_gen.runtime.bench.startup import StartupResult, measure_startup
from sglang.multimodal_gen.runtime.server_args import ServerArgs

SCHEMA_VERSION = 1
_TO_STDOUT = "-"

Result = ComponentResult | PipelineResult | EngineResult | StartupResult


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json writes. `options` are all of them with their values, the engine's by group."""

    schema_version: int
    benchmark: str
    started_at: str
    machine: Machine
    options: dict[str, Any]
    result: Result


def run_benchmark(name: str, options: Mapping[str, Any], args: ServerArgs) -> int:
    """Measure and report; the exit status. Raises ServingError."""
    target = options["json"]
    if target not in (None, _TO_STDOUT):
        _write(target, "")  # a file that cannot be written should not wait for the end
    started_at, machine = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), describe_machine()
    report = Report(
        schema_version=SCHEMA_VERSION,
        benchmark=name,
        started_at=started_at,
        machine=machine,
        options={**options, "engine": msgspec.to_builtins(args)},
        result=_measure(name, options, args),
    )
    text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
    if target == _TO_STDOUT:
        sys.stdout.write(text)
        return 0
    if target is not None:
        _write(target, text)
    show(name, machine, report.result)
    return 0


def _measure(name: str, options: Mapping[str, Any], args: ServerArgs) -> Result:
    if name == "pipeline":
        return measure_pipeline(options, args)
    if name == "engine":
        return measure_engine(options, args)
    if name == "startup":
        return measure_startup(options, args)
    return measure_component(name, options, args)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"json: cannot write {path}: {error.strerror}", param="json") from None
