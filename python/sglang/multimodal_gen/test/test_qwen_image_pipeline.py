"""The Qwen-Image pipelines against diffusers', alone and sharing batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.pipelines import qwen_image
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.test.pipeline_parity import assert_same, load, relative_error, run, run_together
from sglang.multimodal_gen.test.tiny_qwen_image import (
    TINY_QWEN_IMAGES,
    latents_and_frames,
    save_tiny_qwen_image,
    tiny_reference,
)

BASE: dict[str, Any] = {
    "prompt": "a red circle and a {blue} star",
    "negative_prompt": " ",
    "width": 64,
    "height": 48,
    "num_inference_steps": 3,
    "true_cfg_scale": 4.0,
    "seed": 5,
}
# By checkpoint: sizes, steps, prompt lengths and guidance on and off all differ.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {},
        {"width": 48, "height": 80, "true_cfg_scale": 1.0},
        {"prompt": "moving " * 120, "num_inference_steps": 2, "negative_prompt": "green square"},
        {"max_sequence_length": 24, "true_cfg_scale": 2.5, "negative_prompt": ""},
    ],
    "deep": [{"width": 32, "height": 96, "seed": 2**40 + 1, "num_inference_steps": 6, "prompt": "星"}],
}
CASES = [(name, number) for name, requests in REQUESTS.items() for number in range(len(requests))]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("qwen_image")
    return cache(lambda name: save_tiny_qwen_image(root / name, TINY_QWEN_IMAGES[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def reference(name: str, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, 1, H, W] and frames [1, H, W, 3] of the same request."""
    return latents_and_frames(tiny_reference(TINY_QWEN_IMAGES[name]).to(dtype), values)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_latents_and_pictures_match_diffusers(name: str, number: int, pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | REQUESTS[name][number]
    assert_same(run(pipeline_of(name), values), *reference(name, values))


def test_guidance_scale_means_true_cfg_unless_that_is_given(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("plain")
    values = {key: value for key, value in BASE.items() if key != "true_cfg_scale"}
    expected, _ = run(pipeline, BASE)
    assert expected.latents is not None
    for scales in ({"guidance_scale": 4.0}, {}, {"guidance_scale": 9.0, "true_cfg_scale": 4.0}):
        found, _ = run(pipeline, values | scales)
        assert found.latents is not None
        assert torch.equal(found.latents, expected.latents), scales


@pytest.mark.parametrize("masked_below", [0, 1024], ids=["by length", "masked"])
def test_unequal_requests_share_forwards_and_stay_as_they_are(
    masked_below: int, pipeline_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of("plain")
    wishes = [
        BASE,
        BASE | {"prompt": "star", "seed": 9, "true_cfg_scale": 1.5, "num_inference_steps": 5},
        BASE | {"true_cfg_scale": 1.0, "num_inference_steps": 2, "max_sequence_length": 40},
    ]
    alone = [run(pipeline, values) for values in wishes]
    monkeypatch.setattr(qwen_image, "_MASKED_BELOW", masked_below)
    sizes: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    together = run_together(pipeline, [(values, EMPTY) for values in wishes])
    hook.remove()
    expected_sizes = [5] if masked_below else [1, 1, 1, 2]
    assert sorted(sizes[: len(expected_sizes)]) == expected_sizes, "all five rows, or the two of one length"
    for (req, frames), (expected, expected_frames) in zip(together, alone, strict=True):
        assert expected.latents is not None
        assert relative_error(req.latents, expected.latents) <= 1e-5
        assert np.abs(frames.astype(int) - expected_frames.astype(int)).max() <= 1


def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    exact, _ = run(pipeline_of("plain"), BASE)
    assert exact.latents is not None
    ours, _ = run(load(checkpoint("plain"), precision="bf16"), BASE)
    theirs, _ = reference("plain", BASE, torch.bfloat16)
    assert relative_error(ours.latents, exact.latents) <= 1.25 * relative_error(theirs, exact.latents)
