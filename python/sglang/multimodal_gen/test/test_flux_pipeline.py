"""The FLUX.1 pipeline against diffusers' FluxPipeline, alone and sharing batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import unpack
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.test.pipeline_parity import as_uint8, assert_same, load, relative_error, run, run_together
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux

BASE: dict[str, Any] = {
    "prompt": "a red circle and a blue star",
    "width": 64,
    "height": 48,
    "num_inference_steps": 3,
    "guidance_scale": 3.5,
    "max_sequence_length": 24,
    "seed": 5,
}
# By checkpoint: sizes, steps, prompt lengths, and guidance on top of the distilled one all differ.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "dev": [
        {},
        {"width": 48, "height": 64, "true_cfg_scale": 2.5, "negative_prompt": "green square"},
        {"prompt": "moving " * 40, "num_inference_steps": 1},
        {"true_cfg_scale": 4.0, "negative_prompt": "", "max_sequence_length": 16},
    ],
    "schnell": [
        {"guidance_scale": 0.0, "num_inference_steps": 4},
        {"width": 80, "height": 80, "max_sequence_length": 8},
    ],
    "wide": [{"width": 32, "height": 96, "seed": 2**40 + 1}],
    "shallow_vae": [{"width": 24, "height": 40, "guidance_scale": 7.0}],
}
CASES = [(name, number) for name, requests in REQUESTS.items() for number in range(len(requests))]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("flux")
    return cache(lambda name: save_tiny_flux(root / name, TINY_FLUXES[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def reference(
    checkpoint: Path, values: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, 1, H, W] and frames [1, H, W, 3] of the same request."""
    pipeline = diffusers.FluxPipeline.from_pretrained(checkpoint, local_files_only=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in values.items() if key != "seed"}

    def generate(output_type: str) -> Any:
        generator = torch.Generator().manual_seed(values["seed"])
        return pipeline(**arguments, generator=generator, output_type=output_type).images

    side = 2 * pipeline.vae_scale_factor
    grid = (1, values["height"] // side, values["width"] // side)
    return unpack(generate("latent"), grid)[0], as_uint8(generate("np"))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_latents_and_pictures_match_diffusers(
    name: str, number: int, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values = BASE | REQUESTS[name][number]
    assert_same(run(pipeline_of(name), values), *reference(checkpoint(name), values))


def test_unequal_requests_share_forwards_and_stay_as_they_are(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("dev")
    wishes = [
        BASE,
        BASE | {"prompt": "star", "seed": 9, "guidance_scale": 1.5, "num_inference_steps": 5},
        BASE | {"true_cfg_scale": 3.0, "negative_prompt": "small", "num_inference_steps": 2},
    ]
    together = run_together(pipeline, [(values, EMPTY) for values in wishes])
    for values, (req, frames) in zip(wishes, together, strict=True):
        alone, alone_frames = run(pipeline, values)
        assert alone.latents is not None
        assert relative_error(req.latents, alone.latents) <= 1e-5
        assert np.abs(frames.astype(int) - alone_frames.astype(int)).max() <= 1


def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    directory = checkpoint("dev")
    exact, _ = run(pipeline_of("dev"), BASE)
    assert exact.latents is not None
    ours, _ = run(load(directory, precision="bf16"), BASE)
    theirs, _ = reference(directory, BASE, torch.bfloat16)
    assert relative_error(ours.latents, exact.latents) <= 1.25 * relative_error(theirs, exact.latents)


@pytest.mark.parametrize(
    ("hub_id", "steps", "guidance", "length"),
    [
        ("black-forest-labs/FLUX.1-dev", 28, 3.5, 512),
        ("black-forest-labs/FLUX.1-Krea-dev", 28, 3.5, 512),
        ("black-forest-labs/FLUX.1-schnell", 4, 0.0, 256),
    ],
)
def test_hub_ids_have_their_published_defaults(hub_id: str, steps: int, guidance: float, length: int) -> None:
    defaults = get_model_info(hub_id).defaults
    assert (defaults.width, defaults.height, defaults.num_frames) == (1024, 1024, 1)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (steps, guidance)
    assert (defaults.max_sequence_length, defaults.true_cfg_scale) == (length, 1.0)
