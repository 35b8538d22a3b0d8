"""The FLUX.1 pipeline against diffusers' FluxPipeline, alone and sharing batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.pipelines import flux_edit
from sglang.multimodal_gen.runtime.pipelines.flux_edit import KONTEXT_SIZES
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import unpack
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.test.media import disc, picture
from sglang.multimodal_gen.test.pipeline_parity import (
    LATENT_TOLERANCE,
    as_uint8,
    assert_close_in_bf16,
    assert_same,
    load,
    relative_error,
    run,
    run_together,
)
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
    assert_close_in_bf16(ours, theirs, exact.latents)


def edited(
    pipeline_class: Any,
    checkpoint: Path,
    values: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    **images: np.ndarray,
) -> tuple[Tensor, np.ndarray]:
    """What a diffusers pipeline makes of pictures: latents [C, 1, H, W] and frames [1, H, W, 3]."""
    pipeline = pipeline_class.from_pretrained(checkpoint, local_files_only=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in values.items() if key != "seed"}
    arguments |= {name: Image.fromarray(array) for name, array in images.items()}

    def generate(output_type: str) -> Any:
        generator = torch.Generator().manual_seed(values["seed"])
        return pipeline(**arguments, generator=generator, output_type=output_type).images

    frames = as_uint8(generate("np"))
    side = 2 * pipeline.vae_scale_factor
    return unpack(generate("latent"), (1, frames.shape[1] // side, frames.shape[2] // side))[0], frames


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_matches_diffusers(
    strength: float, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values = BASE | {"strength": strength, "num_inference_steps": 5}
    image = picture(90, 70)
    expected = edited(diffusers.FluxImg2ImgPipeline, checkpoint("dev"), values, image=image)
    assert_same(run(pipeline_of("dev"), values, RequestInputs(images=(image,))), *expected)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_masked_editing_matches_diffusers(
    strength: float, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values = BASE | {"strength": strength, "num_inference_steps": 4}
    image, mask = picture(64, 48), disc(64, 48)
    expected = edited(diffusers.FluxInpaintPipeline, checkpoint("schnell"), values, image=image, mask_image=mask)
    found = run(pipeline_of("schnell"), values, RequestInputs(images=(image,), mask=mask))
    assert_same(found, *expected)


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("kontext"), TINY_FLUXES["dev"], "FluxKontextPipeline")


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({"max_area": 64 * 48}, None),
        ({"max_area": 4096, "width": 96, "height": 32}, (80, 48)),
        ({"max_area": 2304, "auto_resize": False, "true_cfg_scale": 2.0, "negative_prompt": "star"}, (70, 50)),
    ],
)
def test_editing_by_instruction_matches_diffusers(
    change: dict[str, Any], size: tuple[int, int] | None, kontext: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The published sizes are a megapixel; these have their ratios.
    small = tuple((max(16, width // 16), max(16, height // 16)) for width, height in KONTEXT_SIZES)
    monkeypatch.setattr(flux_edit, "KONTEXT_SIZES", small)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", list(small))
    values = BASE | change
    images = {} if size is None else {"image": picture(*size)}
    theirs = {"_auto_resize" if key == "auto_resize" else key: value for key, value in values.items()}
    expected = edited(diffusers.FluxKontextPipeline, kontext, theirs, **images)
    inputs = RequestInputs(images=tuple(images.values()))
    assert_same(run(load(kontext), values, inputs), *expected)
    if images:
        in_bf16, _ = edited(diffusers.FluxKontextPipeline, kontext, theirs, torch.bfloat16, **images)
        rounded, _ = run(load(kontext, precision="bf16"), values, inputs)
        assert_close_in_bf16(rounded, in_bf16, expected[0])


def test_the_sizes_that_a_picture_is_brought_to_are_the_published_ones() -> None:
    assert list(KONTEXT_SIZES) == pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_painting_into_a_mask_matches_diffusers(strength: float, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY_FLUXES["dev"], transformer={"in_channels": 32 + 256, "out_channels": 16})
    directory = save_tiny_flux(tmp_path, recipe, "FluxFillPipeline")
    values = BASE | {"strength": strength, "num_inference_steps": 4, "guidance_scale": 30.0}
    image, mask = picture(80, 64), disc(80, 64)
    expected = edited(diffusers.FluxFillPipeline, directory, values, image=image, mask_image=mask)
    pipeline = load(directory)
    inputs = RequestInputs(images=(image,), mask=mask)
    assert_same(run(pipeline, values, inputs), *expected)
    if strength == 1.0:
        theirs, _ = edited(diffusers.FluxFillPipeline, directory, values, torch.bfloat16, image=image, mask_image=mask)
        rounded, _ = run(load(directory, precision="bf16"), values, inputs)
        assert_close_in_bf16(rounded, theirs, expected[0])
    other = (values | {"seed": 8, "num_inference_steps": 3}, RequestInputs(images=(picture(64, 48, 1),), mask=mask))
    [(together, _), _] = run_together(pipeline, [(values, inputs), other])
    assert relative_error(together.latents, expected[0]) <= LATENT_TOLERANCE


@pytest.mark.parametrize(
    ("hub_id", "steps", "guidance", "length"),
    [
        ("black-forest-labs/FLUX.1-dev", 28, 3.5, 512),
        ("black-forest-labs/FLUX.1-Krea-dev", 28, 3.5, 512),
        ("black-forest-labs/FLUX.1-schnell", 4, 0.0, 256),
        ("black-forest-labs/FLUX.1-Kontext-dev", 28, 3.5, 512),
    ],
)
def test_hub_ids_have_their_published_defaults(hub_id: str, steps: int, guidance: float, length: int) -> None:
    defaults = get_model_info(hub_id).defaults
    assert (defaults.width, defaults.height, defaults.num_frames) == (1024, 1024, 1)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (steps, guidance)
    assert (defaults.max_sequence_length, defaults.true_cfg_scale) == (length, 1.0)
