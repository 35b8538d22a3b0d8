"""The LTX-Video pipelines against diffusers' classes, alone and sharing batches."""

from __future__ import annotations

import inspect
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from torch import Tensor, nn

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    FramesNotSupported,
    IncompatibleParameters,
    InvalidRequest,
    InvalidValue,
    MissingParameter,
    SizeNotDivisible,
    UnsupportedModel,
    UnsupportedParameter,
)
from sglang.multimodal_gen.errors_media import TooManyImages
from sglang.multimodal_gen.registry import get_model_info, load_config
from sglang.multimodal_gen.runtime.models.vaes.ltx_vae import LTXClip
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import unpack
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.state_file import write_state
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, ModelArgs
from sglang.multimodal_gen.test.pipeline_parity import (
    as_uint8,
    assert_close_in_bf16,
    assert_same,
    load,
    relative_error,
    run,
    run_together,
)
from sglang.multimodal_gen.test.tiny_ltx import TINY_LTXS, TinyLTX, save_tiny_ltx

BASE: dict[str, Any] = {
    "prompt": "a red circle and a blue star",
    "width": 64,
    "height": 32,
    "num_frames": 9,
    "fps": 25,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": 24,
    "seed": 5,
}
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
CLIP = np.random.default_rng(1).integers(0, 256, (7, 32, 64, 3), dtype=np.uint8)
ONE_IMAGE = RequestInputs(images=(PICTURE,))
VIDEO = RequestInputs(video=CLIP)
ENDS = RequestInputs(images=(PICTURE,), last_image=PICTURE[::-1, ::-1])
LAST = RequestInputs(last_image=PICTURE)
LONG = RequestInputs(
    video=np.random.default_rng(2).integers(0, 256, (14, 32, 64, 3), dtype=np.uint8), last_image=PICTURE
)
# By checkpoint: sizes, lengths, steps, guidance, frame rates, prompt lengths and what the clip begins with.
REQUESTS: dict[str, list[tuple[dict[str, Any], RequestInputs]]] = {
    "first": [
        ({"negative_prompt": "green square", "guidance_rescale": 0.7, "num_inference_steps": 4}, EMPTY),
        ({"width": 32, "height": 64, "num_frames": 1, "guidance_scale": 1.0, "fps": 8}, EMPTY),
        ({"num_frames": 5, "width": 32, "fps": 50}, ONE_IMAGE),
    ],
    "timed": [
        ({"prompt": "moving " * 40, "num_frames": 13, "decode_timestep": 0.3, "decode_noise_scale": 0.2}, EMPTY),
        ({"guidance_rescale": 0.3, "negative_prompt": "", "max_sequence_length": 8, "decode_timestep": 0.1}, ONE_IMAGE),
    ],
    "wide": [({"width": 96, "seed": 2**40 + 1, "guidance_scale": 7.5}, EMPTY)],
    "unshifted": [({"num_inference_steps": 5}, EMPTY)],
    "image": [({"width": 32, "guidance_scale": 1.0}, ONE_IMAGE)],
    "condition": [
        ({"guidance_scale": 1.0, "num_inference_steps": 6, "fps": 12, "decode_timestep": 0.05}, EMPTY),
        ({"num_inference_steps": 4, "guidance_rescale": 0.5, "decode_noise_scale": 0.025}, ONE_IMAGE),
        ({"num_frames": 13, "negative_prompt": "small", "image_cond_noise_scale": 0.4}, VIDEO),
        ({"num_frames": 5, "image_cond_noise_scale": 0.0}, VIDEO),
        ({"num_frames": 13, "guidance_rescale": 0.6, "fps": 10, "decode_timestep": 0.2}, ENDS),
        ({"image_cond_noise_scale": 0.0, "guidance_scale": 1.0}, LAST),
        ({"num_frames": 13, "frame_index": 4, "strength": 0.5, "decode_noise_scale": 0.1}, ENDS),
        ({"strength": 0.3, "num_inference_steps": 6, "image_cond_noise_scale": 0.4, "decode_timestep": 0.2}, VIDEO),
        ({"num_frames": 17, "frame_index": 5, "strength": 0.8, "num_inference_steps": 5}, LONG),
        ({"num_frames": 17, "frame_index": 3, "denoise_strength": 0.7, "num_inference_steps": 6}, LONG),
        ({"num_frames": 9, "frame_index": 8, "fps": 10}, VIDEO),
        ({"denoise_strength": 0.5, "num_inference_steps": 5}, EMPTY),
        ({"strength": 0.6, "guidance_scale": 1.0}, LAST),
    ],
}
CASES = [(name, number) for name, requests in REQUESTS.items() for number in range(len(requests))]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("ltx")
    return cache(lambda name: save_tiny_ltx(root / name, TINY_LTXS[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def reference_class(name: str, inputs: RequestInputs) -> str:
    """diffusers has a class for each task where we have one for each kind of checkpoint."""
    if TINY_LTXS[name].pipeline == "LTXConditionPipeline":
        return "LTXConditionPipeline"
    return "LTXImageToVideoPipeline" if inputs.images else "LTXPipeline"


def reference(
    directory: Path,
    name: str,
    values: dict[str, Any],
    inputs: RequestInputs,
    *,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, T, h, w] and frames [T, H, W, 3] uint8 of the same request."""
    cls = getattr(diffusers, reference_class(name, inputs))
    pipeline = cls.from_pretrained(directory, local_files_only=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    given = {"frame_index", "strength"}  # of each condition
    arguments = {key: value for key, value in values.items() if key not in {"seed", "fps"} | given}
    if cls is diffusers.LTXImageToVideoPipeline:
        arguments["image"] = Image.fromarray(inputs.images[0])
    elif inputs is not EMPTY:
        arguments["conditions"] = conditions(inputs, values)
    packed: list[Tensor] = []

    def keep(_: Any, step: int, timestep: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
        packed[:] = [found["latents"]]
        return found

    with warnings.catch_warnings():
        # NumPy warns of how diffusers hands it a tensor of timesteps.
        warnings.simplefilter("ignore", DeprecationWarning)
        frames = pipeline(
            **(arguments | changes),
            frame_rate=values["fps"],
            generator=torch.Generator().manual_seed(values["seed"]),
            callback_on_step_end=keep,
            output_type="np",
        ).frames[0]
    space, time = pipeline.vae_spatial_compression_ratio, pipeline.vae_temporal_compression_ratio
    grid = ((values["num_frames"] - 1) // time + 1, values["height"] // space, values["width"] // space)
    own = packed[0][:, -math.prod(grid) :]  # behind the tokens of a last picture
    return unpack(own, grid, 1)[0], as_uint8(frames)


def conditions(inputs: RequestInputs, values: dict[str, Any]) -> list[Any]:
    """As diffusers is told them."""
    strength = values.get("strength", 1.0)
    place = {"frame_index": values.get("frame_index", 0), "strength": strength}
    found = [LTXVideoCondition(image=Image.fromarray(image), **place) for image in inputs.images]
    if inputs.video is not None:
        found.append(LTXVideoCondition(video=[Image.fromarray(frame) for frame in inputs.video], **place))
    if inputs.last_image is not None:
        last = {"frame_index": values["num_frames"] - 1, "strength": strength}
        found.append(LTXVideoCondition(image=Image.fromarray(inputs.last_image), **last))
    return found


@pytest.mark.parametrize(("name", "number"), CASES)
def test_latents_and_frames_match_diffusers(
    name: str, number: int, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    changes, inputs = REQUESTS[name][number]
    values = BASE | changes
    assert_same(run(pipeline_of(name), values, inputs), *reference(checkpoint(name), name, values, inputs))


def test_a_distilled_model_runs_at_its_own_noise_levels(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    config = load_config(get_model_info("Lightricks/LTX-Video-0.9.8-13B-distilled").entry)
    pipeline = pipeline_of("condition")
    distilled = type(pipeline)(
        name="distilled",
        config=config,
        defaults=config.defaults,
        placement=pipeline.placement,
        components={name: getattr(pipeline, name) for name in pipeline.components},
    )
    values = BASE | {"num_inference_steps": 8, "guidance_scale": 1.0}
    timesteps = [1000, 993, 987, 981, 975, 909, 725, 0.03]
    expected = reference(
        checkpoint("condition"),
        "condition",
        values,
        ONE_IMAGE,
        timesteps=timesteps,
        image_cond_noise_scale=0.0,
        decode_timestep=0.05,
        decode_noise_scale=0.025,
    )
    assert_same(run(distilled, values, ONE_IMAGE), *expected)


@pytest.mark.parametrize(
    ("name", "inputs"), [("timed", (ONE_IMAGE, EMPTY, ONE_IMAGE)), ("condition", (VIDEO, EMPTY, ONE_IMAGE))]
)
def test_unequal_requests_share_forwards_and_stay_as_they_are(
    name: str, inputs: tuple[RequestInputs, ...], pipeline_of: Callable[[str], Any]
) -> None:
    pipeline = pipeline_of(name)
    values = [
        BASE | {"decode_timestep": 0.2},
        BASE | {"prompt": "star", "seed": 9, "guidance_scale": 1.0, "num_inference_steps": 5},
        BASE | {"negative_prompt": "small", "num_inference_steps": 2, "max_sequence_length": 12},
    ]
    wishes = list(zip(values, inputs, strict=True))
    seen: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[0]))
    together = run_together(pipeline, wishes)
    hook.remove()
    assert seen[0] == 5, "two guided requests and one without guidance"
    for wish, (req, frames) in zip(wishes, together, strict=True):
        alone, alone_frames = run(pipeline, *wish)
        assert alone.latents is not None
        assert relative_error(req.latents, alone.latents) <= 1e-5
        assert np.abs(frames.astype(int) - alone_frames.astype(int)).max() <= 1


def test_clips_of_other_frame_rates_share_no_forward(pipeline_of: Callable[[str], Any]) -> None:
    """The frame rate says where frames stand in time, and so is a part of what the model sees."""
    keys = [
        {phase.batch_key for phase in admitted(pipeline_of("first"), {"fps": fps}).phases if phase.name == "denoise"}
        for fps in (24, 25, 25)
    ]
    assert keys[0] != keys[1] == keys[2]


def admitted(pipeline: Any, changes: dict[str, Any], inputs: RequestInputs = EMPTY) -> Req:
    return pipeline.admit("request", SamplingParams.from_values(BASE | changes), inputs)


def finish(pipeline: Any, req: Req) -> list[Any]:
    """Run what is left of a request."""
    outputs = []
    for phase in req.phases:
        while req.done(phase.name) < phase.units:
            outputs += pipeline.run_unit(phase.name, [req])
    return outputs


def test_a_request_goes_on_from_a_saved_state_with_the_same_bits(
    tmp_path: Path, pipeline_of: Callable[[str], Any]
) -> None:
    """Noise for given frames is drawn before every step, and for the decoder after the last one."""
    pipeline = pipeline_of("condition")
    changes = {"num_inference_steps": 4, "decode_noise_scale": 0.3}
    whole, expected = run(pipeline, BASE | changes, ENDS)
    req = admitted(pipeline, changes, ENDS)
    for phase, units in (("text_encode", 1), ("image_encode", 1), ("denoise", 2)):
        for _ in range(units):
            pipeline.run_unit(phase, [req])
    write_state(tmp_path / "state", pipeline.saved_state(req), identity=pipeline.state_identity(req))
    again = admitted(pipeline, changes, ENDS)
    pipeline.restore(again, tmp_path / "state")
    [output] = finish(pipeline, again)
    assert whole.latents is not None and again.latents is not None
    assert torch.equal(again.latents, whole.latents)
    assert np.array_equal(output.frames.numpy(), expected)


def test_a_unit_that_fails_draws_nothing_twice(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("condition")
    changes = {"decode_noise_scale": 0.3}
    whole, expected = run(pipeline, BASE | changes, ENDS)
    failures = [pipeline.vae.encoder, pipeline.transformer, pipeline.transformer, pipeline.vae.decoder]

    def fail(module: nn.Module, _: Any) -> None:
        if module in failures:
            failures.remove(module)
            raise MemoryError

    hooks = [module.register_forward_pre_hook(fail) for module in set(failures)]
    req = admitted(pipeline, changes, ENDS)
    outputs: list[Any] = []
    while not outputs:
        try:
            outputs = finish(pipeline, req)
        except MemoryError:
            continue
    for hook in hooks:
        hook.remove()
    assert not failures
    assert whole.latents is not None and req.latents is not None
    assert torch.equal(req.latents, whole.latents)
    assert np.array_equal(outputs[0].frames.numpy(), expected)


def test_a_decoder_with_random_numbers_of_its_own_obeys_the_seed(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("noisy")
    _, first = run(pipeline, BASE)
    state = torch.random.get_rng_state()
    _, again = run(pipeline, BASE)
    assert np.array_equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state), "the process's own generator stays as it was"


def test_tiles_are_told_the_timestep_too(pipeline_of: Callable[[str], Any]) -> None:
    autoencoder = pipeline_of("timed").vae
    latents = torch.randn(1, 8, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0.4])
    whole = autoencoder.decode_next(latents, LTXClip(None, timesteps))
    tiling = Tiling(tile_height=32, tile_width=48, stride_height=32, stride_width=16)
    tiled = autoencoder.decode_next(latents, LTXClip(tiling, timesteps))
    assert tiled.shape == whole.shape == (1, 3, 5, 32, 64)
    # The left quarter comes from one tile, whose right edge is hardly felt there.
    torch.testing.assert_close(tiled[..., :8], whole[..., :8], rtol=0, atol=2e-2)
    untimed = autoencoder.decode_next(latents, LTXClip(tiling, torch.zeros(1)))
    assert (untimed - tiled)[..., :8].abs().max() > 0.2


def test_random_weights_need_the_configs_alone(tmp_path: Path) -> None:
    directory = save_tiny_ltx(tmp_path / "checkpoint", TINY_LTXS["condition"])
    shutil.rmtree(directory / "tokenizer")
    for path in directory.rglob("*.safetensors"):
        path.unlink()
    model = ModelArgs(model_path=str(directory), random_weights=True)
    pipeline = build_pipeline(model, ExecutionArgs(device="cpu", precision="fp32"))
    req, frames = run(pipeline, BASE, ONE_IMAGE)
    assert req.latents is not None
    assert 0.1 < req.latents.std() < 10
    assert frames.std() > 5


@pytest.mark.parametrize("name", ["timed", "condition", "image"])
def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    name: str, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    directory = checkpoint(name)
    exact, _ = run(pipeline_of(name), BASE, ONE_IMAGE)
    assert exact.latents is not None
    ours, _ = run(load(directory, precision="bf16"), BASE, ONE_IMAGE)
    theirs, _ = reference(directory, name, BASE, ONE_IMAGE, dtype=torch.bfloat16)
    assert_close_in_bf16(ours, theirs, exact.latents)


@pytest.mark.parametrize(
    ("name", "changes", "inputs", "error", "sentence"),
    [
        ("image", {}, EMPTY, MissingParameter, "got nothing, accepted is one image"),
        ("first", {}, VIDEO, UnsupportedParameter, "the model works from text and one image"),
        ("first", {}, RequestInputs(images=(PICTURE, PICTURE)), TooManyImages, "got 2 images, accepted is one image"),
        ("first", {}, LAST, UnsupportedParameter, "the model works from text and one image"),
        ("condition", {}, RequestInputs(mask=PICTURE[..., 0]), UnsupportedParameter, "image, a last image and a video"),
        ("condition", {}, RequestInputs(images=(PICTURE,), video=CLIP), IncompatibleParameters, "got both"),
        ("condition", {"frame_index": 0}, LAST, IncompatibleParameters, "accepted is frame_index with an image"),
        (
            "condition",
            {"frame_index": 9},
            ONE_IMAGE,
            InvalidValue,
            "got 9, accepted is a frame from 0 to 8",
        ),
        ("condition", {"denoise_strength": 0.3}, EMPTY, InvalidValue, "leaves a step of num_inference_steps 3"),
        ("first", {"frame_index": 1}, ONE_IMAGE, UnsupportedParameter, "frame_index"),
        ("first", {"num_frames": 10}, EMPTY, FramesNotSupported, "num_frames"),
        ("first", {"width": 36}, EMPTY, SizeNotDivisible, "36x32"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    name: str,
    changes: dict[str, Any],
    inputs: RequestInputs,
    error: type[InvalidRequest],
    sentence: str,
    pipeline_of: Callable[[str], Any],
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        admitted(pipeline_of(name), changes, inputs)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (TinyLTX(transformer={"in_channels": 6}), "transformer.in_channels is 6, but vae.latent_channels wants 8"),
        (TinyLTX(pipeline="LTXConditionPipeline"), "scheduler.use_dynamic_shifting is True, accepted is False"),
    ],
)
def test_checkpoints_whose_parts_do_not_fit_are_refused(recipe: TinyLTX, sentence: str, tmp_path: Path) -> None:
    directory = save_tiny_ltx(tmp_path / "checkpoint", recipe)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(directory)


@pytest.mark.parametrize(
    ("hub_id", "pipeline", "steps", "guidance", "length", "decode"),
    [
        ("Lightricks/LTX-Video", "LTXPipeline", 50, 3.0, 128, (None, None)),
        ("a-r-r-o-w/LTX-Video-0.9.1-diffusers", "LTXPipeline", 50, 3.0, 128, (0.05, 0.025)),
        ("Lightricks/LTX-Video-0.9.5", "LTXConditionPipeline", 50, 3.0, 256, (0.05, 0.025)),
        ("Lightricks/LTX-Video-0.9.7-dev", "LTXConditionPipeline", 50, 3.0, 256, (0.05, 0.025)),
        ("Lightricks/LTX-Video-0.9.7-distilled", "LTXConditionPipeline", 8, 1.0, 256, (0.05, 0.025)),
        ("Lightricks/LTX-Video-0.9.8-13B-distilled", "LTXConditionPipeline", 8, 1.0, 256, (0.05, 0.025)),
    ],
)
def test_hub_ids_have_their_published_defaults(
    hub_id: str, pipeline: str, steps: int, guidance: float, length: int, decode: tuple[float | None, float | None]
) -> None:
    found = get_model_info(hub_id)
    defaults = found.defaults
    assert found.entry is not None and found.entry.pipeline.endswith(f":{pipeline}")
    assert (defaults.width, defaults.height, defaults.num_frames, defaults.fps) == (704, 512, 161, 25)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (steps, guidance)
    assert (defaults.max_sequence_length, defaults.guidance_rescale) == (length, 0.0)
    assert (defaults.decode_timestep, defaults.decode_noise_scale) == decode


def test_a_checkpoint_of_no_published_name_gets_what_diffusers_would_do(checkpoint: Callable[[str], Path]) -> None:
    """diffusers' `__call__` of each class is the measure."""
    for name in ("first", "image", "condition"):
        defaults = get_model_info(str(checkpoint(name))).defaults
        cls = getattr(diffusers, TINY_LTXS[name].pipeline)
        theirs = {key: value.default for key, value in inspect.signature(cls.__call__).parameters.items()}
        ours = defaults.__dict__ | {"frame_rate": defaults.fps}
        for key in ("width", "height", "num_frames", "frame_rate", "num_inference_steps", "guidance_scale"):
            assert ours[key] == theirs[key], key
        for key in ("guidance_rescale", "max_sequence_length", "decode_noise_scale"):
            assert ours[key] == theirs[key], key
        assert (defaults.decode_timestep or 0.0) == theirs["decode_timestep"]
        assert defaults.image_cond_noise_scale == theirs.get("image_cond_noise_scale")
