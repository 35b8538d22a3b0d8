"""The Qwen-Image pipelines against diffusers', alone and sharing batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.qwen_image import QwenImageVAEConfig
from sglang.multimodal_gen.configs.published import published_directory, published_ids
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.registry import get_model_info, load_config, read_json_object
from sglang.multimodal_gen.runtime.models.schedulers.shifting import resolution_mu
from sglang.multimodal_gen.runtime.pipelines import qwen_image
from sglang.multimodal_gen.runtime.pipelines.qwen_image_prompts import EDITING, TEXT_TO_IMAGE, ChatTemplate
from sglang.multimodal_gen.runtime.pipelines.qwen_image_workloads import QWEN_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, WorkSize
from sglang.multimodal_gen.test.media import disc, picture
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
    transformer_pair,
)

BASE: dict[str, Any] = {
    "prompt": "a red circle and a {blue} star",
    "negative_prompt": " ",
    "width": 64,
    "height": 48,
    "num_inference_steps": 3,
    "true_cfg_scale": 4.0,
    "seed": 5,
}
# By checkpoint: sizes, steps, prompt lengths and guidance on and off all differ.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {},
        {"width": 48, "height": 80, "true_cfg_scale": 1.0},
        {"prompt": "moving " * 120, "num_inference_steps": 2, "negative_prompt": "green square"},
        {"max_sequence_length": 24, "true_cfg_scale": 2.5, "negative_prompt": ""},
    ],
    "deep": [{"width": 32, "height": 96, "seed": 2**40 + 1, "num_inference_steps": 6, "prompt": "星"}],
}
CASES = [(name, number) for name, requests in REQUESTS.items() for number in range(len(requests))]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("qwen_image")
    return cache(lambda name: save_tiny_qwen_image(root / name, TINY_QWEN_IMAGES[name]))


@pytest.fixture(scope="module")
def pipeline_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return cache(lambda name: load(checkpoint(name)))


def reference(name: str, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, np.ndarray]:
    """diffusers' final latents [C, 1, H, W] and frames [1, H, W, 3] of the same request."""
    return latents_and_frames(tiny_reference(TINY_QWEN_IMAGES[name]).to(dtype), values)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_latents_and_pictures_match_diffusers(name: str, number: int, pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | REQUESTS[name][number]
    assert_same(run(pipeline_of(name), values), *reference(name, values))


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_image_to_image_matches_diffusers(strength: float, pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | {"strength": strength, "num_inference_steps": 5}
    theirs = diffusers.QwenImageImg2ImgPipeline(**tiny_reference(TINY_QWEN_IMAGES["plain"]).components)
    image = picture(90, 70)
    expected = latents_and_frames(theirs, values, image=Image.fromarray(image))
    assert_same(run(pipeline_of("plain"), values, RequestInputs(images=(image,))), *expected)


def test_masked_editing_matches_diffusers(pipeline_of: Callable[[str], Any]) -> None:
    values = BASE | {"strength": 0.8, "num_inference_steps": 5}
    theirs = diffusers.QwenImageInpaintPipeline(**tiny_reference(TINY_QWEN_IMAGES["plain"]).components)
    image, mask = picture(64, 48), disc(64, 48)
    expected = latents_and_frames(theirs, values, image=Image.fromarray(image), mask_image=Image.fromarray(mask))
    assert_same(run(pipeline_of("plain"), values, RequestInputs(images=(image,), mask=mask)), *expected)


def test_guidance_scale_means_true_cfg_unless_that_is_given(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("plain")
    values = {key: value for key, value in BASE.items() if key != "true_cfg_scale"}
    expected, _ = run(pipeline, BASE)
    assert expected.latents is not None
    for scales in ({"guidance_scale": 4.0}, {}, {"guidance_scale": 9.0, "true_cfg_scale": 4.0}):
        found, _ = run(pipeline, values | scales)
        assert found.latents is not None
        assert torch.equal(found.latents, expected.latents), scales


@pytest.mark.parametrize("masked_below", [0, 1024], ids=["by length", "masked"])
def test_unequal_requests_share_forwards_and_stay_as_they_are(
    masked_below: int, pipeline_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of("plain")
    wishes = [
        BASE,
        BASE | {"prompt": "star", "seed": 9, "true_cfg_scale": 1.5, "num_inference_steps": 5},
        BASE | {"true_cfg_scale": 1.0, "num_inference_steps": 2, "max_sequence_length": 40},
    ]
    alone = [run(pipeline, values) for values in wishes]
    monkeypatch.setattr(qwen_image, "_MASKED_BELOW", masked_below)
    sizes: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    together = run_together(pipeline, [(values, EMPTY) for values in wishes])
    hook.remove()
    expected_sizes = [5] if masked_below else [1, 1, 1, 2]
    assert sorted(sizes[: len(expected_sizes)]) == expected_sizes, "all five rows, or the two of one length"
    for (req, frames), (expected, expected_frames) in zip(together, alone, strict=True):
        assert expected.latents is not None
        assert relative_error(req.latents, expected.latents) <= 1e-5
        assert np.abs(frames.astype(int) - expected_frames.astype(int)).max() <= 1


def test_bf16_is_as_close_to_fp32_as_diffusers_is(
    checkpoint: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    exact, _ = run(pipeline_of("plain"), BASE)
    assert exact.latents is not None
    ours, _ = run(load(checkpoint("plain"), precision="bf16"), BASE)
    theirs, _ = reference("plain", BASE, torch.bfloat16)
    assert_close_in_bf16(ours, theirs, exact.latents)


# Of the model card, which asks against low quality, deformed limbs, oversaturation and blurred text.
NEGATIVE_2512 = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
    "构图混乱。文字模糊，扭曲。"
)


@pytest.mark.parametrize(
    ("hub_id", "task", "steps", "negative", "length"),
    [
        ("Qwen/Qwen-Image", "T2I", 50, " ", 512),
        ("Qwen/Qwen-Image-2512", "T2I", 50, NEGATIVE_2512, 512),
        ("Qwen/Qwen-Image-Edit", "TI2I", 50, " ", 1024),
        ("Qwen/Qwen-Image-Edit-2509", "TI2I", 40, " ", 1024),
        ("Qwen/Qwen-Image-Edit-2511", "TI2I", 40, " ", 1024),
        ("FireRedTeam/FireRed-Image-Edit-1.0", "TI2I", 40, " ", 1024),
        ("FireRedTeam/FireRed-Image-Edit-1.1", "TI2I", 40, " ", 1024),
    ],
)
def test_hub_ids_have_their_published_defaults(hub_id: str, task: str, steps: int, negative: str, length: int) -> None:
    found = get_model_info(hub_id)
    defaults = found.defaults
    assert found.entry is not None
    assert load_config(found.entry).tasks[0] == task
    assert (defaults.width, defaults.height, defaults.num_frames) == (1024, 1024, 1)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.true_cfg_scale) == (steps, 4.0, None)
    assert (defaults.negative_prompt, defaults.max_sequence_length) == (negative, length)


@pytest.mark.parametrize(
    ("pipeline_class", "template", "picture"),
    [
        ("QwenImagePipeline", TEXT_TO_IMAGE, ""),
        ("QwenImageEditPipeline", EDITING, "<|vision_start|><|image_pad|><|vision_end|>"),
        ("QwenImageEditPlusPipeline", EDITING, ""),
    ],
)
def test_prompt_templates_are_those_of_diffusers(pipeline_class: str, template: ChatTemplate, picture: str) -> None:
    recipe = replace(TINY_QWEN_IMAGES["plain"], pipeline_class=pipeline_class)
    expected = tiny_reference(recipe)
    assert template(f"{picture}{{}}") == expected.prompt_template_encode
    assert template.num_dropped == expected.prompt_template_encode_start_idx


@pytest.mark.parametrize("hub_id", [hub_id for hub_id in published_ids() if hub_id.startswith("Qwen/Qwen-Image")])
def test_published_configs_are_read_and_describe_the_published_sizes(hub_id: str) -> None:
    directory = published_directory(hub_id)
    transformer = QwenImageTransformerConfig.from_dict(read_json_object(directory / "transformer" / "config.json"))
    assert transformer == QwenImageTransformerConfig(zero_cond_t=hub_id.endswith("2511"))
    assert QwenImageVAEConfig.from_dict(read_json_object(directory / "vae" / "config.json")) == QwenImageVAEConfig()
    scheduler = read_json_object(directory / "scheduler" / "scheduler_config.json")
    assert resolution_mu(256, scheduler) == pytest.approx(0.5)
    assert resolution_mu(8192, scheduler) == pytest.approx(0.9)
    assert scheduler["shift_terminal"] == 0.02
    index = read_json_object(directory / "model_index.json")
    wanted = set(inspect.signature(getattr(diffusers, index["_class_name"])).parameters)
    assert set(index) - {"_class_name"} == wanted


def test_published_text_encoder_has_the_parameters_of_the_checkpoint() -> None:
    directory = published_directory("Qwen/Qwen-Image") / "text_encoder"
    config = transformers.Qwen2_5_VLConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_292_166_656
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_the_workload_of_the_transformer_runs_the_same_on_both_sides() -> None:
    reference_module, ours = transformer_pair()
    workload = QWEN_IMAGE_WORKLOADS["dit"]
    size = WorkSize(
        height=48, width=64, num_frames=1, latent_shape=(4, 1, 6, 8), batch_size=2, num_text_tokens=7, chunk_frames=1
    )
    inputs = workload.inputs({"transformer": ours.config}, size, Drawing(torch.device("cpu"), torch.float32))
    expected = workload.reference_forward(reference_module, inputs)
    torch.testing.assert_close(workload.forward(ours, inputs, size), expected, rtol=1e-4, atol=1e-5)


def test_only_the_part_of_the_text_encoder_that_is_used_is_kept(pipeline_of: Callable[[str], Any]) -> None:
    names = {name.partition(".")[0] for name, _ in pipeline_of("plain").text_encoder.named_parameters()}
    assert names == {"embed_tokens", "layers", "norm"}, "neither the vision tower nor the head"


def test_a_text_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    recipe = replace(TINY_QWEN_IMAGES["plain"], transformer={"joint_attention_dim": 40})
    directory = save_tiny_qwen_image(tmp_path / "odd", recipe)
    with pytest.raises(UnsupportedModel, match=r"joint_attention_dim is 40, but text_encoder\.hidden_size wants 32"):
        load(directory)
