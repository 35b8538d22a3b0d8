"""Stable Diffusion 3's transformer against diffusers': equal outputs for equal weights."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sglang.multimodal_gen.configs.models.dits.sd3 import SD3TransformerConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.models.dits.sd3 import SD3Transformer2DModel
from sglang.multimodal_gen.runtime.pipelines.sd3_workloads import SD3_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, WorkSize
from sglang.multimodal_gen.test.tiny_sd3 import TINY_DUAL_TRANSFORMER, TINY_TRANSFORMER, transformer_pair
from sglang.multimodal_gen.test.tiny_wan import noise

# fp32 on the CPU: the tolerance covers the order of summation, which processors choose, between values of up to 20.
FP32 = {"rtol": 1e-4, "atol": 2e-4}

NUM_PARAMETERS = {
    "3-medium-diffusers": 2_028_328_000,
    "3.5-medium": 2_243_171_520,
    "3.5-large": 8_056_627_520,  # turbo has the same configuration
}


@pytest.mark.parametrize(
    ("config", "changes", "height", "width", "num_text_tokens"),
    [
        (TINY_TRANSFORMER, {}, 16, 16, 9),
        (TINY_TRANSFORMER, {}, 24, 2, 1),
        (TINY_TRANSFORMER, {"patch_size": 1, "num_layers": 1}, 7, 12, 5),
        (TINY_TRANSFORMER, {"qk_norm": "rms_norm", "out_channels": None}, 6, 10, 4),
        (TINY_DUAL_TRANSFORMER, {}, 10, 14, 7),
        (TINY_DUAL_TRANSFORMER, {"dual_attention_layers": [2], "qk_norm": None, "pos_embed_max_size": 5}, 10, 6, 3),
    ],
)
@torch.no_grad()
def test_forward_is_that_of_diffusers(
    config: dict[str, Any], changes: dict[str, Any], height: int, width: int, num_text_tokens: int
) -> None:
    reference, ours = transformer_pair(config | changes, seed=3)
    inputs = {
        "hidden_states": noise(2, 4, height, width),
        "timestep": torch.tensor([999.0, 31.5]),
        "encoder_hidden_states": noise(2, num_text_tokens, 32, seed=2),
        "pooled_projections": noise(2, 24, seed=4),
    }
    torch.testing.assert_close(ours(**inputs), reference(**inputs, return_dict=False)[0], **FP32)


@pytest.mark.parametrize(
    "skip_layers", [[(), (2, 0), (1,)], [(1,), (1,), (1,)], [(), (), ()], [(0, 1, 2), (0,), (0, 1)]]
)
@torch.no_grad()
def test_each_row_skips_its_own_layers(skip_layers: list[tuple[int, ...]]) -> None:
    reference, ours = transformer_pair(TINY_DUAL_TRANSFORMER, seed=3)
    inputs = {
        "hidden_states": noise(3, 4, 6, 8),
        "timestep": torch.tensor([999.0, 31.5, 500.0]),
        "encoder_hidden_states": noise(3, 5, 32, seed=2),
        "pooled_projections": noise(3, 24, seed=4),
    }
    rows_run = {}
    for layer, block in enumerate(ours.transformer_blocks):
        block.register_forward_pre_hook(lambda _, args, layer=layer: rows_run.update({layer: len(args[0])}))
    found = ours(**inputs, skip_layers=skip_layers)
    passing = {layer: sum(layer not in layers for layers in skip_layers) for layer in range(3)}
    assert rows_run == {layer: rows for layer, rows in passing.items() if rows}
    for row, layers in enumerate(skip_layers):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = reference(**alone, skip_layers=list(layers), return_dict=False)[0]
        torch.testing.assert_close(found[row : row + 1], expected, **FP32)


def test_latents_without_a_place_in_the_table_are_refused() -> None:
    _, ours = transformer_pair(TINY_TRANSFORMER)
    rest = {
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": noise(1, 2, 32),
        "pooled_projections": noise(1, 24),
    }
    with pytest.raises(InvalidRequest, match="12x13 patches; the model has places for 12x12"):
        ours(noise(1, 4, 24, 26), **rest)
    with pytest.raises(InvalidRequest, match="latents of 8x7 do not divide into patches of 2x2"):
        ours(noise(1, 4, 8, 7), **rest)


@pytest.mark.parametrize(("name", "num_parameters"), NUM_PARAMETERS.items())
def test_it_has_the_parameters_of_the_published_checkpoint(name: str, num_parameters: int) -> None:
    config = read_json_object(
        published_directory(f"stabilityai/stable-diffusion-{name}") / "transformer" / "config.json"
    )
    with torch.device("meta"):
        reference = diffusers.SD3Transformer2DModel.from_config(config)
        ours = SD3Transformer2DModel(SD3TransformerConfig.from_dict(config))
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_parameters


def test_config_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        config = dict(diffusers.SD3Transformer2DModel().config)
    assert SD3TransformerConfig.from_dict(config) == SD3TransformerConfig()


@pytest.mark.parametrize(
    ("changes", "param", "sentence"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm", "qk_norm is 'layer_norm'; accepted are null and 'rms_norm'"),
        ({"caption_projection_dim": 8}, "caption_projection_dim", "is 8; text tokens are as wide as image tokens, 16"),
    ],
)
def test_config_refuses_what_is_not_implemented(changes: dict[str, Any], param: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        SD3TransformerConfig.from_dict(TINY_TRANSFORMER | changes)
    assert caught.value.param == param


@torch.no_grad()
def test_the_benchmark_runs_the_same_forward_through_both() -> None:
    reference, ours = transformer_pair(TINY_DUAL_TRANSFORMER)
    workload = SD3_WORKLOADS["dit"]
    size = WorkSize(
        height=64, width=32, num_frames=1, latent_shape=(4, 1, 8, 4), batch_size=2, num_text_tokens=7, chunk_frames=1
    )
    inputs = workload.inputs({"transformer": ours.config}, size, Drawing(torch.device("cpu"), torch.float32))
    expected = workload.reference_forward(reference, inputs)
    torch.testing.assert_close(workload.forward(ours, inputs, size), expected, **FP32)
