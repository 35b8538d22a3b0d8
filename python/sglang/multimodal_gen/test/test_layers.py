"""Configs from files, sharded layers, norms, rotary tables and embeddings."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch.nn import functional as F

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.embeddings import sinusoidal_embedding
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.multimodal_gen.runtime.layers.modulation import split_modulations
from sglang.multimodal_gen.runtime.layers.norm import FP32LayerNorm, RMSNorm
from sglang.multimodal_gen.runtime.layers.rotary import apply_rotary_emb, rotary_table_3d
from sglang.multimodal_gen.test.tiny_wan import noise

FP32 = {"rtol": 1e-5, "atol": 1e-6}


def test_config_reads_a_published_file() -> None:
    config = WanTransformerConfig.from_dict(
        {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", "patch_size": [1, 2, 2], "eps": 1}
    )
    assert config.patch_size == (1, 2, 2)
    assert hash(config) == hash(WanTransformerConfig(eps=1)), "configs are hashable"
    assert WanVAEConfig.from_dict({"clip_output": False}) == WanVAEConfig()


@pytest.mark.parametrize(
    ("config", "data", "param", "sentence"),
    [
        (WanTransformerConfig, {"num_heads": 3}, "num_heads", "no field 'num_heads'; it has patch_size, num_att"),
        (WanTransformerConfig, {"num_layers": "3"}, "num_layers", "num_layers is '3', but must be int"),
        (WanTransformerConfig, {"num_layers": True}, "num_layers", "num_layers is True, but must be int"),
        (WanTransformerConfig, {"patch_size": [2, 2]}, "patch_size", "patch_size is .*a list of 3 int"),
        (WanTransformerConfig, {"image_dim": 1.5}, "image_dim", "image_dim is 1.5, but must be int or null"),
        (WanTransformerConfig, {"qk_norm": "layer_norm"}, "qk_norm", "only 'rms_norm_across_heads'"),
        (WanVAEConfig, {"dim_mult": 4}, "dim_mult", "dim_mult is 4, but must be a list of int"),
        (WanVAEConfig, {"z_dim": 8}, "latents_mean", "latents_mean has 16 values; z_dim wants 8"),
        (WanVAEConfig, {"attn_scales": [1.0]}, "attn_scales", "only an empty list"),
        (WanVAEConfig, {"temperal_downsample": [True]}, "temperal_downsample", "has 1 entries.*wants 3"),
    ],
)
def test_config_refuses_what_it_cannot_honour(
    config: type[ModelConfig], data: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        config.from_dict(data)
    assert caught.value.param == param


@torch.no_grad()
def test_column_then_row_shards_add_up_to_the_whole_layer() -> None:
    whole = (ColumnParallelLinear(6, 8), RowParallelLinear(8, 5))
    hidden_states = noise(2, 3, 6)
    partial_sum = torch.zeros(2, 3, 5)
    for rank in range(2):
        axis = ProcessAxis(size=2, rank=rank)
        column = ColumnParallelLinear(6, 8, axis=axis)
        column.weight.copy_(column.shards()["weight"].cut(whole[0].weight))
        column.bias.copy_(whole[0].bias.chunk(2)[rank])
        row = RowParallelLinear(8, 5, axis=axis)
        row.weight.copy_(row.shards()["weight"].cut(whole[1].weight))
        # What this rank would hand to the reduction.
        partial_sum += F.linear(column(hidden_states), row.weight)
    torch.testing.assert_close(partial_sum + whole[1].bias, whole[1](whole[0](hidden_states)), **FP32)


def test_features_that_cannot_be_dealt_evenly_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="7 output features cannot be dealt to 2 ranks"):
        ColumnParallelLinear(4, 7, axis=ProcessAxis(size=2, rank=1))


def test_a_single_rank_reduces_nothing() -> None:
    tensor = noise(3)
    assert all_reduce(tensor, SINGLE.tp) is tensor
    assert (SINGLE.tp.size, SINGLE.sequence.size, SINGLE.leads) == (1, 1, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_norms_compute_in_fp32_and_return_the_input_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """One rounding of the result: the tolerance is half a unit in the last place of the input dtype, doubled."""
    hidden_states = (100 * noise(4, 64) + 30).to(dtype)
    wide = hidden_states.double()
    rms, layer = RMSNorm(64, 1e-6).to(weight_dtype), FP32LayerNorm(64, 1e-6).to(weight_dtype)
    for parameter in (rms.weight, layer.weight, layer.bias):
        parameter.copy_(noise(64, seed=2))
    weight = rms.weight.to(dtype).double()
    expected_rms = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    expected_layer = F.layer_norm(wide, (64,), layer.weight.double(), layer.bias.double(), 1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for output, expected in ((rms(hidden_states), expected_rms), (layer(hidden_states), expected_layer)):
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_norm_takes_a_factor_for_each_sample(dtype: torch.dtype) -> None:
    """In place of its weight; the same factor gates what is added to a residual."""
    norm, hidden_states, residual = RMSNorm(16, 1e-6), noise(2, 3, 16).to(dtype), noise(2, 3, 16, seed=2).to(dtype)
    norm.weight.copy_(noise(16, seed=3))
    factor = noise(2, 1, 16, seed=4)
    wide = hidden_states.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * factor.double()
    # Three roundings of half a unit in the last place.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(norm(hidden_states, factor).double(), expected, **tolerance)
    added = norm.add_normed(residual, hidden_states, factor)
    assert added.dtype == dtype
    torch.testing.assert_close(added.double(), residual.double() + expected, **tolerance)
    torch.testing.assert_close(norm.add_normed(residual, hidden_states), residual + norm(hidden_states), **tolerance)


def test_modulation_shifts_scales_and_gates_each_sample_by_its_own_embedding() -> None:
    table, temb, hidden_states = noise(1, 6, 4), noise(2, 1, 6, 4, seed=2), noise(2, 3, 4, seed=3)
    attn_mod, mlp_mod = split_modulations(table, temb)
    for sample in range(2):
        rows = table[0] + temb[sample, 0]
        normed = torch.nn.functional.layer_norm(hidden_states[sample], (4,), eps=1e-6)
        torch.testing.assert_close(attn_mod.normed(hidden_states)[sample], normed * (1 + rows[1]) + rows[0])
        gated = hidden_states[sample] + hidden_states[sample] * rows[5]
        torch.testing.assert_close(mlp_mod.add_gated(hidden_states, hidden_states)[sample], gated)


def test_rotary_scores_depend_on_distance_only() -> None:
    """Rotating query and key alike leaves their product the same when both move by one cell on any axis."""
    table = rotary_table_3d((3, 4, 5), 24, torch.device("cpu")).view(3, 4, 5, 1, 12, 2)
    query, key = noise(1, 1, 1, 24), noise(1, 1, 1, 24, seed=2)

    def score(at: tuple[int, int, int], to: tuple[int, int, int]) -> torch.Tensor:
        return (apply_rotary_emb(query, table[at][None, None]) * apply_rotary_emb(key, table[to][None, None])).sum()

    base = score((0, 0, 0), (1, 2, 3))
    for at, to in (((1, 0, 0), (2, 2, 3)), ((0, 1, 0), (1, 3, 3)), ((0, 0, 1), (1, 2, 4))):
        torch.testing.assert_close(score(at, to), base, **FP32)
    assert not torch.isclose(score((0, 0, 0), (0, 2, 3)), base)


def test_sinusoidal_embedding_is_that_of_diffusers() -> None:
    timesteps = torch.tensor([0.0, 0.5, 17.0, 999.75])
    expected = diffusers.models.embeddings.get_timestep_embedding(
        timesteps, 32, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(sinusoidal_embedding(timesteps, 32), expected, rtol=0, atol=0)
    assert torch.equal(sinusoidal_embedding(timesteps.view(2, 2), 32).flatten(0, 1), expected)
