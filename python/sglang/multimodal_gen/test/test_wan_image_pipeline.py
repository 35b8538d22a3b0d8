"""The Wan pipelines beyond plain text to video against diffusers': pictures, last pictures, experts, first frames."""

from __future__ import annotations

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

from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.test.pipeline_parity import as_uint8, assert_same, load, run
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, picture, save_tiny_wan_image

BASE: dict[str, Any] = {
    "prompt": "a red circle &amp; a  blue star",
    "negative_prompt": "green square",
    "width": 48,
    "height": 32,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "seed": 5,
}
FIRST, LAST = picture(70, 50), picture(40, 90, seed=1)
# By checkpoint: which pictures, and what differs from the base.
CASES: list[tuple[str, dict[str, Image.Image], dict[str, Any]]] = [
    ("i2v", {"image": FIRST}, {}),
    ("i2v", {"image": LAST}, {"width": 32, "height": 64, "num_frames": 1, "guidance_scale": 1.0}),
    ("flf2v", {"image": FIRST, "last_image": LAST}, {"num_frames": 5}),
    ("i2v_experts", {"image": FIRST}, {"num_inference_steps": 5, "guidance_scale_2": 2.0}),
    (
        "i2v_experts",
        {"image": FIRST, "last_image": LAST},
        {"num_frames": 5, "num_inference_steps": 2, "guidance_scale_2": 4.0},
    ),
    ("t2v_experts", {}, {"num_inference_steps": 6, "guidance_scale_2": 3.0}),
    ("t2v_experts", {}, {"num_inference_steps": 4, "guidance_scale_2": 1.0, "prompt": "moving " * 600}),
    ("t2v_experts", {}, {"num_inference_steps": 2, "guidance_scale": 1.0, "guidance_scale_2": 3.0, "num_frames": 1}),
    ("ti2v", {}, {"width": 64, "num_frames": 5}),
    ("ti2v", {"image": FIRST}, {"width": 64}),
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
