"""Z-Image's transformer against diffusers': equal outputs for equal weights, alone and with captions of any length."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sglang.multimodal_gen.configs.models.dits.zimage import ZImageTransformerConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.models.dits.zimage import ZImageTransformer2DModel
from sglang.multimodal_gen.runtime.pipelines.zimage_workloads import Z_IMAGE_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, WorkSize
from sglang.multimodal_gen.test.tiny_wan import noise
from sglang.multimodal_gen.test.tiny_zimage import TINY_TRANSFORMER, padded_rows, transformer_pair

# fp32 on the CPU: the tolerance covers the order of summation only.
FP32 = {"rtol": 1e-4, "atol": 2e-6}
NUM_PARAMETERS = 6_154_908_736


def caption(length: int, seed: int = 2, width: int = 20) -> torch.Tensor:
    return noise(length, width, seed=seed)


@pytest.mark.parametrize(
    ("changes", "frames", "height", "width", "text_length"),
    [
        ({}, 1, 8, 8, 5),
        ({}, 1, 8, 16, 32),
        ({}, 1, 10, 6, 33),
        ({}, 2, 6, 14, 64),
        ({"n_layers": 1, "n_refiner_layers": 2, "in_channels": 3}, 1, 16, 16, 1),
        ({"dim": 72, "n_heads": 3, "n_kv_heads": 3, "rope_theta": 10.0, "t_scale": 10.0}, 1, 4, 4, 40),
        ({"dim": 320, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [32, 24, 24], "norm_eps": 1e-2}, 1, 8, 8, 9),
    ],
)
@torch.no_grad()
def test_forward_is_that_of_diffusers(
    changes: dict[str, Any], frames: int, height: int, width: int, text_length: int
) -> None:
    reference, ours = transformer_pair(seed=3, **changes)
    latents = noise(2, reference.config.in_channels, frames, height, width)
    texts = [caption(text_length), caption(text_length, seed=4)]
    timestep = torch.tensor([0.03, 0.71])
    expected = torch.stack(reference(list(latents), timestep, texts, return_dict=False)[0])
    got = ours(latents, timestep, torch.stack(texts), [text_length] * 2)
    torch.testing.assert_close(got, expected, **FP32)


@torch.no_grad()
def test_rows_with_captions_of_unequal_lengths_share_a_forward() -> None:
    """Each equals its row alone, and diffusers' row; what lies behind a text is not read."""
    reference, ours = transformer_pair(seed=5)
    texts = [caption(length, seed=length) for length in (3, 64, 33, 65)]
    latents, timestep = noise(4, 4, 1, 10, 8), torch.tensor([0.0, 0.2, 0.5, 0.9])
    together = ours(latents, timestep, padded_rows(texts, 80), [len(text) for text in texts])
    for row, text in enumerate(texts):
        rows = slice(row, row + 1)
        alone = ours(latents[rows], timestep[rows], text.unsqueeze(0), [len(text)])
        torch.testing.assert_close(together[rows], alone, **FP32)
        expected = reference([latents[row]], timestep[rows], [text], return_dict=False)[0][0]
        torch.testing.assert_close(together[row], expected, **FP32)


@torch.no_grad()
def test_the_last_positions_of_each_axis_can_be_used_and_no_further() -> None:
    """A caption of 126 tokens has 128 positions from 1 on, and the image stands at the one behind."""
    reference, ours = transformer_pair(axes_lens=[130, 3, 4])
    latents, timestep, text = noise(1, 4, 1, 6, 8), torch.tensor([0.5]), caption(126)
    expected = reference(list(latents), timestep, [text], return_dict=False)[0][0]
    torch.testing.assert_close(ours(latents, timestep, text.unsqueeze(0), [126])[0], expected, **FP32)
    for shape, length, needed in (
        ((1, 4, 1, 8, 8), 126, r"\[130, 4, 4\]"),
        ((1, 4, 1, 6, 10), 126, r"\[130, 3, 5\]"),
        ((1, 4, 2, 6, 8), 126, r"\[131, 3, 4\]"),
        ((1, 4, 1, 6, 8), 129, r"\[162, 3, 4\]"),
    ):
        with pytest.raises(InvalidRequest, match=rf"need {needed} positions; the model has \[130, 3, 4\]"):
            ours(noise(*shape), timestep, caption(length).unsqueeze(0), [length])
    with pytest.raises(InvalidRequest, match="latents of 7x8 do not divide into patches of 2x2"):
        ours(noise(1, 4, 1, 7, 8), timestep, text.unsqueeze(0), [126])


def test_it_has_the_parameters_of_the_published_checkpoints() -> None:
    config, of_turbo = (
        read_json_object(published_directory(hub_id) / "transformer" / "config.json")
        for hub_id in ("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo")
    )
    assert config == of_turbo
    assert config["axes_lens"] == [1536, 512, 512]
    with torch.device("meta"):
        reference = diffusers.ZImageTransformer2DModel.from_config(config)
        ours = ZImageTransformer2DModel(ZImageTransformerConfig.from_dict(config))
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == NUM_PARAMETERS


def test_config_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        config = dict(diffusers.ZImageTransformer2DModel(n_layers=0, n_refiner_layers=0).config)
    assert ZImageTransformerConfig.from_dict(config) == ZImageTransformerConfig(n_layers=0, n_refiner_layers=0)
    assert ZImageTransformerConfig().n_layers == 30
    assert ZImageTransformerConfig().n_refiner_layers == 2


@pytest.mark.parametrize(
    ("changes", "param", "sentence"),
    [
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim", "siglip_feat_dim is 1152, accepted is None: .* reference image"),
        ({"all_patch_size": [2, 4]}, "all_patch_size", r"all_patch_size is \[2, 4\], accepted is \[2\]"),
        ({"all_f_patch_size": [2]}, "all_f_patch_size", r"all_f_patch_size is \[2\], accepted is \[1\]"),
        ({"n_kv_heads": 1}, "n_kv_heads", "n_kv_heads is 1, accepted is 2"),
        ({"qk_norm": False}, "qk_norm", "qk_norm is False, accepted is True"),
        ({"axes_dims": [8, 8, 10]}, "axes_dims", "together dim / n_heads, 24"),
        ({"axes_lens": [8, 8]}, "axes_lens", r"axes_lens is \[8, 8\]; accepted are three numbers"),
    ],
)
def test_config_refuses_what_is_not_implemented(changes: dict[str, Any], param: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        ZImageTransformerConfig.from_dict(TINY_TRANSFORMER | changes)
    assert caught.value.param == param


@torch.no_grad()
def test_the_benchmark_runs_the_same_forward_through_both() -> None:
    reference, ours = transformer_pair()
    workload = Z_IMAGE_WORKLOADS["dit"]
    size = WorkSize(
        height=64, width=32, num_frames=1, latent_shape=(4, 1, 8, 4), batch_size=2, num_text_tokens=7, chunk_frames=1
    )
    drawing = Drawing(torch.device("cpu"), torch.float32)
    inputs = workload.inputs({"transformer": ours.config}, size, drawing)
    torch.testing.assert_close(
        workload.forward(ours, inputs, size), workload.reference_forward(reference, inputs), **FP32
    )
