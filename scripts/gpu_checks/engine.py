"""The engine on the device: memory comes back, cancelling stops, a killed worker is replaced, warm-up runs first."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpu_checks.report import Report, Result
from sglang import DiffGenerator
from sglang.multimodal_gen.errors import RequestCancelled
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import Preview, Progress

_WISH = {"prompt": "a red circle moving right", "seed": 1, "num_inference_steps": 12, "return_frames": True}
# What one request may leave behind on the device: nothing. On the CPU the process's memory is noisier.
_LEFT_BEHIND_BYTES = {"cuda": 0, "cpu": 64 * 2**20}
_BEAT_S = 2.5
_CHECKPOINT_EVERY = 4
_KILL_AT = 7
# A resumed request may have shared its forwards with others before, or not: sums in another order.
_LEVELS = 2
_PREVIEW_DISTANCE = 40.0
# Texts, steps and frames of several requests at a time.
_BESIDE = [
    {"prompt": prompt, "seed": seed, "num_inference_steps": 3 + seed % 4, "return_frames": True}
    for seed, prompt in enumerate(("a red circle", "a blue star", "a green square moving up", "a white ring") * 3)
]


def check_engine(report: Report, device: torch.device) -> None:
    """All checks on one engine that serves the embedded model in fp32."""
    options = {"device": device.type, "precision": "fp32", "checkpoint_every": _CHECKPOINT_EVERY}
    with DiffGenerator.from_pretrained("demo", warmup_mode="server", **options) as generator:
        with report.check("engine warm-up") as result:
            first = _only(generator.generate(_WISH))
            figures = {"seconds": first.generation_time, "step_ms": float(np.median(first.metrics["step_ms"]))}
            detail = f"{first.generation_time:.2f} s, {figures['step_ms']:.1f} ms a step"
            result.expect(first.metrics["warmup_excluded"] is True, detail, **figures)
        with report.check("engine memory") as result:
            _check_memory(result, generator, _LEFT_BEHIND_BYTES[device.type])
        with report.check("engine previews") as result:
            _check_previews(result, generator)
        with report.check("engine cancel") as result:
            _check_cancel(result, generator)
        with report.check("engine profile") as result:
            _check_profile(result, generator, device)
        with report.check("engine worker kill") as result:
            _check_kill(result, generator, first)
    options |= {"enable_lane_overlap": True, "batching_max_size": 1, "warmup_mode": "server"}
    with report.check("engine lanes") as result, DiffGenerator.from_pretrained("demo", **options) as generator:
        _check_lanes(result, generator)


def _only(result: GenerationResult | list[GenerationResult]) -> GenerationResult:
    assert isinstance(result, GenerationResult)
    return result


def _allocated(generator: DiffGenerator) -> int:
    """What the worker says it holds, by a heartbeat that is younger than this call."""
    time.sleep(_BEAT_S)
    allocated = generator.status().allocated_bytes
    assert allocated is not None, "the worker measures its memory"
    return allocated


def _check_memory(result: Result, generator: DiffGenerator, allowed: int) -> None:
    prompts = ["a red circle", "a blue star moving up", "a green square"]
    wish = {"prompt": prompts, "num_outputs_per_prompt": 2, "num_inference_steps": 4, "seed": 3}
    generator.generate(wish)  # the embeddings of prompts stay, for the next request with one of them
    before = _allocated(generator)
    generator.generate(wish)
    left = _allocated(generator) - before
    result.expect(left <= allowed, f"{left} bytes more after 6 requests, {before / 2**20:.0f} MiB before", left=left)


def _check_previews(result: Result, generator: DiffGenerator) -> None:
    """The last picture on the way shows about what the result does, and looking changes nothing."""
    wish = _WISH | {"num_inference_steps": 200}  # of 2 ms: what is shown takes longer than a dozen of them
    unseen, shown, seen = _only(generator.generate(wish)), list[Preview](), None
    for item in generator.stream(wish | {"num_previews": 3}):
        if isinstance(item.event, Preview):
            shown.append(item.event)
        if isinstance(item.event, GenerationResult):
            seen = item.event
    assert seen is not None and seen.frames is not None and unseen.frames is not None
    level = int(np.abs(seen.frames.astype(int) - unseen.frames.astype(int)).max())
    distance = 255.0
    if shown:
        with Image.open(io.BytesIO(shown[-1].image)) as image:
            picture = np.asarray(image.convert("RGB")).astype(int)
        distance = float(np.abs(picture - seen.frames[0].astype(int)).mean())
    good = 0 < len(shown) <= 3 and level == 0 and distance < _PREVIEW_DISTANCE
    detail = f"{len(shown)} pictures, the last {distance:.1f}/255 from the result, whose frames are {level}/255 apart"
    result.expect(good, detail, level=level, distance=distance)


def _check_cancel(result: Result, generator: DiffGenerator) -> None:
    before = _allocated(generator)
    last_step, cancelled = 0, False
    for item in generator.stream(_WISH | {"num_inference_steps": 400}):
        if isinstance(item.event, Progress):
            last_step = item.event.step
            if last_step == 3:
                generator.cancel(item.request_id)
        cancelled |= isinstance(item.event, RequestCancelled)
    ticks = generator.status().ticks
    left = _allocated(generator) - before
    still = generator.status().ticks - ticks
    good = cancelled and last_step < 40 and still == 0 and left <= 64 * 2**20
    result.expect(good, f"ended at step {last_step} of 400, {still} ticks after it, {left} bytes left", left=left)


def _check_profile(result: Result, generator: DiffGenerator, device: torch.device) -> None:
    """On a GPU its kernels are in the trace, not only what the CPU launched."""
    with tempfile.TemporaryDirectory() as directory:
        wish = _WISH | {"profile": True, "num_profiled_timesteps": 2, "perf_dump_path": f"{directory}/perf.json"}
        path = Path(_only(generator.generate(wish)).metrics["profile_path"])
        peaks = json.loads(Path(directory, "perf.json").read_text())["memory_checkpoints"]["peak"]
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    path.unlink()
    steps = sorted({event["name"] for event in events if event["name"].startswith("denoise ")})
    kernels = sum(event.get("cat") == "kernel" for event in events)
    good = steps == ["denoise 1", "denoise 2"] and (kernels > 0) == (device.type == "cuda")
    result.expect(good, f"{len(events)} events of {steps}, {kernels} kernels, {peaks}", kernels=kernels)


def _check_lanes(result: Result, generator: DiffGenerator) -> None:
    """Texts and frames that are computed beside the steps of others are those of requests alone, every time."""
    alone = [_frames_of(generator, wish) for wish in _BESIDE]
    again = [_frames_of(generator, wish) for wish in _BESIDE]
    together: list[np.ndarray] = []
    for _ in range(3):
        with ThreadPoolExecutor(len(_BESIDE)) as pool:
            together += pool.map(lambda wish: _frames_of(generator, wish), _BESIDE)
    level, values = _apart(together, alone * 3)
    usual, usual_values = _apart(again, alone)
    detail = (
        f"frames {level}/255 apart in {len(together)} requests, {values} values; alone twice {usual}, {usual_values}"
    )
    result.expect(level == 0, detail, level=level, values=values)


def _frames_of(generator: DiffGenerator, wish: dict[str, Any]) -> np.ndarray:
    frames = _only(generator.generate(wish)).frames
    assert frames is not None, "they were asked for"
    return frames.astype(int)


def _apart(found: list[np.ndarray], expected: list[np.ndarray]) -> tuple[int, int]:
    """The largest difference, and how many values differ."""
    apart = [np.abs(one - other) for one, other in zip(found, expected, strict=True)]
    return max(int(each.max()) for each in apart), sum(int((each > 0).sum()) for each in apart)


def _check_kill(result: Result, generator: DiffGenerator, undisturbed: GenerationResult) -> None:
    steps: list[int] = []
    resumed = None
    for item in generator.stream(_WISH):
        if isinstance(item.event, Progress) and item.event.phase == "denoise":
            if item.event.step == _KILL_AT and _KILL_AT not in steps:
                os.kill(generator.status().worker_pids[0], signal.SIGKILL)
            steps.append(item.event.step)
        if isinstance(item.event, GenerationResult):
            resumed = item.event
    assert resumed is not None and resumed.frames is not None and undisturbed.frames is not None
    repeated = len(steps) - len(set(steps))
    level = int(np.abs(resumed.frames.astype(int) - undisturbed.frames.astype(int)).max())
    good = resumed.metrics["attempts"] == 2 and repeated <= _CHECKPOINT_EVERY and level <= _LEVELS
    detail = f"attempt {resumed.metrics['attempts']}, {repeated} steps done twice, frames {level}/255 apart"
    result.expect(good, detail, repeated=repeated, level=level)
