"""What is encoded once and kept: the cache's bounds, the stage that asks it, and the rules of guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang.multimodal_gen.configs.sample.sampling_params import PARAMETERS_OF_SOME, SamplingParams
from sglang.multimodal_gen.errors import UnsupportedParameter
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.conditioning_cache import ConditioningCache
from sglang.multimodal_gen.runtime.pipelines_core.guidance import ClassifierFreeGuidance, renormed
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import TextCondition
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.pipeline_parity import run, run_together

VALUES = {"prompt": "a red circle", "width": 48, "height": 32, "num_frames": 1, "num_inference_steps": 2, "seed": 1}


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    cache = ConditioningCache(3 * 400)
    tensors = {name: torch.full((100,), float(number)) for number, name in enumerate("abcd")}
    for name in "abc":
        cache.put(name, tensors[name])
    assert cache.get("a") is tensors["a"]
    cache.put("d", tensors["d"])
    assert cache.get("b") is None
    assert [cache.get(name) is tensors[name] for name in "acd"] == [True] * 3
    assert cache.held_bytes == 1200


def test_the_cache_counts_all_that_a_value_holds() -> None:
    cache = ConditioningCache(2000)
    text = TextCondition(torch.zeros(10, 10)[:5], 3, torch.zeros(20))
    cache.put("text", text)
    assert cache.held_bytes == 400 + 80, "a slice keeps the whole of its storage"
    cache.put("large", torch.zeros(501))
    assert cache.get("large") is None
    cache.clear()
    assert (cache.get("text"), cache.held_bytes) == (None, 0)


@pytest.mark.parametrize("mebibytes", [0, 1])
def test_a_prompt_seen_before_is_not_encoded_again(
    mebibytes: int, wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = ExecutionArgs(device="cpu", conditioning_cache_mib=mebibytes)
    pipeline = build_pipeline(str(wan_checkpoint("plain")), execution)
    calls = []
    forward = pipeline.text_encoder.forward
    monkeypatch.setattr(pipeline.text_encoder, "forward", lambda *args: calls.append(args) or forward(*args))
    with torch.inference_mode():
        first, _ = run(pipeline, VALUES)
        second, _ = run(pipeline, VALUES | {"guidance_scale": 1.0})
        again, _ = run(pipeline, VALUES)
    assert len(calls) == (1 if mebibytes else 3)
    assert first.latents is not None and again.latents is not None and second.latents is not None
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, second.latents)


def test_a_deterministic_engine_encodes_each_text_alone(
    wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of a text would otherwise tell, by its last bits, beside which others it was first read."""
    pipeline = build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu", deterministic=True))
    calls: list[tuple[int, ...]] = []
    forward = pipeline.text_encoder.forward
    monkeypatch.setattr(
        pipeline.text_encoder, "forward", lambda ids, *rest: calls.append(tuple(ids.shape)) or forward(ids, *rest)
    )
    with torch.inference_mode():
        run_together(pipeline, [(VALUES, EMPTY), (VALUES | {"prompt": "a red circle over two long lines"}, EMPTY)])
    assert len(calls) == 3, "two prompts and the negative one that they share"
    assert {rows for rows, _ in calls} == {1} and len({length for _, length in calls}) == 3


def test_guidance_stops_outside_its_interval(wan_checkpoint: Callable[[str], Path]) -> None:
    pipeline = build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu"))
    values = VALUES | {"guidance_scale": 3.0, "num_inference_steps": 10}
    req = pipeline.admit("r", SamplingParams.from_values(values | {"cfg_interval_start": 0.2, "cfg_interval_end": 0.5}))
    assert req.sampler_state is not None
    guided = []
    for step in range(10):
        req.sampler_state.step_index = step
        guided.append(ClassifierFreeGuidance().is_on(req))
    assert guided == [False, False, True, True, True, False, False, False, False, False]


def test_an_interval_without_a_step_is_the_same_as_no_guidance(wan_checkpoint: Callable[[str], Path]) -> None:
    pipeline = build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu"))
    with torch.inference_mode():
        unguided, _ = run(pipeline, VALUES | {"guidance_scale": 1.0})
        outside, _ = run(pipeline, VALUES | {"guidance_scale": 5.0, "cfg_interval_end": 0.0})
    assert unguided.latents is not None and outside.latents is not None
    torch.testing.assert_close(outside.latents, unguided.latents)


def test_renormed_guidance_has_the_conditional_length() -> None:
    guided, conditional = torch.randn(4, 1, 6, 6) * 5, torch.randn(4, 1, 6, 6)
    result = renormed(guided, conditional, dim=0)
    torch.testing.assert_close(result.norm(dim=0), conditional.norm(dim=0))
    torch.testing.assert_close(result / result.norm(dim=0), guided / guided.norm(dim=0))


@pytest.mark.parametrize("name", sorted(PARAMETERS_OF_SOME))
def test_a_parameter_that_the_model_has_no_use_for_is_refused(name: str, wan_checkpoint: Callable[[str], Path]) -> None:
    pipeline = build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu"))
    whole = {"max_area": 1024, "auto_resize": True, "frame_index": 1, "image_embed_interleave": 2, "clip_skip": 1}
    whole["skip_guidance_layers"] = [1]
    value = whole.get(name, 0.5)
    with pytest.raises(UnsupportedParameter, match=f"{name}: not supported here, .* has no use for it"):
        pipeline.admit("r", SamplingParams.from_values(VALUES | {name: value}))
