"""A model's pipeline of diffusers, driven call by call, in a process of its own.

`python -m sglang.multimodal_gen.runtime.bench.worker.reference_pipeline FD`
"""

from __future__ import annotations

import dataclasses
import inspect
import queue
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sglang.multimodal_gen.registry import load_object, read_model_index
from sglang.multimodal_gen.runtime.bench.messages import ReferenceCall, ReferenceDone, ReferenceReady, ReferenceTask
from sglang.multimodal_gen.runtime.bench.worker.model import BenchModel, find_model
from sglang.multimodal_gen.runtime.bench.worker.reference_module import require_reference
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent, failures_told, take_task, watch_parent
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging

_DENOISING_WORKLOAD = "dit"
# SamplingParams that a call of diffusers' takes under the same name.
_ARGUMENTS = (
    "prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale",
    "true_cfg_scale", "guidance_scale_2", "cfg_normalization", "cfg_truncation", "max_sequence_length", "clip_skip",
    "mu", "skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop",
    "decode_timestep", "decode_noise_scale", "image_cond_noise_scale", "denoise_strength",
)  # fmt: skip
# Arguments of diffusers' with another name here.
_RENAMED = {"frame_rate": "fps"}
_SHIFTS = ("flow_shift", "shift")
# Of these a call takes one for each output.
_TEXTS = ("prompt", "negative_prompt")
# What a call raises that takes one prompt and not several, or whose batch does not fit into the memory.
_REFUSALS = (AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_MAX_REASON_CHARACTERS = 300


def load_pipeline(task: ReferenceTask, model: BenchModel, context: LoadContext) -> Any:
    """The pipeline that model_index.json names, with the checkpoint's weights or with our random ones."""
    for library in ("diffusers", "transformers"):
        load_object(f"{library}.utils.logging:disable_progress_bar")()
    if not model.pipeline_class.reference_fits_latents:
        # The autoencoder gets latents of the transformer's dtype, and has to be in that.
        context = dataclasses.replace(context, vae_dtype=None)
    pipeline_class = load_object(f"diffusers:{read_model_index(model.directory)['_class_name']}")
    if task.engine.args.model.random_weights:
        # It imports both libraries, of which a process that lacks one must be able to tell.
        from sglang.multimodal_gen.runtime.bench.worker.reference_components import random_components

        pipeline = pipeline_class(**random_components(pipeline_class, model, context))
    else:
        dtypes = {name: context.dtype_of(name) for name in model.configs}
        pipeline = pipeline_class.from_pretrained(
            model.directory, dtype={"default": context.dtype, **dtypes}, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(context.device)


class ReferenceRunner:
    """The pipeline, called with a request's parameters."""

    def __init__(self, pipeline: Any, device: torch.device, directory: str) -> None:
        self.pipeline = pipeline
        self.device = device
        self.directory = directory
        self.scheduler_config = dict(pipeline.scheduler.config)
        self._accepted = inspect.signature(pipeline.__call__).parameters

    def run(self, call: ReferenceCall) -> ReferenceDone:
        """Generate the outputs. What the pipeline makes one by one and not at once is told; all else is raised."""
        if len(call.seeds) == 1:
            return self._generate(call)
        try:
            return self._generate(call)
        except _REFUSALS as error:
            text = textwrap.shorten(str(error), _MAX_REASON_CHARACTERS, placeholder=" …")
            reason = f"{type(error).__name__}: {text}".removesuffix(": ")
        # What the call held is free only now; no later one needs as much, and the engine may be on the same device.
        torch.cuda.empty_cache()
        return ReferenceDone(
            refusal=f"diffusers' {type(self.pipeline).__name__} did not make {len(call.seeds)} outputs in one call "
            f"({reason})"
        )

    def _generate(self, call: ReferenceCall) -> ReferenceDone:
        self._set_shift(call.params.flow_shift)
        steps = StepClock(self.device)
        arguments = self._arguments(call)
        # Some decoders draw from torch's own generator, whatever generators a call is given.
        torch.manual_seed(call.seeds[0])
        begin = time.perf_counter()
        output = self.pipeline(**arguments, output_type="np", callback_on_step_end=steps.step_ended)
        frames = np.asarray(output.frames if hasattr(output, "frames") else output.images)
        pixels = np.rint(frames * 255).astype(np.uint8)
        seconds = time.perf_counter() - begin
        if len(pixels) != len(call.seeds):
            raise ValueError(f"it gave {len(pixels)}")
        with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".npy", delete=False) as file:
            np.save(file, pixels if pixels.ndim == 5 else pixels[:, None])
        return ReferenceDone(seconds=seconds, step_ms=steps.milliseconds(), frames_file=str(Path(file.name)))

    def _arguments(self, call: ReferenceCall) -> dict[str, Any]:
        """A generator for each output, so that each begins with the noise that it has alone."""
        named = {name: name for name in _ARGUMENTS} | _RENAMED
        values = {name: getattr(call.params, ours) for name, ours in named.items() if name in self._accepted}
        arguments = {name: value for name, value in values.items() if value is not None}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in call.seeds]
        if len(generators) == 1:
            return arguments | {"generator": generators[0]}
        # New lists for each call: some pipelines write into them.
        texts = {name: [arguments[name]] * len(generators) for name in _TEXTS if name in arguments}
        return arguments | texts | {"generator": generators}

    def _set_shift(self, shift: float | None) -> None:
        changes = {} if shift is None else {name: shift for name in _SHIFTS if name in self.scheduler_config}
        scheduler_class = type(self.pipeline.scheduler)
        self.pipeline.scheduler = scheduler_class.from_config(self.scheduler_config, **changes)


class StepClock:
    """When each step ended; the first one's begin is not told, so a call of n steps has n - 1 times."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: list[Any] = []

    def step_ended(self, pipeline: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline, which does not wait for the GPU then; an event does."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ends.append(event)
        else:
            self._ends.append(time.perf_counter())
        return {}

    def milliseconds(self) -> tuple[float, ...]:
        """Of every step but the first; the call is over."""
        pairs = zip(self._ends, self._ends[1:], strict=False)
        if self._on_gpu:
            return tuple(before.elapsed_time(after) for before, after in pairs)
        return tuple((after - before) * 1000 for before, after in pairs)


def _serve(task: ReferenceTask, parent: Parent, calls: queue.SimpleQueue[ReferenceCall]) -> None:
    parent.tell("importing diffusers")
    require_reference()
    model = find_model(task.engine.args.model, _DENOISING_WORKLOAD, parent)
    context = model.load_context(task.engine.args, lambda _: None)
    begin = time.perf_counter()
    pipeline = load_pipeline(task, model, context)
    parent.send(
        ReferenceReady(pipeline=f"diffusers.{type(pipeline).__name__}", load_seconds=time.perf_counter() - begin)
    )
    runner = ReferenceRunner(pipeline, context.device, task.directory)
    while True:
        parent.send(runner.run(calls.get()))


def main() -> None:
    """Entry point of the process; it ends when the benchmark closes the pipe."""
    connection, task = take_task(ReferenceTask)
    calls: queue.SimpleQueue[ReferenceCall] = queue.SimpleQueue()
    decoder = msgspec.msgpack.Decoder(ReferenceCall)
    parent = watch_parent(connection, lambda payload: calls.put(decoder.decode(payload)))
    configure_logging(task.engine.args.logging)
    task.engine.apply()
    with failures_told(parent), torch.inference_mode():
        _serve(task, parent, calls)


if __name__ == "__main__":
    main()
