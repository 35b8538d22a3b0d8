"""`bench dit`, `vae` and `encoder`: one module in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.multimodal_gen.runtime.bench.child import BenchChild
from sglang.multimodal_gen.runtime.bench.messages import ComponentResult, ComponentTask
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.server_args import ServerArgs

_WORKER = "sglang.multimodal_gen.runtime.bench.worker.component"


def measure_component(name: str, options: Mapping[str, Any], args: ServerArgs) -> ComponentResult:
    """The result of one benchmark of a module.

    Raises: ServingError saying what in the options, the model or the machine does not fit.
    """
    task = ComponentTask(
        engine=EngineConfig.of_this_process(args, run_dir=""),
        workload=f"{name}_{options['direction']}" if "direction" in options else name,
        width=options.get("width"),
        height=options.get("height"),
        num_frames=options.get("num_frames"),
        max_sequence_length=options.get("max_sequence_length"),
        chunk_frames=options.get("chunk_frames"),
        batch_size=options["batch_size"],
        warmup_runs=options["warmup_runs"],
        repeats=options["repeats"],
        min_seconds=options["min_seconds"],
        compare=options["compare"],
        pause_seconds=options["pause_seconds"],
        profile=options["profile"],
    )
    with BenchChild(_WORKER, task) as child:
        return child.receive(ComponentResult)
