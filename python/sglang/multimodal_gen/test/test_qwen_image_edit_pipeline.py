"""The Qwen-Image-Edit pipelines against diffusers', alone and sharing batches.

The published areas, a million pixels and 384x384, are shrunk on both sides so that tests stay short; what sizes follow
from them is compared at full scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import SizeFromImage
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidRequest
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext
from sglang.multimodal_gen.runtime.loader.picture_processor import PictureProcessor
from sglang.multimodal_gen.runtime.pipelines.qwen_image_edit import (
    ONE_PICTURE,
    SEVERAL_PICTURES,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.test.pipeline_parity import (
    assert_close_in_bf16,
    assert_same,
    load,
    relative_error,
    run,
    run_together,
)
from sglang.multimodal_gen.test.tiny_qwen_image import (
    TINY_QWEN_IMAGES,
    latents_and_frames,
    save_tiny_qwen_image,
    tiny_reference,
)

BASE: dict[str, Any] = {
    "prompt": "make the circle blue",
    "negative_prompt": " ",
    "num_inference_steps": 3,
    "true_cfg_scale": 4.0,
    "seed": 5,
}
PUBLISHED_DIMENSIONS = pipeline_qwenimage_edit_plus.calculate_dimensions


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of random colours [height, width, 3]: noise would be grey once it is resized."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST))


TALL, WIDE, SQUARE = picture(90, 50), picture(40, 100, seed=1), picture(33, 33, seed=2)
CASES: list[tuple[str, dict[str, Any], tuple[np.ndarray, ...]]] = [
    ("edit", {}, (TALL,)),
    ("edit", {"width": 48, "height": 80, "true_cfg_scale": 1.0, "num_inference_steps": 2}, (WIDE,)),
    ("edit_plus", {"prompt": "moving " * 60, "negative_prompt": "star"}, (WIDE,)),
    ("edit_plus", {"width": 64, "height": 32}, (TALL, SQUARE, WIDE)),
    ("edit_plus_2511", {"num_inference_steps": 4}, (SQUARE, TALL)),
]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Areas shrunk on both sides."""
    with pytest.MonkeyPatch.context() as patch:
        for pipeline, rules in (
            (QwenImageEditPipeline, ONE_PICTURE),
            (QwenImageEditPlusPipeline, SEVERAL_PICTURES),
        ):
            small = {name: shrunk_rule(getattr(rules, name)) for name in ("shown", "latents")}
            patch.setattr(pipeline, "rules", replace(rules, **small))
        patch.setattr(
            pipeline_qwenimage_edit,
            "calculate_dimensions",
            lambda area, ratio: (*PUBLISHED_DIMENSIONS(shrunk(area), ratio), None),
        )
        patch.setattr(
            pipeline_qwenimage_edit_plus,
            "calculate_dimensions",
            lambda area, ratio: PUBLISHED_DIMENSIONS(shrunk(area), ratio),
        )
        yield


def shrunk(area: int) -> int:
    """A million pixels to 4,096, and 384x384 to 2,304, below which sides would round to nothing."""
    return area // (256 if area > 500_000 else 64)


def shrunk_rule(rule: SizeFromImage) -> SizeFromImage:
    return msgspec.structs.replace(rule, area=shrunk(rule.area))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("qwen_image_edit")
    return cache(lambda name: save_tiny_qwen_image(root / name, TINY_QWEN_IMAGES[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path], _small: None) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def reference(
    name: str,
    values: dict[str, Any],
    images: tuple[np.ndarray, ...],
    *,
    spatial_positions: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, 1, H, W] and frames [1, H, W, 3] of the same request.

    With `spatial_positions` its text encoder is told which tokens are a picture's, which diffusers 0.42 forgets.
    """
    pipeline = tiny_reference(TINY_QWEN_IMAGES[name]).to(dtype)
    if spatial_positions:
        pipeline.text_encoder.register_forward_pre_hook(tell_picture_tokens, with_kwargs=True)
    given = [Image.fromarray(image) for image in images]
    return latents_and_frames(pipeline, values, image=given[0] if name == "edit" else given)


def tell_picture_tokens(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    types = (kwargs["input_ids"] == module.config.image_token_id).int()
    return args, kwargs | {"mm_token_type_ids": types}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_latents_and_pictures_match_diffusers(number: int, pipeline_of: Callable[[str], Any]) -> None:
    name, changes, images = CASES[number]
    values = BASE | changes
    found = run(pipeline_of(name), sized(pipeline_of(name), values, images), RequestInputs(images=images))
    assert_same(found, *reference(name, values, images))


def sized(pipeline: Any, values: dict[str, Any], images: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """With the size that follows from the pictures, as the entry points fill it in."""
    rule = pipeline.limits().size_from_image
    image = images[-1] if rule.source == "last" else images[0]
    width, height = rule.size(image.shape[1], image.shape[0])
    return {"width": width, "height": height} | values


def test_with_spatial_positions_the_result_is_that_of_diffusers_when_it_tells_them(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = (TALL, SQUARE)
    values = BASE | {"width": 48, "height": 48}
    usual, _ = run(pipeline_of("edit_plus"), values, RequestInputs(images=images))
    assert usual.latents is not None
    rules = replace(QwenImageEditPlusPipeline.rules, spatial_positions=True)
    monkeypatch.setattr(QwenImageEditPlusPipeline, "rules", rules)
    found = run(load(checkpoint("edit_plus")), values, RequestInputs(images=images))
    assert_same(found, *reference("edit_plus", values, images, spatial_positions=True))
    assert relative_error(found[0].latents, usual.latents) > 1e-3, "positions must matter"


def test_unequal_requests_share_forwards_and_stay_as_they_are(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("edit_plus_2511")
    size = {"width": 48, "height": 48}
    wishes = [
        (BASE | size, RequestInputs(images=(TALL,))),
        (
            BASE | size | {"prompt": "star", "seed": 9, "true_cfg_scale": 1.5, "num_inference_steps": 5},
            RequestInputs(images=(picture(90, 50, seed=7),)),
        ),
        (BASE | size | {"true_cfg_scale": 1.0, "num_inference_steps": 2}, RequestInputs(images=(TALL, WIDE))),
    ]
    alone = [run(pipeline, *wish) for wish in wishes]
    sizes: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    together = run_together(pipeline, wishes)
    hook.remove()
    assert sizes[0] == 4, "both branches of the two requests with one picture"
    for (req, frames), (expected, expected_frames) in zip(together, alone, strict=True):
        assert expected.latents is not None
        assert relative_error(req.latents, expected.latents) <= 1e-5
        assert np.abs(frames.astype(int) - expected_frames.astype(int)).max() <= 1


def test_equal_pictures_are_encoded_once(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("edit")
    pipeline.conditioning_cache.clear()
    seen: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, module in (("vision", pipeline.text_encoder.visual), ("vae", pipeline.vae.encoder))
    ]
    values = BASE | {"width": 32, "height": 32, "num_inference_steps": 2}
    run_together(pipeline, [(values | {"seed": seed}, RequestInputs(images=(TALL,))) for seed in (1, 2)])
    assert sorted(seen) == ["vae", "vision"]
    run(pipeline, values, RequestInputs(images=(SQUARE,)))
    assert len(seen) == 4
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["edit", "edit_plus"])
def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    name: str, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    images, values = (TALL,), BASE | {"width": 48, "height": 48}
    exact, _ = run(pipeline_of(name), values, RequestInputs(images=images))
    assert exact.latents is not None
    ours, _ = run(load(checkpoint(name), precision="bf16"), values, RequestInputs(images=images))
    theirs, _ = reference(name, values, images, dtype=torch.bfloat16)
    assert_close_in_bf16(ours, theirs, exact.latents)


@pytest.mark.parametrize("size", [(1000, 1000), (1920, 1080), (333, 777), (640, 200), (4000, 37)])
@pytest.mark.parametrize("rule", [ONE_PICTURE.latents, SEVERAL_PICTURES.shown], ids=["latents", "shown"])
def test_sizes_follow_from_the_proportions_as_in_diffusers(size: tuple[int, int], rule: SizeFromImage) -> None:
    expected = tuple(max(32, side) for side in PUBLISHED_DIMENSIONS(rule.area, size[0] / size[1]))
    assert rule.size(*size) == expected


def test_published_releases_look_at_pictures_as_diffusers_does() -> None:
    assert ONE_PICTURE.shown == ONE_PICTURE.latents == SizeFromImage(area=1024 * 1024, multiple=32, source="first")
    assert SEVERAL_PICTURES.shown.area == pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
    assert SEVERAL_PICTURES.latents.area == pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE
    assert SEVERAL_PICTURES.latents.source == "last"
    assert (SEVERAL_PICTURES.label, SEVERAL_PICTURES.max_images) == ("Picture {}: ", 3)
    assert not ONE_PICTURE.spatial_positions and not SEVERAL_PICTURES.spatial_positions


@pytest.mark.parametrize(
    ("name", "count", "accepted"),
    [("edit", 0, "one image"), ("edit", 2, "one image"), ("edit_plus", 4, "up to 3|1 to 3")],
)
def test_a_wrong_number_of_pictures_is_refused(
    name: str, count: int, accepted: str, pipeline_of: Callable[[str], Any]
) -> None:
    with pytest.raises(InvalidRequest, match=accepted):
        run(pipeline_of(name), BASE, RequestInputs(images=(TALL,) * count))


def test_patches_are_those_of_an_explicit_computation(pipeline_of: Callable[[str], Any]) -> None:
    """Resized to whole tokens, scaled, normalised, each frame twice, patches of a token side by side."""
    processor = pipeline_of("edit").processor
    assert isinstance(processor, transformers.Qwen2VLImageProcessorPil)
    found = processor(images=[Image.fromarray(TALL)], return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, 10, 4]], "90x50 shrinks to at most 1,024 pixels: 40x16"
    small = np.asarray(Image.fromarray(TALL).resize((16, 40), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    normed = (small - processor.image_mean) / processor.image_std
    patches = []
    for top in range(0, 40, 8):
        for left in range(0, 16, 8):
            for row in (top, top + 4):
                for column in (left, left + 4):
                    patch = normed[row : row + 4, column : column + 4].transpose(2, 0, 1)
                    patches.append(np.stack((patch, patch), axis=1).ravel())
    np.testing.assert_allclose(found["pixel_values"].numpy(), np.stack(patches), rtol=1e-4, atol=1e-5)


def test_a_prompt_with_the_token_of_pictures_is_refused(pipeline_of: Callable[[str], Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"<\|image_pad\|>.*without the token"):
        run(pipeline_of("edit"), BASE | {"prompt": "a <|image_pad|>"}, RequestInputs(images=(TALL,)))


def test_published_processor_settings_are_read(tmp_path: Path) -> None:
    """Hub files name a class that wants torchvision; what is read does not."""
    directory = published_directory("Qwen/Qwen-Image-Edit") / "processor"
    context = LoadContext(device=torch.device("cpu"), dtype=torch.float32, layers=LayerContext())
    found = PictureProcessor()(directory, "Qwen2VLProcessor", context)
    assert isinstance(found, transformers.Qwen2VLImageProcessorPil)
    # 1024x1024 becomes 1036x1036: 74 patches of 14 pixels along each side, of which 2x2 are a token.
    assert found.get_number_of_image_patches(1024, 1024, {}) == 74 * 74
    with pytest.raises(CorruptCheckpoint, match="holds no settings of an image processor"):
        PictureProcessor()(tmp_path, "Qwen2VLProcessor", context)
