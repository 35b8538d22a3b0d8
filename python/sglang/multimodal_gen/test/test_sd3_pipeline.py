"""The Stable Diffusion 3 pipeline against diffusers' StableDiffusion3Pipeline, alone and sharing batches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import SizeTooLarge, UnsupportedModel
from sglang.multimodal_gen.registry import get_model_info, read_json_object
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.test.media import picture
from sglang.multimodal_gen.test.pipeline_parity import (
    as_uint8,
    assert_close_in_bf16,
    assert_same,
    load,
    relative_error,
    run,
    run_together,
)
from sglang.multimodal_gen.test.tiny_sd3 import TINY_SD3S, save_tiny_sd3

BASE: dict[str, Any] = {
    "prompt": "a red circle and a blue star",
    "width": 64,
    "height": 48,
    "num_inference_steps": 3,
    "guidance_scale": 7.0,
    "max_sequence_length": 24,
    "seed": 5,
}
# By checkpoint: sizes, steps, prompts that fit and that do not, with and without guidance.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "medium": [
        {},
        {"width": 48, "height": 96, "negative_prompt": "green square"},
        {"prompt": "moving " * 40, "guidance_scale": 0.0, "num_inference_steps": 1},
        {"max_sequence_length": 7, "guidance_scale": 1.0},
    ],
    "dual": [{"prompt": "a jazz star"}, {"width": 192, "height": 16, "num_inference_steps": 4}],
    "without_t5": [{"prompt": "small " * 30, "negative_prompt": "star"}],
    "dynamic": [{"width": 32, "height": 40, "seed": 2**40 + 1}],
}
CASES = [(name, number) for name, requests in REQUESTS.items() for number in range(len(requests))]
HUB_IDS = [
    ("stabilityai/stable-diffusion-3-medium-diffusers", 28, 7.0),
    ("stabilityai/stable-diffusion-3.5-medium", 40, 4.5),
    ("stabilityai/stable-diffusion-3.5-large", 28, 3.5),
    ("stabilityai/stable-diffusion-3.5-large-turbo", 4, 0.0),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sd3")
    return cache(lambda name: save_tiny_sd3(root / name, TINY_SD3S[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def reference(
    checkpoint: Path, values: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, 1, H, W] and frames [1, H, W, 3] of the same request."""
    # diffusers wants to be told of parts that may be absent.
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (checkpoint / name).exists()}
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        checkpoint, local_files_only=True, dtype=dtype, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in values.items() if key != "seed"}
    ratio = pipeline.vae_scale_factor
    shape = (1, pipeline.transformer.config.in_channels, values["height"] // ratio, values["width"] // ratio)
    # Drawn here in fp32, since the pipeline draws other numbers in other precisions.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(values["seed"]))

    def generate(output_type: str) -> Any:
        return pipeline(**arguments, latents=noise.clone(), output_type=output_type).images

    return generate("latent")[0].unsqueeze(1), as_uint8(generate("np"))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_latents_and_pictures_match_diffusers(
    name: str, number: int, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values = BASE | REQUESTS[name][number]
    assert_same(run(pipeline_of(name), values), *reference(checkpoint(name), values))


def edited(
    pipeline_class: Any, checkpoint: Path, values: dict[str, Any], **images: np.ndarray
) -> tuple[Tensor, np.ndarray]:
    """What a diffusers pipeline makes of pictures: latents [C, 1, H, W] and frames [1, H, W, 3]."""
    pipeline = pipeline_class.from_pretrained(checkpoint, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in values.items() if key != "seed"}
    arguments |= {name: Image.fromarray(array) for name, array in images.items()}

    def generate(output_type: str) -> Any:
        generator = torch.Generator().manual_seed(values["seed"])
        return pipeline(**arguments, generator=generator, output_type=output_type).images

    return generate("latent")[0].unsqueeze(1), as_uint8(generate("np"))


def test_image_to_image_matches_diffusers(checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | {"strength": 0.6, "num_inference_steps": 5}
    image = picture(64, 48)
    expected = edited(diffusers.StableDiffusion3Img2ImgPipeline, checkpoint("medium"), values, image=image)
    assert_same(run(pipeline_of("medium"), values, RequestInputs(images=(image,))), *expected)


def test_unequal_requests_share_forwards_and_stay_as_they_are(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("dual")
    wishes = [
        BASE,
        BASE | {"prompt": "star", "seed": 9, "guidance_scale": 1.0, "num_inference_steps": 5},
        BASE | {"guidance_scale": 3.0, "negative_prompt": "small", "num_inference_steps": 2},
    ]
    together = run_together(pipeline, [(values, EMPTY) for values in wishes])
    keys = {phase.batch_key for req, _ in together for phase in req.phases if phase.name == "denoise"}
    assert len(keys) == 1
    for values, (req, frames) in zip(wishes, together, strict=True):
        alone, alone_frames = run(pipeline, values)
        assert alone.latents is not None
        assert relative_error(req.latents, alone.latents) <= 1e-5
        assert np.abs(frames.astype(int) - alone_frames.astype(int)).max() <= 1


def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    directory = checkpoint("dual")
    exact, _ = run(pipeline_of("dual"), BASE)
    assert exact.latents is not None
    ours, _ = run(load(directory, precision="bf16"), BASE)
    theirs, _ = reference(directory, BASE, torch.bfloat16)
    assert_close_in_bf16(ours, theirs, exact.latents)


def test_sizes_outside_the_position_table_are_refused_at_admission(pipeline_of: Callable[[str], Any]) -> None:
    with pytest.raises(SizeTooLarge, match="got 208x16, accepted are at most 192 pixels along each side"):
        run(pipeline_of("medium"), BASE | {"width": 208, "height": 16})


@pytest.mark.parametrize(
    ("component", "source", "sentence"),
    [
        ("vae", "dynamic", "transformer.in_channels is 4, but vae.latent_channels wants 8"),
        ("text_encoder_2", "medium/text_encoder", "pooled_projection_dim is 24, but that of both CLIPs wants 16"),
    ],
)
def test_components_that_do_not_fit_together_are_refused(
    component: str, source: str, sentence: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    name, _, directory = source.partition("/")
    model = shutil.copytree(checkpoint("medium"), tmp_path / "model")
    shutil.rmtree(model / component)
    shutil.copytree(checkpoint(name) / (directory or component), model / component)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(model)


@pytest.mark.parametrize(("hub_id", "steps", "guidance"), HUB_IDS)
def test_hub_ids_have_their_published_defaults(hub_id: str, steps: int, guidance: float) -> None:
    defaults = get_model_info(hub_id).defaults
    assert (defaults.width, defaults.height, defaults.num_frames) == (1024, 1024, 1)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.max_sequence_length) == (
        steps,
        guidance,
        256,
    )
    scheduler = read_json_object(published_directory(hub_id) / "scheduler" / "scheduler_config.json")
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (3.0, False)
