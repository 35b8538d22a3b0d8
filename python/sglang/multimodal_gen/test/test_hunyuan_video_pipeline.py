"""The HunyuanVideo pipelines against diffusers', alone and sharing batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidRequest, MissingParameter, UnsupportedModel
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer, TokenizedText
from sglang.multimodal_gen.runtime.pipelines import hunyuan_video_prompts
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.test.media import clip, picture
from sglang.multimodal_gen.test.pipeline_parity import (
    as_uint8,
    assert_close_in_bf16,
    assert_same,
    load,
    relative_error,
    run,
    run_together,
)
from sglang.multimodal_gen.test.tiny_hunyuan_video import TINY_HUNYUAN_VIDEOS, save_tiny_hunyuan_video

BASE: dict[str, Any] = {
    "prompt": "a red circle moving right",
    "width": 48,
    "height": 32,
    "num_frames": 9,
    "num_inference_steps": 2,
    "guidance_scale": 6.0,
    "max_sequence_length": 16,
    "seed": 5,
}
# By checkpoint: sizes, lengths (from 17 frames on in several pieces), steps, prompts and guidance all differ.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "t2v": [
        {},
        {"num_frames": 21, "prompt": "star", "guidance_scale": 1.0, "num_inference_steps": 3},
        {"width": 16, "height": 64, "true_cfg_scale": 2.5, "negative_prompt": "small green square"},
        {"prompt": "moving star, " * 40, "num_frames": 1, "true_cfg_scale": 3.0, "negative_prompt": ""},
        {"max_sequence_length": 256, "num_frames": 5, "seed": 2**40 + 1},
    ],
    "no_guidance": [{"num_inference_steps": 6}],
    "wide": [{"width": 32, "height": 48, "num_frames": 13}],
    "i2v": [
        {"num_frames": 5},
        {"width": 32, "height": 48, "true_cfg_scale": 2.0, "negative_prompt": "blue star", "num_frames": 9},
        {"true_cfg_scale": 3.0, "negative_prompt": "", "image_embed_interleave": 1, "num_frames": 5},
        {"prompt": "moving star, " * 40, "num_frames": 1, "width": 16},
    ],
    "i2v_33ch": [
        {"num_frames": 17, "guidance_scale": 1.0},
        {"num_frames": 5, "image_embed_interleave": 5},
        {"prompt": "", "num_frames": 1, "true_cfg_scale": 4.0, "negative_prompt": "a"} | {"prompt": "red " * 14},
    ],
    "skyreels": [
        {"guidance_scale": 1.0, "true_cfg_scale": 6.0, "negative_prompt": "small"},
        {"num_frames": 1},
    ],
}
CASES = [(name, number) for name, requests in REQUESTS.items() for number in range(len(requests))]


def given(seed: int = 0) -> RequestInputs:
    """A picture in no size that any model has."""
    return RequestInputs(images=(picture(37, 50, seed),))


def inputs_for(name: str) -> RequestInputs:
    return EMPTY if TINY_HUNYUAN_VIDEOS[name].pipeline == "HunyuanVideoPipeline" else given()


class Rewritten:
    """A tokenizer that reads another text than it is given."""

    def __init__(self, tokenizer: PromptTokenizer, rewrite: Callable[[str], str]) -> None:
        self.tokenizer, self.rewrite = tokenizer, rewrite
        self.pad_id, self.id_of = tokenizer.pad_id, tokenizer.id_of

    def __call__(self, text: str, *, max_length: int) -> TokenizedText:
        return self.tokenizer(self.rewrite(text), max_length=max_length)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("hunyuan_video")
    return cache(lambda name: save_tiny_hunyuan_video(root / name, TINY_HUNYUAN_VIDEOS[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


@cache
def reference_pipeline(checkpoint: Path, dtype: torch.dtype) -> Any:
    """diffusers' own, as the checkpoint names it."""
    index = diffusers.DiffusionPipeline.load_config(checkpoint)
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(checkpoint, local_files_only=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(
    checkpoint: Path, values: dict[str, Any], inputs: RequestInputs, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, T, H, W] and frames [T, H, W, 3] of the same request."""
    pipeline, latents = reference_pipeline(checkpoint, dtype), []
    arguments = {key: value for key, value in values.items() if key != "seed"}
    if inputs.images:
        arguments["image"] = Image.fromarray(inputs.images[0])
    if pipeline.transformer.config.image_condition_type == "latent_concat":
        arguments["num_frames"] += 4  # which diffusers drops

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return tensors

    frames = pipeline(
        **arguments,
        generator=torch.Generator().manual_seed(values["seed"]),
        callback_on_step_end=keep,
        output_type="np",
    ).frames
    return latents[-1][0], as_uint8(frames[0])


def test_a_clip_to_start_from_is_kept_as_far_as_the_strength_says(pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | {"num_inference_steps": 6}
    frames = clip(11, 48, 32)
    latents = {}
    for strength in (0.2, 0.9):
        req, _ = run(pipeline_of("t2v"), values | {"strength": strength}, RequestInputs(video=frames))
        latents[strength] = relative_error(req.latents, req.conditioning["initial_latents"])
    assert latents[0.2] < latents[0.9], "a low strength stays near the clip"


@pytest.mark.parametrize(("name", "number"), CASES)
def test_latents_and_frames_match_diffusers(
    name: str, number: int, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values, inputs = BASE | REQUESTS[name][number], inputs_for(name)
    assert_same(run(pipeline_of(name), values, inputs), *reference(checkpoint(name), values, inputs))


@pytest.mark.parametrize("name", ["t2v", "i2v", "i2v_33ch", "skyreels"])
def test_unequal_requests_share_forwards_and_stay_as_they_are(name: str, pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of(name)
    values = BASE | {"num_frames": 5}
    wishes = [
        values,
        values | {"prompt": "star", "seed": 9, "guidance_scale": 1.5, "num_inference_steps": 3},
        values | {"true_cfg_scale": 3.0, "negative_prompt": "small", "max_sequence_length": 24},
    ]
    inputs = [EMPTY if name == "t2v" else given(seed) for seed in range(3)]
    together = run_together(pipeline, list(zip(wishes, inputs, strict=True)))
    for wish, pictures, (req, frames) in zip(wishes, inputs, together, strict=True):
        alone, alone_frames = run(pipeline, wish, pictures)
        assert alone.latents is not None
        assert relative_error(req.latents, alone.latents) <= 1e-5
        assert np.abs(frames.astype(int) - alone_frames.astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    name: str, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    directory, inputs = checkpoint(name), inputs_for(name)
    exact, _ = run(pipeline_of(name), BASE, inputs)
    assert exact.latents is not None
    ours, _ = run(load(directory, precision="bf16"), BASE, inputs)
    theirs, _ = reference(directory, BASE, inputs, torch.bfloat16)
    assert_close_in_bf16(ours, theirs, exact.latents)


def test_a_clip_leaves_in_pieces_and_tiles_save_memory(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("t2v")
    req = pipeline.admit("request", SamplingParams.from_values(BASE | {"num_frames": 33, "width": 512}))
    decode = req.phases[-1]
    assert (decode.lane, decode.units, req.decode_plan.bounds) == ("decode", 3, (0, 4, 7, 9))
    assert pipeline.shrink("decode", req)
    assert req.decode_plan.tiling is not None
    assert req.decode_plan.bounds == (0, 4, 7, 9)
    assert req.phases[-1].peak_bytes < decode.peak_bytes
    assert any("tiles" in note for note in req.notes)
    while pipeline.shrink("decode", req):
        pass
    assert req.decode_plan.tiling.tile_width == 128


def test_what_cannot_be_read_is_refused(pipeline_of: Callable[[str], Any]) -> None:
    for name in ("i2v", "i2v_33ch", "skyreels"):
        with pytest.raises(MissingParameter, match="accepted is one image"):
            pipeline_of(name).admit("request", SamplingParams.from_values(BASE))
    with pytest.raises(InvalidRequest, match="prompt: it holds <image>"):
        pipeline_of("i2v").admit("request", SamplingParams.from_values(BASE | {"prompt": "a <image>"}), given())
    limits = pipeline_of("i2v").limits()
    assert (limits.frame_stride, limits.size_multiple, limits.inputs.max_images) == (4, 16, 1)
    assert limits.size_from_image.size(900, 1600) == (720, 1280)


def test_components_of_other_models_are_refused(pipeline_of: Callable[[str], Any]) -> None:
    t2v, i2v = pipeline_of("t2v"), pipeline_of("i2v")
    shared = {"name": "mixed", "config": t2v.config, "defaults": t2v.defaults, "placement": t2v.placement}

    def with_parts(base: Any, **changes: Any) -> Any:
        components = {name: getattr(base, name) for name in type(base).components}
        return type(base)(**shared, components=components | changes)

    with pytest.raises(UnsupportedModel, match="image_condition_type: token_replace; HunyuanVideoPipeline takes null"):
        with_parts(t2v, transformer=i2v.transformer)
    with pytest.raises(UnsupportedModel, match=r"image_condition_type: None; .* takes latent_concat, token_replace"):
        with_parts(i2v, transformer=t2v.transformer)
    with pytest.raises(UnsupportedModel, match=r"transformer\.in_channels is 8, but vae.latent_channels wants 4"):
        with_parts(t2v, transformer=pipeline_of("skyreels").transformer)
    with pytest.raises(UnsupportedModel, match="tokens of the template; the model was trained with more than 95"):
        with_parts(t2v, tokenizer=Rewritten(t2v.tokenizer, lambda text: text[-40:]))
    with pytest.raises(UnsupportedModel, match=r"gives token .* where the template has the picture"):
        with_parts(i2v, tokenizer=Rewritten(i2v.tokenizer, lambda text: "star " + text))


def test_templates_are_the_published_ones() -> None:
    text, image = pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
    assert text.DEFAULT_PROMPT_TEMPLATE == {
        "template": hunyuan_video_prompts.TEXT_TEMPLATE,
        "crop_start": hunyuan_video_prompts.TEXT_CROP,
    }
    start, length = hunyuan_video_prompts.IMAGE_POSITION, hunyuan_video_prompts.IMAGE_TOKENS
    assert {
        "template": hunyuan_video_prompts.IMAGE_TEMPLATE,
        "crop_start": hunyuan_video_prompts.IMAGE_CROP,
        "image_emb_start": start,
        "image_emb_end": start + length,
        "image_emb_len": length,
    } == image.DEFAULT_PROMPT_TEMPLATE


@pytest.mark.parametrize(
    ("hub_id", "frames", "steps", "guidance", "shift"),
    [
        ("hunyuanvideo-community/HunyuanVideo", 129, 50, 6.0, None),
        ("FastVideo/FastHunyuan-diffusers", 125, 6, 6.0, 17.0),
        ("hunyuanvideo-community/HunyuanVideo-I2V", 129, 50, 6.0, None),
        ("hunyuanvideo-community/HunyuanVideo-I2V-33ch", 125, 50, 1.0, None),
    ],
)
def test_hub_ids_have_their_published_defaults(
    hub_id: str, frames: int, steps: int, guidance: float, shift: float | None
) -> None:
    defaults = get_model_info(hub_id).defaults
    assert (defaults.width, defaults.height, defaults.num_frames, defaults.fps) == (1280, 720, frames, 24)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (steps, guidance)
    assert (defaults.true_cfg_scale, defaults.flow_shift, defaults.max_sequence_length) == (1.0, shift, 256)
