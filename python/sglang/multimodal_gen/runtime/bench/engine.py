"""`bench engine`: what the engine itself costs, with a model that does nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from sglang.multimodal_gen.registry import NULL_MODEL
from sglang.multimodal_gen.runtime.bench.child import tell
from sglang.multimodal_gen.runtime.bench.statistics import Summary, summarise
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator
from sglang.multimodal_gen.runtime.server_args import ServerArgs

# A burst of few requests is over in a few milliseconds, so several make a sample.
_REQUESTS_PER_SAMPLE = 32


class Throughput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests of one step that are in the engine at the same time."""

    concurrency: int
    requests_per_second: Summary


class EngineResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="engine"):
    """`request_ms` is one request of one step, from submission to its result; `step_ms` what each further step adds."""

    steps: int
    request_ms: Summary
    step_ms: Summary
    throughput: tuple[Throughput, ...]


def measure_engine(options: Mapping[str, Any], args: ServerArgs) -> EngineResult:
    """The result of one engine of its own. Raises ServingError when it cannot start."""
    args = dataclasses.replace(args, model=dataclasses.replace(args.model, model_path=NULL_MODEL))
    concurrency = options["concurrency"]
    with DiffGenerator.from_server_args(args) as generator:
        generator.wait_ready()
        bench = _EngineBench(generator, options)
        tell("measuring steps and requests")
        one_step = bench.sample(lambda: bench.seconds(num_requests=1, steps=1))
        many_steps = bench.sample(lambda: bench.seconds(num_requests=1, steps=options["steps"]))
        further = options["steps"] - 1
        return EngineResult(
            steps=options["steps"],
            request_ms=summarise([seconds * 1000 for seconds in one_step]),
            step_ms=summarise([(many - one) * 1000 / further for one, many in zip(one_step, many_steps, strict=False)]),
            throughput=tuple(
                bench.throughput(n) for n in ([concurrency] if isinstance(concurrency, int) else concurrency)
            ),
        )


class _EngineBench:
    def __init__(self, generator: DiffGenerator, options: Mapping[str, Any]) -> None:
        self.generator = generator
        self.options = options

    def sample(self, measure: Any) -> list[float]:
        """As many samples as the options want, after the warm-up."""
        for _ in range(self.options["warmup_runs"]):
            measure()
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < self.options["repeats"] or time.perf_counter() - begin < self.options["min_seconds"]:
            samples.append(measure())
        return samples

    def seconds(self, *, num_requests: int, steps: int) -> float:
        """From submitting that many requests at once to the last result."""
        begin = time.perf_counter()
        self.generator.generate({"prompt": ["nothing"] * num_requests, "num_inference_steps": steps, "seed": 0})
        return time.perf_counter() - begin

    def throughput(self, concurrency: int) -> Throughput:
        """Bursts of `concurrency` requests, one burst after the other."""
        tell(f"measuring throughput with {concurrency} requests at a time")
        bursts = max(1, _REQUESTS_PER_SAMPLE // concurrency)

        def rate() -> float:
            seconds = sum(self.seconds(num_requests=concurrency, steps=1) for _ in range(bursts))
            return bursts * concurrency / seconds

        return Throughput(concurrency=concurrency, requests_per_second=summarise(self.sample(rate)))
