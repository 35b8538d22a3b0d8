"""Attention kernels against the written-out formula, in the packages' published forms, and inside a layer."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.attention import third_party
from sglang.multimodal_gen.runtime.layers.attention.dispatch import (
    FixedKernel,
    describe_kernels,
)
from sglang.multimodal_gen.runtime.layers.attention.kernels import LseKernel, MaskedKernel, TorchReference
from sglang.multimodal_gen.runtime.layers.attention.registry import (
    KERNELS,
    load_kernel,
)
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan
from sglang.multimodal_gen.test.tiny_wan import noise

CPU = torch.device("cpu")
ON_CPU = [report for report in describe_kernels(CPU) if report.problem is None]
WITH_MASKS = [report.name for report in ON_CPU if report.traits.takes_mask]
WITH_LSE = [report.name for report in ON_CPU if report.traits.gives_lse]
# Queries and keys: as many, fewer, more; one of either; more than the tiles of torch's CPU kernel.
LENGTHS = [(5, 5), (5, 9), (9, 5), (1, 7), (7, 1), (1, 1), (70, 600)]
SHAPES = [(2, 3, 8), (1, 1, 40), (3, 2, 5)]
"""Batch, heads, head size."""


def inputs(queries: int, keys: int, shape: tuple[int, int, int] = (2, 3, 8)) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, size = shape
    query = noise(batch, queries, heads, size)
    return query, noise(batch, keys, heads, size, seed=2), noise(batch, keys, heads, size, seed=3)


def formula(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in fp64, in other words than the reference kernel's."""
    logits = torch.einsum("bshe,blhe->bhsl", query.double(), key.double()) * scale + bias
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.einsum("bhsl,blhe->bshe", weights, value.double()).float(), logits.exp().sum(-1).log().float()


# Kernels


@pytest.mark.parametrize("name", [report.name for report in ON_CPU])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compute_the_formula_in_fp32(name: str, queries: int, keys: int, shape: tuple[int, int, int]) -> None:
    """Tolerance: order of summation."""
    for scale in (0.5, shape[2] ** -0.5):
        query, key, value = inputs(queries, keys, shape)
        expected, _ = formula(query, key, value, scale=scale)
        torch.testing.assert_close(load_kernel(name)(query, key, value, scale=scale), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", [report.name for report in ON_CPU])
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_kernels_lose_no_more_than_two_roundings_in_half_precision(
    name: str, dtype: torch.dtype, epsilon: float
) -> None:
    """Weights and result are each rounded once, by at most half a step of size `epsilon` relative to the values."""
    for queries, keys in LENGTHS:
        query, key, value = (tensor.to(dtype) for tensor in inputs(queries, keys))
        output = load_kernel(name)(query, key, value, scale=0.25)
        expected, _ = formula(query, key, value, scale=0.25)
        assert output.dtype == dtype
        assert (output.float() - expected).abs().max() <= 2 * epsilon * value.float().abs().max()


MASKS: dict[str, Tensor] = {
    "bool per key": torch.tensor([True, True, False, True, False, True, False, True, True]).view(1, 1, 1, 9),
    "bool per sample and key": (noise(2, 1, 1, 9, seed=7) > -0.5).index_fill(3, torch.tensor([0]), True),
    "bool for each pair of each head": (noise(2, 3, 5, 9, seed=8) > 0).index_fill(3, torch.tensor([4]), True),
    "added per key": noise(1, 1, 1, 9, seed=9),
    "added for each pair of each head": 3 * noise(2, 3, 5, 9, seed=10),
    "added minus infinity": torch.zeros(2, 1, 5, 9).index_fill(3, torch.tensor([1, 2, 8]), -torch.inf),
}


@pytest.mark.parametrize("name", WITH_MASKS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_shift_the_logits(name: str, mask: Tensor) -> None:
    query, key, value = inputs(5, 9)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    expected, _ = formula(query, key, value, scale=0.4, bias=bias.double())
    kernel = cast(MaskedKernel, load_kernel(name))
    torch.testing.assert_close(kernel(query, key, value, scale=0.4, mask=mask), expected, rtol=1e-5, atol=1e-6)
    in_half = kernel(query.bfloat16(), key.bfloat16(), value.bfloat16(), scale=0.4, mask=mask)
    # The inputs, the weights and the result are rounded to 8 bits, and so are the logits, which reach 10 here.
    torch.testing.assert_close(in_half.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", WITH_LSE)
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_log_sum_exp_comes_with_an_unchanged_result(name: str, queries: int, keys: int) -> None:
    query, key, value = inputs(queries, keys)
    kernel = cast(LseKernel, load_kernel(name))
    output, lse = kernel.with_lse(query, key, value, scale=0.7)
    assert lse.dtype == torch.float32
    assert torch.equal(output, kernel(query, key, value, scale=0.7))
    torch.testing.assert_close(lse, formula(query, key, value, scale=0.7)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_LSE)
def test_parts_of_the_keys_merge_by_their_log_sum_exp(name: str) -> None:
    query, key, value = inputs(5, 9)
    kernel = cast(LseKernel, load_kernel(name))
    parts = [kernel.with_lse(query, key[:, part], value[:, part], scale=0.7) for part in (slice(4), slice(4, None))]
    shares = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3).unsqueeze(-1)
    merged = sum(share * output for share, (output, _) in zip(shares, parts, strict=True))
    torch.testing.assert_close(merged, kernel(query, key, value, scale=0.7), rtol=1e-5, atol=1e-6)


def test_the_cpu_has_torchs_kernel_and_the_reference_and_both_take_masks() -> None:
    assert {report.name for report in ON_CPU} == {"torch_sdpa", "torch_reference"}
    assert set(WITH_MASKS) == {"torch_sdpa", "torch_reference"}
    assert set(WITH_LSE) == {"torch_sdpa", "torch_reference"}


def test_every_kernel_is_reported_with_what_keeps_it_from_a_device() -> None:
    problems = {report.name: report.problem for report in describe_kernels(CPU)}
    assert list(problems) == list(KERNELS)
    assert problems["fa3"] == "needs a CUDA device and this one is cpu"
    assert problems["torch_sdpa"] is None


# Packages that are not installed here, in the forms in which they are published

PACKAGES = {
    "flash_attn_interface": """
        import torch
        # The first releases of FlashAttention 3 always returned both.
        def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
            logits = torch.einsum("bshe,blhe->bhsl", q, k) * softmax_scale
            return torch.einsum("bhsl,blhe->bshe", logits.softmax(-1), v), logits.logsumexp(-1)
        """,
    "fa3_fwd_interface": """
        import flash_attn_interface
        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, return_attn_probs=False):
            both = flash_attn_interface.flash_attn_func(q, k, v, softmax_scale)
            return both if return_attn_probs else both[0]
        """,
    "flash_attn/flash_attn_interface": """
        import flash_attn_interface
        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
            assert dropout_p == 0.0
            both = flash_attn_interface.flash_attn_func(q, k, v, softmax_scale)
            return (*both, None) if return_attn_probs else both[0]
        """,
    "flash_attn/cute/__init__": """
        import flash_attn_interface
        def flash_attn_func(q, k, v, qv=None, gather=None, softmax_scale=None, causal=False, return_lse=False):
            out, lse = flash_attn_interface.flash_attn_func(q, k, v, softmax_scale)
            return out, lse if return_lse else None
        """,
    "sageattention": """
        import flash_attn_interface
        # Release 1, which swallows arguments that it does not know and centres the keys in place.
        def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
            assert tensor_layout == "NHD"
            k -= k.mean(dim=1, keepdim=True)
            return flash_attn_interface.flash_attn_func(q, k, v, sm_scale)[0]
        """,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs modules of PACKAGES, or of the source given, for one test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def install(*names: str, source: str | None = None) -> None:
        for name in names:
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(PACKAGES[name] if source is None else source))

    yield install
    for name in set(sys.modules) - before:
        if name.startswith(("flash_attn", "fa3_fwd", "sageattention")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("kernel", "modules"),
    [
        (third_party.FlashAttention2, ["flash_attn/flash_attn_interface"]),
        (third_party.FlashAttention3, []),
        (third_party.FlashAttention4, ["flash_attn/cute/__init__"]),
    ],
)
def test_each_release_of_flash_attention_gives_the_result_and_the_log_sum_exp(
    kernel: type[third_party.FlashAttention], modules: list[str], package: Callable[..., None]
) -> None:
    package("flash_attn_interface", *modules)
    query, key, value = inputs(5, 9)
    expected = TorchReference().with_lse(query, key, value, scale=0.3)
    torch.testing.assert_close(kernel()(query, key, value, scale=0.3), expected[0])
    torch.testing.assert_close(kernel().with_lse(query, key, value, scale=0.3), expected)


def test_the_fa3_wheel_serves_where_upstreams_build_is_missing(
    package: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    package("flash_attn_interface", "fa3_fwd_interface")
    monkeypatch.setattr(third_party.FlashAttention3, "modules", ("no_such_interface", "fa3_fwd_interface"))
    query, key, value = inputs(5, 9)
    expected = TorchReference().with_lse(query, key, value, scale=0.3)
    torch.testing.assert_close(third_party.FlashAttention3().with_lse(query, key, value, scale=0.3), expected)


UPSTREAMS_OPERATOR = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
)
ANOTHER_OPERATOR = "fwd(Tensor q, Tensor k, Tensor v, Tensor mask, float? softmax_scale=None) -> (Tensor, Tensor)"


@pytest.mark.parametrize(("schema", "serves"), [(UPSTREAMS_OPERATOR, True), (ANOTHER_OPERATOR, False)])
def test_the_operator_beneath_flash_attention_3_is_called_where_its_arguments_are_known(
    schema: str, serves: bool, package: Callable[..., None]
) -> None:
    package("flash_attn_interface", "fa3_fwd_interface")
    splits: list[int] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, _q: None, _k: None, _v: None, scale: float, causal: bool, num_splits: int
    ) -> tuple[Tensor, ...]:
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v)) and not causal
        splits.append(num_splits)
        return *TorchReference().with_lse(q, k, v, scale=scale), q.new_empty(0), q.new_empty(0)

    with torch.library._scoped_library("flash_attn_3", "FRAGMENT") as library:
        library.define(schema)
        library.impl("fwd", forward, "CPU")
        query, key, value = inputs(5, 9)
        value = value.transpose(1, 3).contiguous().transpose(1, 3)
        expected = TorchReference().with_lse(query, key, value, scale=0.3)
        kernel = third_party.FlashAttention3()
        torch.testing.assert_close(kernel(query, key, value, scale=0.3), expected[0])
        torch.testing.assert_close(kernel.with_lse(query, key, value, scale=0.3), expected)
    assert splits == ([1, 1] if serves else [])


def test_sage_attention_leaves_the_keys_as_they_are(package: Callable[..., None]) -> None:
    package("flash_attn_interface", "sageattention")
    query, key, value = inputs(5, 9)
    given = key.clone()
    output = third_party.SageAttention()(query, key, value, scale=0.3)
    assert torch.equal(key, given)
    torch.testing.assert_close(output, TorchReference()(query, key, value, scale=0.3))


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("import cutlass_that_is_missing", "is installed without cutlass_that_is_missing, which it needs"),
        ("raise OSError('undefined symbol:\\n  _ZN3c10')", r"does not load \(undefined symbol: _ZN3c10\)"),
        ("raise ImportError('libcudart.so.11.0')", r"does not load \(libcudart"),
        ("flash_attn = None", r"does not load \(module 'sageattention' has no attribute 'sageattn'\)"),
    ],
)
def test_a_package_that_does_not_load_says_why(source: str, phrase: str, package: Callable[..., None]) -> None:
    package("sageattention", source=source)
    with pytest.raises(ImportError, match=phrase):
        third_party.SageAttention()


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ImportError, match=r"^is not installed \(the package is fa3-fwd\)$"):
        third_party.FlashAttention3()


def test_flash_attention_4_alone_does_not_pass_for_flash_attention_2(package: Callable[..., None]) -> None:
    package("flash_attn_interface", "flash_attn/cute/__init__")
    third_party.FlashAttention4()
    with pytest.raises(ImportError, match="is not installed"):
        third_party.FlashAttention2()


# Layers


def test_attention_scales_by_head_dim_inside_the_layout() -> None:
    query, key, value = inputs(4, 6, (2, 2, 16))
    attention = AttentionPlan(source=FixedKernel(role="self", fixed=TorchReference())).build(16)
    assert torch.equal(attention(query, key, value), TorchReference()(query, key, value, scale=0.25))


def test_attention_passes_masks_to_kernels_that_take_them() -> None:
    query, key, value = inputs(5, 9, (2, 3, 16))
    mask = MASKS["bool per key"]
    attention = AttentionPlan.torch("cross").build(16, mask=True)
    expected = TorchReference()(query, key, value, scale=0.25, mask=mask)
    torch.testing.assert_close(attention(query, key, value, mask), expected)
    with pytest.raises(AssertionError, match="built with mask=True"):
        AttentionPlan.torch("cross").build(16)(query, key, value, mask)
