"""What `bench pipeline` reports, and how its repeats become that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.runtime.bench.idle import IdleTime
from sglang.multimodal_gen.runtime.bench.messages import CostResult, ReferenceDone, ReferenceReady
from sglang.multimodal_gen.runtime.bench.statistics import Ratio, Summary, compare, summarise
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import GenerationResult

_DENOISE, _DECODE = "denoise", "decode"


class PhaseRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FLOPs of a phase of one request, and how fast it did them against the machine's matrix products."""

    flops: int
    flops_per_second: float
    matmul_flops_per_second: float
    matmul_ratio: float


class Alone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests one after another. `seconds` is from submission to the result; stages and steps as the workers say."""

    seconds: Summary
    stage_seconds: dict[str, Summary]
    step_ms: Summary
    requests_per_second: float
    peak_memory_bytes: int


class Together(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`concurrency` requests of one shape at once, against as many one after another.

    `seconds` is until the last result, `denoise_seconds` the sum over the shared steps, each counted once;
    `request_seconds` what a single request sees. Ratios are one-after-another over together.
    """

    concurrency: int
    seconds: Summary
    seconds_one_by_one: Summary
    ratio: Ratio
    denoise_seconds: Summary
    denoise_seconds_one_by_one: Summary
    denoise_ratio: Ratio
    request_seconds: Summary
    mean_batch_size: float
    requests_per_second: float
    peak_memory_bytes: int


class BesideReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Calls of the reference in turns with ours, whose seconds in the same turns are `ours_seconds`.

    `ratio` is the reference's time over ours. Each output is compared with ours of the same seed: differences of
    frames, in steps of 8-bit values, are the largest of all.
    """

    seconds: Summary
    ours_seconds: Summary
    ratio: Ratio
    step_ms: Summary | None
    outputs_per_second: float
    max_frame_difference: int
    mean_frame_difference: float


class ReferenceBatch(BesideReference, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`size` outputs in one call, beside as many requests of ours together."""

    size: int


class Reference(BesideReference, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One output, beside one request. `batch` is None where one request runs at a time, or where a note says why the
    reference made none."""

    pipeline: str
    load_seconds: float
    batch: ReferenceBatch | None


class PipelineResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="pipeline"):
    """What was measured of whole requests. `request` is what each of them asked for, seed and prompt included.

    With `compare` results come back as frames, without it they are saved to files that are then removed.
    """

    model: ModelInfo
    request: dict[str, Any]
    alone: Alone
    rates: dict[str, PhaseRate]
    together: Together | None
    reference: Reference | None
    notes: tuple[str, ...]
    idle: IdleTime | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests that were submitted together: each with the seconds until its result."""

    results: tuple[GenerationResult, ...]
    ends: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Until the last result."""
        return self.ends[-1]

    @property
    def denoise_seconds(self) -> float:
        """Of all denoising steps, a step that several requests shared counted once."""
        return sum(
            milliseconds / batch_size / 1000
            for result in self.results
            for milliseconds, batch_size in zip(
                result.metrics["step_ms"], result.metrics["step_batch_sizes"], strict=True
            )
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A call of the reference, and how far its frames are from ours at most: the largest and the mean difference."""

    done: ReferenceDone
    frame_difference: tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One repeat: the same requests one by one and together; the first of them, and all, in a call of the reference."""

    alone: tuple[Batch, ...]
    together: Batch | None
    reference: Compared | None
    reference_batch: Compared | None


def alone(turns: Sequence[Turn]) -> Alone:
    """Of all requests that had the engine for themselves."""
    batches = [batch for turn in turns for batch in turn.alone]
    results = [result for batch in batches for result in batch.results]
    stages = list(dict.fromkeys(stage for result in results for stage in result.metrics["stage_seconds"]))
    seconds = summarise([batch.seconds for batch in batches])
    return Alone(
        seconds=seconds,
        stage_seconds={
            stage: summarise([result.metrics["stage_seconds"].get(stage, 0.0) for result in results])
            for stage in stages
        },
        step_ms=summarise([step for result in results for step in result.metrics["step_ms"]]),
        requests_per_second=1 / seconds.median,
        peak_memory_bytes=_peak_bytes(results),
    )


def together(turns: Sequence[Turn]) -> Together | None:
    """None where nothing ran together."""
    batches = [turn.together for turn in turns if turn.together is not None]
    if not batches:
        return None
    results = [result for batch in batches for result in batch.results]
    shared = summarise([batch.seconds for batch in batches])
    one_by_one = summarise([sum(batch.seconds for batch in turn.alone) for turn in turns])
    denoise = summarise([batch.denoise_seconds for batch in batches])
    denoise_one_by_one = summarise([sum(batch.denoise_seconds for batch in turn.alone) for turn in turns])
    sizes = [size for result in results for size in result.metrics["step_batch_sizes"]]
    return Together(
        concurrency=len(batches[0].results),
        seconds=shared,
        seconds_one_by_one=one_by_one,
        ratio=compare(shared, one_by_one),
        denoise_seconds=denoise,
        denoise_seconds_one_by_one=denoise_one_by_one,
        denoise_ratio=compare(denoise, denoise_one_by_one),
        request_seconds=summarise([end for batch in batches for end in batch.ends]),
        # A step of n requests is in n of the lists.
        mean_batch_size=len(sizes) / sum(1 / size for size in sizes),
        requests_per_second=len(batches[0].results) / shared.median,
        peak_memory_bytes=_peak_bytes(results),
    )


def beside_reference(turns: Sequence[Turn], ready: ReferenceReady | None) -> Reference | None:
    """None where nothing was compared."""
    if ready is None:
        return None
    pairs = [(turn.alone[0], turn.reference) for turn in turns if turn.reference is not None]
    return Reference(
        pipeline=ready.pipeline,
        load_seconds=ready.load_seconds,
        batch=_beside_batch(turns),
        **_compared(pairs, num_outputs=1),
    )


def _beside_batch(turns: Sequence[Turn]) -> ReferenceBatch | None:
    """None unless every turn has one: a reference may run out of memory in any."""
    pairs = [
        (turn.together, turn.reference_batch)
        for turn in turns
        if turn.together is not None and turn.reference_batch is not None
    ]
    if len(pairs) < len(turns):
        return None
    size = len(pairs[0][0].results)
    return ReferenceBatch(size=size, **_compared(pairs, num_outputs=size))


def _compared(pairs: Sequence[tuple[Batch, Compared]], *, num_outputs: int) -> dict[str, Any]:
    """The fields of BesideReference."""
    ours = summarise([batch.seconds for batch, _ in pairs])
    theirs = summarise([each.done.seconds for _, each in pairs])
    steps = [step for _, each in pairs for step in each.done.step_ms]  # none of calls of a single step
    largest, mean = largest_difference([each.frame_difference for _, each in pairs])
    return {
        "seconds": theirs,
        "ours_seconds": ours,
        "ratio": compare(ours, theirs),
        "step_ms": summarise(steps) if steps else None,
        "outputs_per_second": num_outputs / theirs.median,
        "max_frame_difference": largest,
        "mean_frame_difference": mean,
    }


def phase_rates(measured: Alone, cost: CostResult | None, tokens: Mapping[str, float]) -> dict[str, PhaseRate]:
    """Of the phases whose FLOPs were counted. `tokens`: by denoising phase, those of all rows of all its steps."""
    if cost is None:
        return {}
    flops = {phase: round(cost.step_flops * count / cost.num_tokens) for phase, count in tokens.items()}
    flops[_DECODE] = cost.decode_flops
    rates = {}
    for phase, count in flops.items():
        if phase in measured.stage_seconds and count:
            achieved = count / measured.stage_seconds[phase].median
            matmul = cost.matmul_flops_per_second[_DENOISE if phase in tokens else phase]
            rates[phase] = PhaseRate(
                flops=count,
                flops_per_second=achieved,
                matmul_flops_per_second=matmul,
                matmul_ratio=achieved / matmul,
            )
    return rates


def frame_difference(ours: np.ndarray, reference: np.ndarray) -> tuple[int, float]:
    """The largest and the mean difference of frames, both uint8 [T, H, W, 3], in steps of their values."""
    difference = np.abs(ours.astype(np.int16) - reference.astype(np.int16))
    return int(difference.max()), float(difference.mean())


def largest_difference(differences: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Of what `frame_difference` gave: the largest and the largest mean."""
    return max(largest for largest, _ in differences), max(mean for _, mean in differences)


def _peak_bytes(results: Iterable[GenerationResult]) -> int:
    return max(round(result.peak_memory_mb * 2**20) for result in results)
