"""What surrounds the matrix products of a block: the references against plain formulas, the kernels against them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.fused import (
    JoinedLinear,
    gated_sum,
    join_projections,
    linear_gelu,
    norm_rotate,
    norm_rotate_both,
    sum_norm,
)
from sglang.multimodal_gen.test.tiny_wan import noise

FP32 = {"rtol": 1e-5, "atol": 1e-5}
_BATCH, _TOKENS, _WIDTH = 2, 6, 10
_EPS = 1e-3  # large enough to be seen where it is left out


def wide(tensor: Tensor | None, *, num_tokens: int = _TOKENS) -> Tensor:
    """In fp64; modulations [B or 1, G, D] or [D] as one value for each token."""
    assert tensor is not None
    doubled = tensor.double()
    if doubled.ndim < 3:
        return doubled
    return doubled.repeat_interleave(num_tokens // doubled.shape[1], dim=1)


def normed(tokens: Tensor, *, rms: bool) -> Tensor:
    """By the formula, in fp64."""
    centred = tokens if rms else tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + _EPS).sqrt()


@pytest.mark.parametrize("norm_update", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 3, 6])
def test_sum_norm_is_its_formula(groups: int, one_plus: bool, rms: bool, norm_update: bool) -> None:
    """Groups of 0 are vectors for every sample."""
    residual, update = noise(_BATCH, _TOKENS, _WIDTH), noise(_BATCH, _TOKENS, _WIDTH, seed=1)
    shape = (_BATCH, groups, _WIDTH) if groups else (_WIDTH,)
    gate, scale, shift = (noise(*shape, seed=seed) for seed in (2, 3, 4))
    added = normed(wide(update), rms=True) if norm_update else wide(update)
    exact = wide(residual) + wide(gate) * added
    modulated = normed(exact, rms=rms) * (wide(scale) + one_plus) + wide(shift)
    options = {"one_plus": one_plus, "rms": rms, "norm_update": norm_update, "eps": _EPS}
    summed, found = sum_norm(residual, update, gate, scale=scale, shift=shift, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(summed.double(), exact, **FP32)
    torch.testing.assert_close(found.double(), modulated, **FP32)
    alone = gated_sum(residual, update, gate, norm_update=norm_update, eps=_EPS)
    torch.testing.assert_close(alone.double(), exact, **FP32)


@pytest.mark.parametrize("rms", [False, True])
def test_what_is_none_is_left_out(rms: bool) -> None:
    residual, update = noise(_BATCH, _TOKENS, _WIDTH), noise(_BATCH, _TOKENS, _WIDTH, seed=1)
    shift = noise(_BATCH, 3, _WIDTH, seed=2)
    same, found = sum_norm(residual, rms=rms, eps=_EPS)
    assert same is residual
    torch.testing.assert_close(found.double(), normed(wide(residual), rms=rms), **FP32)
    summed, found = sum_norm(residual, update, shift=shift, rms=rms, eps=_EPS)
    torch.testing.assert_close(summed, residual + update, **FP32)
    torch.testing.assert_close(found.double(), normed(wide(summed), rms=rms) + wide(shift), **FP32)


def test_half_precision_comes_back_as_it_came() -> None:
    residual, update, gate = (noise(_BATCH, _TOKENS, _WIDTH, seed=seed).bfloat16() for seed in range(3))
    summed, found = sum_norm(residual, update, gate, eps=_EPS)
    assert (summed.dtype, found.dtype) == (torch.bfloat16, torch.bfloat16)
    # Summed in more than half precision: only the result is rounded.
    exact = residual.double() + gate.double() * update.double()
    assert torch.equal(summed, exact.bfloat16())


@pytest.mark.parametrize("over_all_heads", [False, True])
@pytest.mark.parametrize(("table_batch", "table_heads"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_norm_rotate_is_its_formula(table_batch: int, table_heads: int, over_all_heads: bool) -> None:
    heads, head_dim = 3, 4
    source = noise(_BATCH, _TOKENS, heads, head_dim)
    weight = noise(heads * head_dim if over_all_heads else head_dim, seed=1)
    table = noise(table_batch, _TOKENS, table_heads, head_dim // 2, 2, seed=2)
    features = source.double().flatten(2) if over_all_heads else source.double()
    exact = (normed(features, rms=True) * weight.double()).view(source.shape)
    cosine, sine = table.double().unbind(-1)
    first, second = exact[..., ::2], exact[..., 1::2]
    rotated = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1).flatten(-2)
    found = norm_rotate(source, weight, table, eps=_EPS, wide=over_all_heads)
    torch.testing.assert_close(found.double(), rotated, **FP32)
    only_normed = norm_rotate(source, weight, None, eps=_EPS, wide=over_all_heads)
    torch.testing.assert_close(only_normed.double(), exact, **FP32)


@pytest.mark.parametrize("over_all_heads", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_table", [False, True])
def test_queries_and_keys_together_are_each_alone(with_table: bool, with_norm: bool, over_all_heads: bool) -> None:
    heads, head_dim = 3, 4
    product = noise(_BATCH, _TOKENS, 3, heads, head_dim)
    query, key, value = product.clone().unbind(2)
    size = heads * head_dim if over_all_heads else head_dim
    weights = (noise(size, seed=1), noise(size, seed=2)) if with_norm else None
    table = noise(1, _TOKENS, 1, head_dim // 2, 2, seed=3) if with_table else None
    options = {"eps": _EPS, "wide": over_all_heads}
    alone = [
        norm_rotate(heads_, None if weights is None else weights[number], table, **options)  # type: ignore[arg-type]
        for number, heads_ in enumerate((query, key))
    ]
    together = norm_rotate_both(query, key, weights, table, **options)  # type: ignore[arg-type]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    in_place = norm_rotate_both(query, key, weights, table, out=(query, key), **options)  # type: ignore[arg-type]
    assert in_place[0] is query and all(torch.equal(*pair) for pair in zip(in_place, alone, strict=True))
    assert torch.equal(value, product[:, :, 2])


def test_norm_rotate_writes_where_it_is_told_to() -> None:
    source, room = noise(1, _TOKENS, 2, 4), torch.zeros(1, _TOKENS + 2, 2, 4)
    assert norm_rotate(source, None, None, out=room[:, 1:-1]).data_ptr() == room[:, 1:].data_ptr()
    assert torch.equal(room[:, 1:-1], source)
    assert not room[:, [0, -1]].any()


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_gelu_is_its_formula(has_bias: bool) -> None:
    tokens, weight = noise(_BATCH, _TOKENS, _WIDTH), noise(7, _WIDTH, seed=1)
    bias = noise(7, seed=2) if has_bias else None
    exact = wide(tokens) @ weight.double().T + (wide(bias) if has_bias else 0)
    inner = (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3)
    torch.testing.assert_close(linear_gelu(tokens, weight, bias).double(), exact / 2 * (1 + inner.tanh()), **FP32)


class _Projections(nn.Module):
    """Two layers that become one product."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(_WIDTH, 4, bias=bias), nn.Linear(_WIDTH, 6, bias=bias)
        self.joined: JoinedLinear | None = None

    def join_projections(self) -> None:
        self.joined = JoinedLinear([self.first, self.second])


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_give_what_each_gives_and_share_their_memory(bias: bool) -> None:
    module = nn.Sequential(_Projections(bias=bias), nn.ReLU())
    layers, tokens = module[0], noise(_BATCH, _TOKENS, _WIDTH)
    before = {name: parameter.clone() for name, parameter in module.state_dict().items()}
    separate = layers.first(tokens), layers.second(tokens)
    join_projections(module)
    assert layers.joined is not None
    for together, one, now in zip(
        layers.joined(tokens), separate, (layers.first(tokens), layers.second(tokens)), strict=True
    ):
        torch.testing.assert_close(together, one, **FP32)
        torch.testing.assert_close(now, one, **FP32)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    joined = {layers.joined.weight.untyped_storage().data_ptr()}
    assert {layer.weight.untyped_storage().data_ptr() for layer in (layers.first, layers.second)} == joined
    # What is loaded into a layer later, such as an adapter's weights, is what the product uses.
    layers.second.weight.zero_()
    assert (layers.joined.bias is None) != bias
    rest = layers.second.bias if bias else torch.zeros(6)
    assert torch.equal(layers.joined(tokens)[1], rest.expand(_BATCH, _TOKENS, 6))


def test_layers_of_which_one_has_no_bias_are_not_joined() -> None:
    with pytest.raises(AssertionError, match="all of the layers have a bias, or none"):
        JoinedLinear([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])


KINDS = {
    *("gated_silus", "norm_rotations", "sum_norms"),
    *("frame_norms", "spreads", "upsamplings"),
    *("far_moments", "group_norms", "picture_autoencoders"),
}


def test_kernels_give_what_their_references_give() -> None:
    """fp32: the order of summation. bf16: a step or two of rounding, 2**-8 each, that a norm passes on."""
    program = [sys.executable, "-W", "error", "-m", "sglang.multimodal_gen.test.interpreted_kernels"]
    program += ["tokens", "frames", "groups"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=110, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {f"{kind} {precision}" for kind in KINDS for precision in ("bf16", "fp32")}
    for name, worst in found.items():
        assert worst["cases"] >= {"picture_autoencoders": 2, "far_moments": 20}.get(name.split()[0], 36)
        assert worst["distance"] < (1e-5 if name.endswith("fp32") else 0.02), f"{name}: {worst}"
