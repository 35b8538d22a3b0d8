"""The Stable Diffusion 3 pipeline against diffusers' StableDiffusion3Pipeline, alone and sharing batches."""

from __future__ import annotations

import inspect
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
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidRequest, SizeTooLarge, UnsupportedModel
from sglang.multimodal_gen.registry import get_model_info, read_json_object
from sglang.multimodal_gen.runtime.pipelines_core.guidance import SkipLayerGuidance
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
# By checkpoint: sizes, steps, prompts that fit and that do not, with and without guidance; then the fields of its own.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "medium": [
        {},
        {"width": 48, "height": 96, "negative_prompt": "green square"},
        {"prompt": "moving " * 40, "guidance_scale": 0.0, "num_inference_steps": 1},
        {"max_sequence_length": 7, "guidance_scale": 1.0},
        {"clip_skip": 1, "negative_prompt": "green square"},
        {"clip_skip": 0},
        {"skip_guidance_layers": [1], "num_inference_steps": 12},  # the default interval holds steps 1 and 2
        {"skip_guidance_layers": [1], "guidance_scale": 1.0},
        {"skip_guidance_layers": [2, 0, 1], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": 0.0},
    ],
    "dual": [
        {"prompt": "a jazz star"},
        {"width": 192, "height": 16, "num_inference_steps": 4},
        {
            "skip_guidance_layers": [2, 0],
            "skip_layer_guidance_scale": 1.5,
            # Steps 1 and 4 lie on the ends of the interval, and so outside.
            "skip_layer_guidance_start": 0.2,
            "skip_layer_guidance_stop": 0.8,
            "num_inference_steps": 5,
            "negative_prompt": "small",
        },
    ],
    "without_t5": [{"prompt": "small " * 30, "negative_prompt": "star"}, {"clip_skip": 1, "guidance_scale": 0.0}],
    "dynamic": [{"width": 32, "height": 40, "seed": 2**40 + 1}, {"mu": 1.9}, {"mu": -0.5, "num_inference_steps": 2}],
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


SKIPPING: dict[str, Any] = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}


def test_requests_that_skip_layers_share_forwards_with_others_and_stay_as_they_are(
    pipeline_of: Callable[[str], Any],
) -> None:
    pipeline = pipeline_of("dual")
    wishes = [
        BASE | SKIPPING,
        BASE | {"prompt": "star", "seed": 9, "negative_prompt": "small"},
        BASE | SKIPPING | {"skip_guidance_layers": [0, 2], "skip_layer_guidance_scale": 0.7, "num_inference_steps": 5},
        BASE | {"seed": 2, "guidance_scale": 1.0, "clip_skip": 1},
        BASE | {"clip_skip": 1},
    ]
    together = run_together(pipeline, [(values, EMPTY) for values in wishes])
    for name in ("text_encode", "denoise"):
        assert len({phase.batch_key for req, _ in together for phase in req.phases if phase.name == name}) == 1
    for values, (req, _) in zip(wishes, together, strict=True):
        alone, _ = run(pipeline, values)
        assert alone.latents is not None
        assert relative_error(req.latents, alone.latents) <= 1e-5


def test_the_further_forward_counts_as_memory_and_can_run_alone(
    pipeline_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of("medium")
    stage = next(stage for stage in pipeline.stages if stage.name == "denoise")

    def peak(**changes: Any) -> int:
        req = pipeline.admit("r", SamplingParams.from_values(BASE | changes))
        return next(phase.peak_bytes for phase in req.phases if phase.name == "denoise")

    row = peak(guidance_scale=1.0)
    assert (peak(), peak(**SKIPPING)) == (2 * row, 3 * row)
    # Where the further forward never comes, it takes nothing.
    assert peak(**SKIPPING, guidance_scale=1.0) == row
    assert peak(**SKIPPING, num_inference_steps=1) == peak(**SKIPPING, skip_layer_guidance_scale=0.0) == 2 * row
    usual, _ = run(pipeline, BASE | SKIPPING)
    monkeypatch.setattr(stage, "free_bytes", lambda: 2 * row)
    small, _ = run(pipeline, BASE | SKIPPING)
    assert small.max_forward_rows == 1 and peak(**SKIPPING) == row
    assert usual.latents is not None
    assert relative_error(small.latents, usual.latents) <= 1e-5


def test_steps_outside_the_guided_interval_skip_nothing(pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | {"cfg_interval_start": 0.5, "num_inference_steps": 4}
    plain, _ = run(pipeline_of("medium"), values)
    early, _ = run(pipeline_of("medium"), values | SKIPPING | {"skip_layer_guidance_stop": 0.5})
    late, _ = run(pipeline_of("medium"), values | SKIPPING)
    assert plain.latents is not None and early.latents is not None and late.latents is not None
    assert torch.equal(early.latents, plain.latents)
    assert relative_error(late.latents, plain.latents) > 1e-3


def test_guidance_without_layers_is_rescaled_with_the_rest(pipeline_of: Callable[[str], Any]) -> None:
    wish = SamplingParams.from_values(BASE | SKIPPING | {"guidance_rescale": 1.0})
    req = pipeline_of("medium").admit("r", wish)
    conditional, *others = torch.randn(3, 4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = SkipLayerGuidance(3).combine([conditional, *others], req)
    guided = others[0] + 7.0 * (conditional - others[0]) + 2.8 * (conditional - others[1])
    torch.testing.assert_close(found, guided * (conditional.std() / guided.std()))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"guidance_scale": 1.0}, "skip_guidance_layers changes nothing at a guidance_scale of 1 or less"),
        ({"num_inference_steps": 1}, "no step lies strictly between 0.01 and 0.9 of the way"),
        # An image to start from leaves the later steps only.
        (
            {"strength": 0.5, "num_inference_steps": 10, "skip_layer_guidance_stop": 0.5},
            "no step lies strictly between",
        ),
    ],
)
def test_a_result_says_where_skipped_layers_change_nothing(
    changes: dict[str, Any], note: str, pipeline_of: Callable[[str], Any]
) -> None:
    inputs = RequestInputs(images=(picture(64, 48),)) if "strength" in changes else EMPTY
    req = pipeline_of("medium").admit("r", SamplingParams.from_values(BASE | SKIPPING | changes), inputs)
    assert [text for text in req.notes if note in text]
    for expected in ({}, {"skip_layer_guidance_scale": 0.0}):  # as asked
        req = pipeline_of("medium").admit("r", SamplingParams.from_values(BASE | SKIPPING | expected))
        assert req.notes == []


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clip_skip": -1}, "clip_skip: got -1, accepted is an integer from 0 to 100"),
        ({"clip_skip": 2}, "clip_skip: got 2, accepted is an integer from 0 to 1 for this model"),
        ({"mu": 0.8}, "mu: got 0.8, but this model's shift is flow_shift, .* leave mu unset"),
        ({"mu": NAN}, "mu: got nan, accepted is a finite number: a number from -10 to 10"),
        ({"mu": 11}, "mu: got 11.0, accepted is a number from -10 to 10"),
        ({"skip_guidance_layers": 1}, "skip_guidance_layers: got 1, accepted is a list of integers from 0 to 1000"),
        ({"skip_guidance_layers": []}, r"skip_guidance_layers: got \[\], accepted is a list with at least one value"),
        ({"skip_guidance_layers": [1, -1]}, "skip_guidance_layers: got -1, accepted is a list of integers from 0"),
        ({"skip_guidance_layers": [1.0]}, "skip_guidance_layers: got 1.0, accepted is a list of integers"),
        (
            {"skip_guidance_layers": [1, 3]},
            r"skip_guidance_layers: got \[1, 3\], accepted is layers from 0 to 2 for this model",
        ),
        ({"skip_guidance_layers": [1, 1]}, r"skip_guidance_layers: got \[1, 1\], accepted is each layer once"),
        ({"skip_layer_guidance_scale": NAN}, "skip_layer_guidance_scale: got nan, accepted is a finite number"),
        ({"skip_layer_guidance_scale": -1}, "skip_layer_guidance_scale: got -1.0, accepted is a number from 0"),
        ({"skip_layer_guidance_start": -0.1}, "skip_layer_guidance_start: got -0.1, accepted is a number from 0 to 1"),
        ({"skip_layer_guidance_stop": 1.5}, "skip_layer_guidance_stop: got 1.5, accepted is a number from 0 to 1"),
        (
            {"skip_layer_guidance_start": 0.5},
            "skip_layer_guidance_start: got 0.5, accepted is less than skip_layer_guidance_stop, which is 0.2",
        ),
        (
            {"skip_layer_guidance_start": 0.5, "skip_layer_guidance_stop": 0.5},
            "skip_layer_guidance_start: got 0.5, accepted is less than skip_layer_guidance_stop, which is 0.5",
        ),
    ],
)
def test_fields_that_cannot_be_met_are_refused_at_admission(
    changes: dict[str, Any], sentence: str, pipeline_of: Callable[[str], Any]
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{sentence}") as caught:
        pipeline_of("medium").admit("r", SamplingParams.from_values(BASE | changes))
    assert caught.value.param in changes


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
    theirs = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__).parameters
    for name in ("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"):
        assert getattr(defaults, name) == theirs[name].default
    scheduler = read_json_object(published_directory(hub_id) / "scheduler" / "scheduler_config.json")
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (3.0, False)
