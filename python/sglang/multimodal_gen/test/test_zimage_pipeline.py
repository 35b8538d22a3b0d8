"""The Z-Image pipeline against diffusers' ZImagePipeline, alone and sharing batches."""

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
from torch import Tensor

from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidValue, SizeTooLarge, UnsupportedModel
from sglang.multimodal_gen.registry import get_model_info, read_json_object
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.test.media import disc, picture
from sglang.multimodal_gen.test.pipeline_parity import (
    as_uint8,
    assert_close_in_bf16,
    assert_same,
    load,
    run,
    run_together,
)
from sglang.multimodal_gen.test.tiny_zimage import TINY_Z_IMAGES, save_tiny_zimage

BASE: dict[str, Any] = {
    "prompt": "a red circle and a blue star",
    "width": 64,
    "height": 48,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "max_sequence_length": 128,
    "seed": 5,
}
# By checkpoint: sizes, steps, and prompts of less than 32 tokens, exactly as many, more, and too many.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "base": [
        {},
        {"width": 80, "height": 96, "negative_prompt": "green square " * 20},
        {"prompt": "moving " * 25, "guidance_scale": 0.5, "num_inference_steps": 1},
        {"prompt": "small " * 200, "max_sequence_length": 40, "guidance_scale": 0.0},
        {"cfg_normalization": 0.8, "num_inference_steps": 4},
        {"cfg_normalization": 1.2, "cfg_truncation": 0.25, "num_inference_steps": 5},
        {"cfg_truncation": 0.0},
    ],
    "turbo": [{"guidance_scale": 0.0, "num_inference_steps": 9}, {"guidance_scale": 3.0, "width": 32, "height": 32}],
    "dynamic": [{"width": 32, "height": 96, "seed": 2**40 + 1}],
    "shallow_vae": [{"width": 24, "height": 40, "guidance_scale": 7.0, "negative_prompt": "red"}],
}
CASES = [(name, number) for name, requests in REQUESTS.items() for number in range(len(requests))]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("zimage")
    return cache(lambda name: save_tiny_zimage(root / name, TINY_Z_IMAGES[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def reference(
    checkpoint: Path,
    values: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    pipeline_class: Any = diffusers.ZImagePipeline,
    **images: np.ndarray,
) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, 1, H, W] and frames [1, H, W, 3] of the same request."""
    pipeline = pipeline_class.from_pretrained(checkpoint, local_files_only=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in values.items() if key != "seed"}
    arguments |= {name: Image.fromarray(array) for name, array in images.items()}

    def generate(output_type: str) -> Any:
        generator = torch.Generator().manual_seed(values["seed"])
        return pipeline(**arguments, generator=generator, output_type=output_type).images

    return generate("latent")[0].unsqueeze(1), as_uint8(generate("np"))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_latents_and_pictures_match_diffusers(
    name: str, number: int, checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values = BASE | REQUESTS[name][number]
    assert_same(run(pipeline_of(name), values), *reference(checkpoint(name), values))


def test_image_to_image_and_masked_editing_match_diffusers(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    values = BASE | {"strength": 0.6, "num_inference_steps": 5}
    image, mask = picture(64, 48), disc(64, 48)
    expected = reference(checkpoint("base"), values, pipeline_class=diffusers.ZImageImg2ImgPipeline, image=image)
    assert_same(run(pipeline_of("base"), values, RequestInputs(images=(image,))), *expected)
    expected = reference(
        checkpoint("base"), values, pipeline_class=diffusers.ZImageInpaintPipeline, image=image, mask_image=mask
    )
    assert_same(run(pipeline_of("base"), values, RequestInputs(images=(image,), mask=mask)), *expected)


def test_unequal_requests_share_forwards_and_stay_as_they_are(
    pipeline_of: Callable[[str], Any], checkpoint: Callable[[str], Path]
) -> None:
    """Captions of 32, 64 and 128 tokens once padded; guided, unguided, and guided up to some step."""
    pipeline = pipeline_of("base")
    wishes = [
        BASE,
        BASE | {"prompt": "star " * 50, "seed": 9, "guidance_scale": 0.0, "num_inference_steps": 5},
        BASE | {"prompt": "red", "negative_prompt": "small " * 100, "num_inference_steps": 2},
        BASE | {"max_sequence_length": 33, "prompt": "and " * 60, "cfg_truncation": 0.2},
    ]
    together = run_together(pipeline, [(values, EMPTY) for values in wishes])
    keys = {phase.batch_key for req, _ in together for phase in req.phases if phase.name == "denoise"}
    assert len(keys) == 1, "captions of all lengths share a forward"
    for values, found in zip(wishes, together, strict=True):
        assert_same(found, *reference(checkpoint("base"), values))


def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    directory = checkpoint("base")
    exact, _ = run(pipeline_of("base"), BASE)
    assert exact.latents is not None
    ours, _ = run(load(directory, precision="bf16"), BASE)
    theirs, _ = reference(directory, BASE, torch.bfloat16)
    assert_close_in_bf16(ours, theirs, exact.latents)


def test_the_template_asks_the_model_to_think(pipeline_of: Callable[[str], Any]) -> None:
    tokenizer = pipeline_of("base").tokenizer
    assert tokenizer.conversation("red") == "<|im_start|> user red <|im_end|> <|im_start|> assistant thinking"
    assert tokenizer("red", max_length=4).ids == tokenizer("red", max_length=128).ids[:4]


def test_what_has_no_position_is_refused_at_admission(pipeline_of: Callable[[str], Any]) -> None:
    """160, 32 and 48 positions: 128 caption tokens, and 32 tokens of 16 pixels along the shorter axis."""
    pipeline = pipeline_of("base")
    limits = pipeline.limits()
    assert (limits.max_sequence_length, limits.max_side, limits.size_multiple) == (128, 512, 16)
    with pytest.raises(SizeTooLarge, match="got 32x528, accepted are at most 512 pixels along each side"):
        run(pipeline, BASE | {"width": 32, "height": 528})
    with pytest.raises(InvalidValue, match="at most 128 for this model"):
        run(pipeline, BASE | {"max_sequence_length": 129})


def test_a_tokenizer_without_a_template_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("base"), tmp_path / "model")
    (directory / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(CorruptCheckpoint, match="tokenizer has no chat template"):
        load(directory)


def test_components_that_do_not_fit_together_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("base"), tmp_path / "model")
    shutil.rmtree(directory / "vae")
    shutil.copytree(checkpoint("shallow_vae") / "vae", directory / "vae")
    with pytest.raises(UnsupportedModel, match=r"transformer.in_channels is 4, but vae.latent_channels wants 8"):
        load(directory)


def test_the_omni_variant_is_refused_by_name(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("base"), tmp_path / "model")
    path = directory / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"siglip_feat_dim": 1152}))
    with pytest.raises(UnsupportedModel, match="siglip_feat_dim is 1152, accepted is None"):
        load(directory)


@pytest.mark.parametrize(
    ("hub_id", "steps", "guidance", "shift"),
    [("Tongyi-MAI/Z-Image", 50, 5.0, 6.0), ("Tongyi-MAI/Z-Image-Turbo", 9, 0.0, 3.0)],
)
def test_hub_ids_have_their_published_defaults(hub_id: str, steps: int, guidance: float, shift: float) -> None:
    defaults = get_model_info(hub_id).defaults
    assert (defaults.width, defaults.height, defaults.num_frames) == (1024, 1024, 1)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (steps, guidance)
    assert (defaults.cfg_normalization, defaults.cfg_truncation, defaults.max_sequence_length) == (0.0, 1.0, 512)
    scheduler = read_json_object(published_directory(hub_id) / "scheduler" / "scheduler_config.json")
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (shift, False)
