"""Attention kernels against the written-out formula, their choice, and the layouts around them."""

from __future__ import annotations

import pytest
import torch

from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.attention.dispatch import KERNELS, select_kernel
from sglang.multimodal_gen.runtime.layers.attention.layouts import LocalSequence
from sglang.multimodal_gen.test.tiny_wan import noise


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_keys", [1, 5, 9])
@pytest.mark.parametrize("scale", [0.5, 8**-0.5])
def test_kernels_compute_the_formula_in_fp32(name: str, num_keys: int, scale: float) -> None:
    """Tolerance: order of summation."""
    query, key, value = noise(2, 5, 3, 8), noise(2, num_keys, 3, 8, seed=2), noise(2, num_keys, 3, 8, seed=3)
    weights = torch.einsum("bshe,blhe->bhsl", query.double(), key.double()).mul(scale).softmax(-1)
    expected = torch.einsum("bhsl,blhe->bshe", weights, value.double()).float()
    output = select_kernel(name).kernel(query, key, value, scale=scale)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_keep_half_precision(name: str) -> None:
    """Tolerance: bf16 keeps 8 bits, and both kernels round weights and result."""
    query, key, value = (noise(1, 6, 2, 16, seed=seed).bfloat16() for seed in (1, 2, 3))
    output = select_kernel(name).kernel(query, key, value, scale=0.25)
    assert output.dtype == torch.bfloat16
    exact = select_kernel("torch_reference").kernel(query.float(), key.float(), value.float(), scale=0.25)
    torch.testing.assert_close(output.float(), exact, rtol=2e-2, atol=1e-2)


def test_the_name_of_each_kernel_is_its_key() -> None:
    assert all(select_kernel(name).kernel.name == name for name in KERNELS)


def test_an_automatic_choice_says_why() -> None:
    choice = select_kernel(None, device_type="cpu")
    assert choice.kernel.name == "torch_sdpa"
    assert choice.reason == "torch_sdpa: the fastest kernel available on cpu"
    assert select_kernel("torch_reference").reason == "torch_reference: asked for"


def test_an_unknown_kernel_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(InvalidRequest, match="'fa9'; available: torch_sdpa, torch_reference") as caught:
        select_kernel("fa9")
    assert caught.value.param == "attention_backend"


def test_attention_scales_by_head_dim_inside_the_layout() -> None:
    query, key, value = (noise(2, 4, 2, 16, seed=seed) for seed in (1, 2, 3))
    kernel = select_kernel("torch_reference").kernel
    attention = Attention(16, kernel=kernel, layout=LocalSequence())
    assert torch.equal(attention(query, key, value), kernel(query, key, value, scale=0.25))
