"""`bench pipeline`: whole requests through an engine, one by one, together, and beside the reference's pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, SamplingParams
from sglang.multimodal_gen.errors import InvalidValue, RemoteError, ServingError, UnsupportedModel, UnsupportedParameter
from sglang.multimodal_gen.runtime.bench.child import BenchChild, all_of, tell
from sglang.multimodal_gen.runtime.bench.idle import IdleTime, idle_time
from sglang.multimodal_gen.runtime.bench.messages import (
    CostResult,
    CostTask,
    ReferenceCall,
    ReferenceDone,
    ReferenceReady,
    ReferenceTask,
)
from sglang.multimodal_gen.runtime.bench.pipeline_result import (
    Batch,
    Compared,
    PipelineResult,
    Turn,
    alone,
    beside_reference,
    frame_difference,
    largest_difference,
    phase_rates,
    together,
)
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import Started
from sglang.multimodal_gen.runtime.server_args import ServerArgs

_REFERENCE = "sglang.multimodal_gen.runtime.bench.worker.reference_pipeline"
_COST = "sglang.multimodal_gen.runtime.bench.worker.cost"
_PROFILED_STEPS = 8
_PROMPT = "a red circle moving to the right over a blue background"
_NOT_OF_REQUESTS = ("warmup_runs", "repeats", "min_seconds", "json", "compare", "concurrency", "seed", "profile")


def measure_pipeline(options: Mapping[str, Any], args: ServerArgs) -> PipelineResult:
    """The result of one engine of its own.

    Raises: ServingError saying what in the options, the model or the machine does not fit.
    """
    if options["compare"] is not None:
        # What the pipelines of diffusers have no argument for.
        ours_alone = {"guidance_rescale": options["guidance_rescale"], "scheduler": args.execution.scheduler}
        for name, value in ours_alone.items():
            if value is not None:
                raise UnsupportedParameter(name, "a pipeline of diffusers has no such argument to compare with")
    config = EngineConfig.of_this_process(args, run_dir="")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="sglang-bench-"))
        generator = stack.enter_context(DiffGenerator.from_server_args(args))
        reference, ready = None, None
        tell("starting the engine")
        if options["compare"] is None:
            model = generator.wait_ready()
        else:
            reference = stack.enter_context(BenchChild(_REFERENCE, ReferenceTask(engine=config, directory=directory)))
            model, ready = all_of(generator.wait_ready, partial(reference.receive, ReferenceReady))
        bench = PipelineBench(options, model, generator, reference, directory)
        turns = bench.turns()
        idle = bench.idle() if options["profile"] else None
    cost = _cost(config, bench)
    return bench.result(turns, ready, cost, idle)


def _cost(config: EngineConfig, bench: PipelineBench) -> CostResult | None:
    """Counted once the engine is gone, so that matrix products have the machine for themselves.

    None for a model without components to count.
    """
    params = bench.params
    task = CostTask(
        engine=config,
        width=params.width,
        height=params.height,
        num_frames=params.num_frames,
        max_sequence_length=params.max_sequence_length,
    )
    with BenchChild(_COST, task) as child:
        try:
            return child.receive(CostResult)
        except RemoteError as error:
            if error.code != UnsupportedModel.code:
                raise
            return None


class PipelineBench:
    """An engine that is ready, and what is asked of it."""

    def __init__(
        self,
        options: Mapping[str, Any],
        model: ModelInfo,
        generator: DiffGenerator,
        reference: BenchChild | None,
        directory: str,
    ) -> None:
        self.options = options
        self.model = model
        self.generator = generator
        self.reference = reference
        wish = {name: value for name, value in options.items() if name not in _NOT_OF_REQUESTS and value is not None}
        self.request = wish | {"prompt": wish.get("prompt") or _PROMPT}
        if reference is None:
            self.request |= {"save_output": True, "output_path": directory}
        else:
            self.request |= {"return_frames": True}
        self.params = SamplingParams.from_values(self.request).filled_from(model.defaults, GENERAL_DEFAULTS)
        if options["profile"] and self._num_steps() < 2:
            raise InvalidValue("num_inference_steps", 1, "2 and more with profile: the first one is not recorded")
        self.tokens: dict[str, float] = {}
        self.notes: tuple[str, ...] = ()
        self.refused_batch = False

    def turns(self) -> list[Turn]:
        """Every repeat after the warm-up."""
        for number in range(self.options["warmup_runs"]):
            tell(f"warm-up {number + 1} of {self.options['warmup_runs']}")
            self._turn()
        turns: list[Turn] = []
        begin = time.perf_counter()
        while len(turns) < self.options["repeats"] or time.perf_counter() - begin < self.options["min_seconds"]:
            tell(f"repeat {len(turns) + 1}")
            turns.append(self._turn())
        return turns

    def _turn(self) -> Turn:
        first, concurrency = self.options["seed"], self.options["concurrency"]
        seeds = list(range(first, first + concurrency))
        alone = tuple(self._run([seed]) for seed in seeds)
        reference = self._run_reference(alone[0])
        together = self._run(seeds) if concurrency > 1 else None
        return Turn(
            alone=alone,
            together=together,
            reference=reference,
            reference_batch=None if together is None or self.refused_batch else self._run_reference(together),
        )

    def _run(self, seeds: list[int], **changes: Any) -> Batch:
        """One request for each seed, all submitted at once."""
        begin = time.perf_counter()
        ends, results = [], []
        for event in self.generator.stream({**self.request, "seed": seeds, **changes}):
            if isinstance(event.event, ServingError):
                raise event.event
            if isinstance(event.event, Started):
                self._note_started(event.event)
            if isinstance(event.event, GenerationResult):
                ends.append(time.perf_counter() - begin)
                results.append(event.event)
        return Batch(results=tuple(results), ends=tuple(ends))

    def _note_started(self, started: Started) -> None:
        self.notes = tuple(dict.fromkeys((*self.notes, *started.notes)))
        # A phase's cost counts the tokens of all rows of one unit.
        self.tokens = {phase.name: phase.units * phase.cost for phase in started.phases if phase.lane == "denoise"}

    def _run_reference(self, batch: Batch) -> Compared | None:
        """The same seeds in one call of the reference. None without one, and of a batch that it does not make, which
        is noted and not tried again."""
        if self.reference is None:
            return None
        ours = sorted(batch.results, key=lambda result: result.seed)
        self.reference.send(ReferenceCall(params=self.params, seeds=tuple(result.seed for result in ours)))
        done = self.reference.receive(ReferenceDone)
        if done.refusal is not None:
            self.refused_batch = True
            self.notes = (*self.notes, done.refusal)
            return None
        return Compared(done=done, frame_difference=_difference(ours, Path(done.frames_file)))

    def _num_steps(self) -> int:
        assert self.params.num_inference_steps is not None, "the model says how many where nobody else does"
        return self.params.num_inference_steps

    def idle(self) -> IdleTime | None:
        """Of one more request, in steps after one that warms up the recorder."""
        tell("recording some steps")
        steps = min(_PROFILED_STEPS, self._num_steps() - 1)
        batch = self._run([self.options["seed"]], profile=True, num_profiled_timesteps=steps)
        path = batch.results[0].metrics.get("profile_path")
        return None if path is None else idle_time(Path(path))

    def result(
        self, turns: list[Turn], ready: ReferenceReady | None, cost: CostResult | None, idle: IdleTime | None
    ) -> PipelineResult:
        """What the repeats say together."""
        one_by_one = alone(turns)
        asked = msgspec.to_builtins(dataclasses.replace(self.params, output_path=None))  # which is gone
        return PipelineResult(
            model=self.model,
            request={name: value for name, value in asked.items() if value is not None},
            alone=one_by_one,
            rates=phase_rates(one_by_one, cost, self.tokens),
            together=together(turns),
            reference=beside_reference(turns, ready),
            idle=idle,
            notes=self.notes,
        )


def _difference(ours: Sequence[GenerationResult], frames_file: Path) -> tuple[int, float]:
    """The largest of all outputs, each beside the reference's in the same place."""
    theirs = np.load(frames_file)
    frames_file.unlink()
    differences = []
    for result, frames in zip(ours, theirs, strict=True):
        assert result.frames is not None, "frames were asked for"
        differences.append(frame_difference(result.frames, frames))
    return largest_difference(differences)
