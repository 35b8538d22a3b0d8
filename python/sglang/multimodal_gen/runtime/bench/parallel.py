"""`bench parallel`: one denoising step of the transformer on one device and spread over several, layout by layout, and
decoding."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from sglang.multimodal_gen.configs.replica_shape import AXES, ReplicaShape
from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.runtime.bench.child import BenchChild, receive_all
from sglang.multimodal_gen.runtime.bench.messages import ComponentTask, ParallelResult, ParallelTask
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.server_args import ServerArgs

_WORKER = "sglang.multimodal_gen.runtime.bench.worker.parallel"
_PART = re.compile(rf"({'|'.join(AXES)})([1-9][0-9]*)")


def measure_parallel(options: Mapping[str, Any], args: ServerArgs) -> ParallelResult:
    """The result of all layouts, that of one rank first.

    Raises: ServingError saying what in the options, the model or the machine does not fit.
    """
    layouts = (ReplicaShape(), *(layout_of(text) for text in options["layouts"]))
    num_ranks = max(layout.num_ranks for layout in layouts)
    component = ComponentTask(
        engine=EngineConfig.of_this_process(args, run_dir=""),
        workload="dit",
        width=options.get("width"),
        height=options.get("height"),
        num_frames=options.get("num_frames"),
        max_sequence_length=options.get("max_sequence_length"),
        chunk_frames=options.get("chunk_frames"),
        batch_size=options["batch_size"],
        warmup_runs=options["warmup_runs"],
        repeats=options["repeats"],
        min_seconds=0.0,
        compare=None,
    )
    with tempfile.TemporaryDirectory() as meeting, contextlib.ExitStack() as stack:
        tasks = [
            ParallelTask(
                component=component,
                layouts=layouts,
                decode=options["decode"],
                rank=rank,
                num_ranks=num_ranks,
                meeting=meeting,
            )
            for rank in range(num_ranks)
        ]
        children = [stack.enter_context(BenchChild(_WORKER, task)) for task in tasks]
        results = receive_all(children, ParallelResult)
    return results[0]


def layout_of(text: str) -> ReplicaShape:
    """`cfg2-ulysses2` -> the shape. Raises InvalidValue."""
    parts = [_PART.fullmatch(part) for part in text.split("-")]
    sizes = {match[1]: int(match[2]) for match in parts if match is not None}
    if None in parts or len(sizes) != len(parts):
        raise InvalidValue("layouts", text, f"degrees such as ulysses2 or cfg2-ring2, of {', '.join(AXES)}, each once")
    return ReplicaShape(**sizes)
