"""Step caches through the engine: what results say, company, cancelling, and a worker that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang.multimodal_gen.errors import RemoteError
from sglang.multimodal_gen.runtime.entrypoints.cli.reporting import LineDisplay, Reporter
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import (
    DiffGenerator,
    GenerationEvent,
    GenerationResult,
)
from sglang.multimodal_gen.runtime.managers.messages import Progress

STEPS = 10
REQUEST: dict[str, Any] = {
    "prompt": "a red circle",
    "negative_prompt": "green",
    "width": 48,
    "height": 48,
    "num_frames": 5,
    "guidance_scale": 4.0,
    "num_inference_steps": STEPS,
    "seed": 3,
    "return_latents": True,
}
KNOBS = {"residual_diff_threshold": 1.2, "max_warmup_steps": 2, "max_continuous_cached_steps": 2}
FIRST_BLOCK = {"enable_cache_dit": True, "cache_dit_params": KNOBS}
TEACACHE = {"enable_teacache": True, "teacache_params": {"coefficients": [0.1, 0.0], "teacache_thresh": 0.2}}


@pytest.fixture(scope="module")
def engine(wan_checkpoint: Callable[[str], Path]) -> Iterator[DiffGenerator]:
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "checkpoint_every": 2}
    with DiffGenerator.from_pretrained(str(wan_checkpoint("deep")), **options) as generator:
        yield generator


def made(engine: DiffGenerator, wish: dict[str, Any]) -> GenerationResult:
    result = engine.generate(wish)
    assert isinstance(result, GenerationResult)
    return result


def test_results_say_what_was_computed_alone_and_in_company(
    engine: DiffGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    wishes = [REQUEST | FIRST_BLOCK, REQUEST | TEACACHE, REQUEST | {"num_inference_steps": 6}]
    alone = [made(engine, wish) for wish in wishes]

    async def together() -> list[Any]:
        return await asyncio.gather(*(engine.generate_async(wish) for wish in wishes))

    shared = asyncio.run(together())
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(other.latents, one.latents, rtol=1e-3, atol=1e-4)
        for name in ("computed_steps", "computed_forwards", "num_forwards"):
            assert one.metrics.get(name) == other.metrics.get(name)
    first, second, plain = (result.metrics for result in alone)
    for metrics in (first, second):
        assert metrics["num_forwards"] == 2 * STEPS == 2 * len(metrics["step_ms"])
        assert 2 < metrics["computed_steps"] < STEPS
        assert metrics["computed_steps"] <= metrics["computed_forwards"] <= 2 * metrics["computed_steps"]
    assert plain["computed_steps"] == 6 and "num_forwards" not in plain
    with Reporter(LineDisplay(), several=False) as reporter:
        reporter.event(GenerationEvent(prompt_index=0, output_index=0, request_id="a", event=alone[0]))
    computed = f"{first['computed_forwards']} of {2 * STEPS} forwards"
    assert f"computed {first['computed_steps']} of {STEPS} steps, {computed}\n" in capsys.readouterr().out


def test_what_the_model_cannot_do_is_said_by_the_worker(engine: DiffGenerator) -> None:
    with pytest.raises(RemoteError, match="Fn_compute_blocks: got 4, accepted is an integer from 1 to 3") as caught:
        made(engine, REQUEST | {"enable_cache_dit": True, "cache_dit_params": {"Fn_compute_blocks": 4}})
    assert caught.value.param == "cache_dit_params.Fn_compute_blocks"


def test_others_go_on_when_a_request_with_a_cache_is_cancelled(engine: DiffGenerator) -> None:
    expected = made(engine, REQUEST | FIRST_BLOCK)
    for item in engine.stream(REQUEST | FIRST_BLOCK | {"num_inference_steps": 400}):
        if isinstance(item.event, Progress) and item.event.step >= 5:
            break  # which cancels it
    again = made(engine, REQUEST | FIRST_BLOCK)
    assert np.array_equal(again.latents, expected.latents)
    assert again.metrics["computed_forwards"] == expected.metrics["computed_forwards"]
    assert engine.status().num_running == 0


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TEACACHE], ids=["first block", "teacache"])
def test_a_killed_worker_changes_no_bit(engine: DiffGenerator, cache: dict[str, Any]) -> None:
    """The cache is part of the saved state, and steps are counted once."""
    wish = REQUEST | cache | {"width": 96, "height": 96}
    undisturbed, result, killed = made(engine, wish), None, False
    for item in engine.stream(wish):
        if isinstance(item.event, Progress) and item.event.step == 7 and not killed:
            killed = True
            [pid] = engine.status().worker_pids
            os.kill(pid, signal.SIGKILL)
        if isinstance(item.event, GenerationResult):
            result = item.event
    assert result is not None and result.metrics["attempts"] == 2
    assert np.array_equal(result.latents, undisturbed.latents)
    for name in ("computed_steps", "computed_forwards", "num_forwards"):
        assert result.metrics[name] == undisturbed.metrics[name]
