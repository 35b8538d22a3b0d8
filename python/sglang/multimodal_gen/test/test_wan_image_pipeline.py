"""The Wan pipelines beyond plain text to video against diffusers': pictures, last pictures, experts, first frames."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    IncompatibleParameters,
    MissingParameter,
    UnsupportedModel,
    UnsupportedParameter,
)
from sglang.multimodal_gen.runtime.pipelines.wan_pictures import EMBEDS
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.state_file import write_state
from sglang.multimodal_gen.test.pipeline_parity import (
    LATENT_TOLERANCE,
    admitted,
    as_uint8,
    assert_close_in_bf16,
    assert_same,
    load,
    relative_error,
    run,
    run_together,
)
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, picture, save_tiny_wan_image

BASE: dict[str, Any] = {
    "prompt": "a red circle &amp; a  blue star",
    "negative_prompt": "green square",
    "width": 48,
    "height": 32,
    "num_frames": 5,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "seed": 5,
}
FIRST, LAST = picture(70, 50), picture(40, 90, seed=1)
# By checkpoint: which pictures, and what differs from the base.
CASES: list[tuple[str, dict[str, Image.Image], dict[str, Any]]] = [
    ("i2v", {"image": FIRST}, {"num_frames": 9}),
    ("i2v", {"image": LAST}, {"width": 32, "height": 64, "num_frames": 1, "guidance_scale": 1.0}),
    ("flf2v", {"image": FIRST, "last_image": LAST}, {}),
    ("i2v_experts", {"image": FIRST}, {"num_inference_steps": 5, "guidance_scale_2": 2.0}),
    (
        "i2v_experts",
        {"image": FIRST, "last_image": LAST},
        {"num_inference_steps": 2, "guidance_scale_2": 4.0},
    ),
    ("t2v_experts", {}, {"num_inference_steps": 6, "guidance_scale_2": 3.0}),
    ("t2v_experts", {}, {"num_inference_steps": 4, "guidance_scale_2": 1.0, "prompt": "moving " * 600}),
    ("t2v_experts", {}, {"num_inference_steps": 2, "guidance_scale": 1.0, "guidance_scale_2": 3.0, "num_frames": 1}),
    ("ti2v", {}, {"width": 64}),
    ("ti2v", {"image": FIRST}, {"width": 64, "num_frames": 9}),
    ("ti2v", {"image": LAST}, {"height": 64, "width": 32, "num_inference_steps": 2, "guidance_scale": 0.0}),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("wan")
    return cache(lambda name: save_tiny_wan_image(root / name, TINY_WAN_IMAGES[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def inputs_of(pictures: dict[str, Image.Image]) -> RequestInputs:
    """As a request carries them."""
    if not pictures:
        return EMPTY
    last = pictures.get("last_image")
    return RequestInputs(images=(np.asarray(pictures["image"]),), last_image=None if last is None else np.asarray(last))


def reference(
    directory: Path, values: dict[str, Any], pictures: dict[str, Image.Image], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, T, H, W] and frames [T, H, W, 3] of the same request."""
    name = "WanImageToVideoPipeline" if pictures else "WanPipeline"
    pipeline = getattr(diffusers, name).from_pretrained(directory, local_files_only=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in values.items() if key != "seed"}

    generator = torch.Generator().manual_seed(values["seed"])
    latents = pipeline(**arguments, **pictures, generator=generator, output_type="latent").frames
    mean, std = (
        torch.tensor(getattr(pipeline.vae.config, key)).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    video = pipeline.vae.decode((latents * std + mean).to(dtype), return_dict=False)[0]
    frames = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
    return latents[0], as_uint8(frames)


@pytest.mark.parametrize(("name", "pictures", "changes"), CASES)
def test_latents_and_frames_match_diffusers(
    name: str,
    pictures: dict[str, Image.Image],
    changes: dict[str, Any],
    checkpoint: Callable[[str], Path],
    pipeline_of: Callable[[str], Any],
) -> None:
    values = BASE | changes
    found = run(pipeline_of(name), values, inputs_of(pictures))
    assert_same(found, *reference(checkpoint(name), values, pictures))


COMPANY = {
    "seed": [5, 6, 7],
    "prompt": ["a red circle", "the small star on the left and right", "blue"],
    "num_inference_steps": [2, 3, 1],
    "guidance_scale": [4.0, 1.0, 2.5],
}


@pytest.mark.parametrize(
    ("name", "width", "pictures"),
    [
        ("i2v", 48, [{"image": FIRST}, {"image": LAST}, {"image": FIRST}]),
        ("i2v_experts", 48, [{"image": FIRST}, {"image": LAST, "last_image": FIRST}, {"image": LAST}]),
        ("ti2v", 64, [{"image": FIRST}, {}, {"image": LAST}]),
    ],
)
def test_unequal_requests_share_forwards_and_stay_as_they_are(
    name: str, width: int, pictures: list[dict[str, Image.Image]], pipeline_of: Callable[[str], Any]
) -> None:
    pipeline, base = pipeline_of(name), BASE | {"width": width, "output_type": "latent"}
    wishes = [
        (base | {key: of_each[number] for key, of_each in COMPANY.items()}, inputs_of(given))
        for number, given in enumerate(pictures)
    ]
    together = run_together(pipeline, wishes)
    first_phases = {next(phase for phase in req.phases if phase.name == "denoise").batch_key for req, _ in together}
    assert len(first_phases) == 1
    for (values, inputs), (req, _) in zip(wishes, together, strict=True):
        alone, _ = run(pipeline, values, inputs)
        assert alone.latents is not None
        assert relative_error(req.latents, alone.latents) <= 1e-5


def denoising(pipeline: Any, **changes: Any) -> dict[str, int]:
    """Steps of each denoising phase."""
    req = pipeline.admit("request", SamplingParams.from_values(BASE | changes))
    return {phase.name: phase.units for phase in req.phases if phase.lane == "denoise"}


def test_each_expert_has_its_own_phase_and_batches(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("t2v_experts")
    # The boundary is at 875 of 1000; with this shift timesteps fall slowly at first.
    assert denoising(pipeline, num_inference_steps=6) == {"denoise": 4, "denoise_2": 2}
    assert denoising(pipeline, num_inference_steps=6, boundary_ratio=0.0) == {"denoise": 6}
    assert denoising(pipeline, num_inference_steps=6, boundary_ratio=1.0) == {"denoise_2": 6}
    req = pipeline.admit("request", SamplingParams.from_values(BASE | {"num_inference_steps": 6}))
    assert len({phase.batch_key for phase in req.phases}) == len(req.phases)


def test_a_boundary_of_the_request_moves_the_steps_to_the_other_expert(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values = BASE | {"guidance_scale": 2.0, "guidance_scale_2": 3.0, "num_frames": 1}
    moved, _ = run(pipeline_of("t2v_experts"), values | {"boundary_ratio": 1.0})
    directory = checkpoint("t2v_experts")
    pipeline = diffusers.WanPipeline.from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(boundary_ratio=1.0)
    arguments = {key: value for key, value in values.items() if key != "seed"}
    generator = torch.Generator().manual_seed(values["seed"])
    expected = pipeline(**arguments, generator=generator, output_type="latent").frames[0]
    assert relative_error(moved.latents, expected) <= LATENT_TOLERANCE


def test_a_second_scale_of_one_leaves_out_the_negative_prompt(pipeline_of: Callable[[str], Any]) -> None:
    pipeline, rows = pipeline_of("t2v_experts"), []
    handle = pipeline.transformer_2.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    for scale in (1.0, 2.0):
        run(
            pipeline,
            BASE | {"num_inference_steps": 4, "guidance_scale_2": scale, "num_frames": 1, "output_type": "latent"},
        )
    handle.remove()
    assert rows == [1, 2], "the last of four steps is the second expert's"


def test_equal_pictures_are_encoded_once(pipeline_of: Callable[[str], Any]) -> None:
    pipeline, calls = pipeline_of("i2v"), []
    fresh, values = picture(30, 30, seed=9), BASE | {"num_inference_steps": 1, "output_type": "latent"}
    handles = [
        module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        for module in (pipeline.image_encoder, pipeline.vae.encoder)
    ]
    first, _ = run(pipeline, values, inputs_of({"image": fresh}))
    assert sorted(set(calls)) == ["CLIPVisionModel", "WanEncoder"]
    calls.clear()
    again, _ = run(pipeline, values | {"prompt": "star"}, inputs_of({"image": fresh}))
    assert not calls
    run(pipeline, values | {"width": 32}, inputs_of({"image": fresh}))
    for handle in handles:
        handle.remove()
    assert set(calls) == {"WanEncoder"}, "another size is another clip of the same picture"
    for name, tensor in first.conditioning.items():
        assert torch.equal(tensor, again.conditioning[name])


@pytest.mark.parametrize("name", ["i2v", "flf2v"])
def test_keys_and_values_of_pictures_are_kept_and_reckoned(name: str, pipeline_of: Callable[[str], Any]) -> None:
    pictures = {"image": FIRST} | ({"last_image": LAST} if name == "flf2v" else {})
    pipeline = pipeline_of(name)
    denoiser = next(stage.denoiser for stage in pipeline.stages if stage.name == "denoise")
    [req] = admitted(pipeline, [(BASE | {"prompt": "moving " * 600}, inputs_of(pictures))])
    while req.done("denoise") < 1:
        pipeline.run_unit(next(phase.name for phase in req.phases if req.done(phase.name) < phase.units), [req])
    values = next(text.values for text in req.embedded_texts if text.embeds is req.text.embeds)
    assert values.shape[-2] == req.conditioning[EMBEDS].shape[0] + denoiser.num_text_tokens(req)
    kept = denoiser.held_bytes(req)
    req.embeds_ahead = False
    assert kept - denoiser.held_bytes(req) == values.nbytes


def test_the_first_frame_stays_the_picture(pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | {"width": 64, "output_type": "latent"}
    req, _ = run(pipeline_of("ti2v"), values, inputs_of({"image": FIRST}))
    assert req.latents is not None
    assert torch.equal(req.latents[:, :1], req.conditioning["picture_condition"])


def test_a_saved_request_goes_on_without_encoding_again(pipeline_of: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline, inputs = pipeline_of("i2v"), inputs_of({"image": FIRST})
    values = SamplingParams.from_values(BASE | {"output_type": "latent"})
    expected, _ = run(pipeline, BASE | {"output_type": "latent"}, inputs)
    req = pipeline.admit("request", values, inputs)
    for name in ("text_encode", "picture_embed", "picture_encode", "denoise"):
        pipeline.run_unit(name, [req])
    write_state(tmp_path / "state", pipeline.saved_state(req), identity=pipeline.state_identity(req))
    resumed = pipeline.admit("request", values, inputs)
    pipeline.restore(resumed, tmp_path / "state")
    for _ in range(2):
        pipeline.run_unit("denoise", [resumed])
    assert torch.equal(resumed.latents, expected.latents)


@pytest.mark.parametrize(
    ("name", "pictures", "changes", "error", "sentence"),
    [
        ("i2v", {}, {}, MissingParameter, "image_path: got nothing, accepted is one image"),
        (
            "i2v",
            {"image": FIRST, "last_image": LAST},
            {},
            UnsupportedParameter,
            "last_image_path: .*text and one image",
        ),
        ("flf2v", {"image": FIRST}, {}, MissingParameter, "last_image_path: got nothing"),
        (
            "i2v_experts",
            {"image": FIRST, "last_image": LAST},
            {"num_frames": 1},
            IncompatibleParameters,
            "last_image_path: one frame has no end",
        ),
        ("t2v_experts", {"image": FIRST}, {}, IncompatibleParameters, "image_path: .*num_frames 1"),
        (
            "ti2v",
            {},
            {"width": 64, "guidance_scale_2": 2.0},
            UnsupportedParameter,
            "guidance_scale_2: .*has no use for it",
        ),
        ("ti2v", {}, {"width": 64, "boundary_ratio": 0.5}, UnsupportedParameter, "boundary_ratio: .*has no use for it"),
        ("ti2v", {"image": FIRST, "last_image": LAST}, {"width": 64}, UnsupportedParameter, "last_image_path"),
    ],
)
def test_pictures_that_the_checkpoint_does_not_take_are_refused(
    name: str,
    pictures: dict[str, Image.Image],
    changes: dict[str, Any],
    error: type[Exception],
    sentence: str,
    pipeline_of: Callable[[str], Any],
) -> None:
    with pytest.raises(error, match=sentence):
        pipeline_of(name).admit("request", SamplingParams.from_values(BASE | changes), inputs_of(pictures))


def test_a_result_without_a_size_takes_the_pictures_shape(pipeline_of: Callable[[str], Any]) -> None:
    rule = pipeline_of("i2v").limits().size_from_image
    assert rule.size(1000, 500, area=100_000) == (448, 224)
    assert (rule.area, rule.multiple) == (832 * 480, 16)
    assert pipeline_of("ti2v").limits().size_from_image.multiple == 32
    assert pipeline_of("t2v_experts").limits().size_from_image is None


def test_an_image_encoder_named_as_on_the_hub_is_the_same(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any], tmp_path: Path
) -> None:
    """Published files have another prefix than those that transformers writes today."""
    directory = tmp_path / "hub"
    shutil.copytree(checkpoint("i2v"), directory)
    path = directory / "image_encoder" / "model.safetensors"
    tensors = {f"vision_model.{key}": tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    ours, expected = load(directory).image_encoder.state_dict(), pipeline_of("i2v").image_encoder.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "file", "change", "sentence"),
    [
        ("i2v", "model_index.json", {"image_encoder": [None, None]}, "no image_encoder or no image_processor"),
        ("i2v", "model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio: 0.9; accepted is a ratio with transf"),
        ("i2v_experts", "model_index.json", {"boundary_ratio": None}, "boundary_ratio: None"),
        (
            "ti2v",
            "model_index.json",
            {"expand_timesteps": False, "_class_name": "WanImageToVideoPipeline"},
            "twice vae",
        ),
    ],
)
def test_checkpoints_whose_parts_do_not_fit_are_refused(
    name: str, file: str, change: dict[str, Any], sentence: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tmp_path / "changed"
    shutil.copytree(checkpoint(name), directory)
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedModel, match=sentence):
        load(directory)


@pytest.mark.parametrize(
    ("name", "pictures"), [("i2v", {"image": FIRST}), ("ti2v", {"image": FIRST}), ("t2v_experts", {})]
)
def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    name: str,
    pictures: dict[str, Image.Image],
    checkpoint: Callable[[str], Path],
    pipeline_of: Callable[[str], Any],
) -> None:
    values = BASE | {"num_inference_steps": 4, "width": 64}
    exact, _ = run(pipeline_of(name), values | {"output_type": "latent"}, inputs_of(pictures))
    assert exact.latents is not None
    ours, _ = run(load(checkpoint(name), precision="bf16"), values | {"output_type": "latent"}, inputs_of(pictures))
    theirs, _ = reference(checkpoint(name), values, pictures, torch.bfloat16)
    assert_close_in_bf16(ours, theirs, exact.latents)
