"""The engine when memory is short: smaller batches, smaller units, waiting, and making room."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from sglang.multimodal_gen.errors import OutOfMemory, RemoteError, ServingError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import Progress, Queued
from sglang.multimodal_gen.test import null_family

null_family.register()
PATIENCE_S = 0.3


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("null-model", batching_max_size=4, preempt_after_s=PATIENCE_S) as generator:
        yield generator


def ends(engine: DiffGenerator, wish: dict[str, Any]) -> dict[int, GenerationResult | ServingError]:
    """How each prompt's output ended."""
    items = engine.stream(wish)
    return {i.prompt_index: i.event for i in items if isinstance(i.event, GenerationResult | ServingError)}


def test_a_batch_that_runs_out_of_memory_is_run_again_as_smaller_ones(engine: DiffGenerator) -> None:
    restarts = engine.status().num_worker_restarts
    results = ends(engine, {"prompt": [f"oom-shared {i}" for i in range(4)], "num_inference_steps": 4})
    assert [type(result) for result in results.values()] == [GenerationResult] * 4
    assert engine.status().num_worker_restarts == restarts


def test_a_request_that_runs_out_alone_goes_on_with_smaller_units_and_says_so(engine: DiffGenerator) -> None:
    result = engine.generate({"prompt": "oom-large", "num_inference_steps": 4})
    assert isinstance(result, GenerationResult)
    assert result.notes == ("planned with less memory",)
    assert len(result.metrics["step_ms"]) == 4


def test_a_request_that_runs_out_at_its_smallest_fails_alone_and_the_worker_serves_on(engine: DiffGenerator) -> None:
    [pid] = engine.status().worker_pids
    results = ends(engine, {"prompt": ["sleep-3 a", "oom sleep-3", "sleep-3 b"], "num_inference_steps": 8})
    assert [type(results[index]) for index in range(3)] == [GenerationResult, RemoteError, GenerationResult]
    error = results[1]
    assert isinstance(error, RemoteError)
    assert (error.code, error.http_status) == (OutOfMemory.code, 500)
    assert engine.status().worker_pids == (pid,)


def test_requests_wait_until_what_they_hold_fits_beside_the_others(engine: DiffGenerator) -> None:
    """600 of 1,000 GiB each: one at a time. 300: three at a time."""
    order, reserved = [], []
    for item in engine.stream({"prompt": ["holds-600 sleep-5 a", "holds-600 sleep-5 b"], "num_inference_steps": 12}):
        if isinstance(item.event, Progress) and item.event.phase == "denoise":
            order.append(item.prompt_index)
            reserved.append(engine.status().reserved_bytes)
    assert sum(a != b for a, b in itertools.pairwise(order)) == 1
    assert max(reserved) <= engine.status().budget_bytes
    order = [
        item.prompt_index
        for item in engine.stream({"prompt": [f"holds-300 sleep-5 {i}" for i in range(3)], "num_inference_steps": 12})
        if isinstance(item.event, Progress) and item.event.phase == "denoise"
    ]
    assert sum(a != b for a, b in itertools.pairwise(order)) > 12
    assert engine.status().reserved_bytes == 0


def test_a_long_request_makes_room_for_a_short_one_and_goes_on_where_it_was(engine: DiffGenerator) -> None:
    long = engine.stream({"prompt": "holds-900 sleep-10", "num_inference_steps": 200, "return_latents": True})
    steps, requeued = [], 0
    for item in long:
        if isinstance(item.event, Progress):
            break
    short = engine.generate({"prompt": "holds-900 sleep-10", "num_inference_steps": 3})
    assert isinstance(short, GenerationResult)
    for item in long:
        requeued += isinstance(item.event, Queued)
        if isinstance(item.event, Progress) and item.event.phase == "denoise":
            steps.append(item.event.step)
        if isinstance(item.event, GenerationResult):
            result = item.event
    assert requeued == 1
    assert steps == sorted(set(steps)), "no step is done twice"
    assert result.latents is not None
    assert result.latents.item() == 200, "one for every step that the state has seen"
    assert result.metrics["attempts"] == 1


def put_aside_in_its_last_step(engine: DiffGenerator, step_ms: int) -> tuple[int, GenerationResult]:
    """How often a long request waited again, and its result.

    The short request is admitted after the long one's second step, so its patience ends during the third.
    """
    prompt = f"holds-900 sleep-{step_ms}"
    long = engine.stream({"prompt": prompt, "num_inference_steps": 3, "return_latents": True, "return_frames": True})
    for item in long:
        if isinstance(item.event, Progress) and item.event.step == 1:
            break
    short = engine.generate({"prompt": "holds-900", "num_inference_steps": 1, "output_type": "latent"})
    assert isinstance(short, GenerationResult)
    rest = [item.event for item in long]
    [result] = [event for event in rest if isinstance(event, GenerationResult)]
    return sum(isinstance(event, Queued) for event in rest), result


def test_a_request_put_aside_during_its_last_step_still_gives_all_that_was_asked_for(engine: DiffGenerator) -> None:
    """Its latents had left already, and go with what is dropped; its frames had not."""
    for step_ms in (900, 3000, 10_000):  # a busy machine may be too slow for the short one to come in time
        requeued, result = put_aside_in_its_last_step(engine, step_ms)
        assert result.latents is not None and result.frames is not None
        assert result.latents.item() == 3
        assert result.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
        assert engine.status().num_running == 0
        if requeued:
            break
    assert requeued == 1


def test_equal_requests_do_not_push_each_other_out(engine: DiffGenerator) -> None:
    events = list(
        engine.stream({"prompt": ["holds-900 sleep-10 a", "holds-900 sleep-10 b"], "num_inference_steps": 60})
    )
    assert sum(isinstance(item.event, Queued) for item in events) == 2
