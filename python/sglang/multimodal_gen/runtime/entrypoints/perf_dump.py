"""The performance dump: one JSON file with the times and the memory of one output.

Its shape is what comparison scripts for diffusion servers read: `steps` are the stages, `denoise_steps_ms` the steps of
denoising. It belongs to the user who asked for it, so the prompt is in it.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sglang
from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.errors import InvalidValue, StorageError
from sglang.multimodal_gen.runtime.entrypoints.generation_result import GenerationResult
from sglang.multimodal_gen.runtime.postprocess.pending_file import write_whole


def prepare_perf_dump(path: str) -> None:
    """Make the file's directory, so that a path that cannot be written is known before anything is generated.

    Raises:
        InvalidValue: the path is a directory, or its directory cannot be made or written.
    """
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue("perf_dump_path", path, f"a path that can be written ({error.strerror})") from None
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise InvalidValue("perf_dump_path", path, "a file in a directory that can be written")


def write_perf_dump(path: str, result: GenerationResult, *, request_id: str, model: ModelInfo) -> None:
    """Write the file, whole or not at all; one of the same name is replaced.

    Raises:
        StorageError: it cannot be written.
    """
    file = Path(path).expanduser().absolute()
    text = json.dumps(perf_record(result, request_id=request_id, model=model), indent=2, ensure_ascii=False)
    try:
        write_whole(file, f"{text}\n".encode())
    except OSError as error:
        raise StorageError(f"perf_dump_path: {path} cannot be written ({error.strerror})") from error


def perf_record(result: GenerationResult, *, request_id: str, model: ModelInfo) -> dict[str, Any]:
    """What the file holds. Durations are milliseconds, memory MiB."""
    metrics = result.metrics
    height, width, num_frames = result.size
    on_gpu = model.device.startswith("cuda")
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "commit_hash": sglang.__version__,
        "tag": "sglang-diffusion",
        "total_duration_ms": _milliseconds(result.generation_time),
        "steps": [
            {"name": stage, "duration_ms": _milliseconds(seconds)}
            for stage, seconds in metrics["stage_seconds"].items()
        ],
        "denoise_steps_ms": [
            {"step": step, "duration_ms": milliseconds} for step, milliseconds in enumerate(metrics["step_ms"])
        ],
        "memory_checkpoints": {
            name: {"peak_allocated_mb" if on_gpu else "peak_host_rss_mb": round(peak, 3)}
            for name, peak in {**metrics["stage_peak_mb"], "peak": result.peak_memory_mb}.items()
        },
        "meta": {
            "prompt": result.prompt,
            "model": model.name,
            "device": model.device,
            "precision": model.precision,
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "seed": result.seed,
            "queue_ms": _milliseconds(metrics["queue_seconds"]),
            "waiting_ms": _milliseconds(metrics["waiting_seconds"]),
            "computed_steps": metrics["computed_steps"],
        },
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
