"""Which attention kernel is chosen, why, and what an impossible choice is told; the options that ask for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang.multimodal_gen.configs.attention import ATTENTION_BACKENDS, Wish, wish_for
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import AttentionNotAvailable, InvalidValue
from sglang.multimodal_gen.runtime.layers.attention.dispatch import (
    choose_kernel,
    describe_kernels,
)
from sglang.multimodal_gen.runtime.layers.attention.registry import (
    FAMILIES,
    KERNELS,
    device_facts,
    load_kernel,
)
from sglang.multimodal_gen.runtime.layers.attention.traits import DeviceFacts, LayerNeeds
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, resolve_server_args, server_options

CPU = torch.device("cpu")


def gpu(capability: tuple[int, int], *installed: str) -> DeviceFacts:
    """A GPU where of the packages only those named are installed."""

    def problem_of(name: str) -> str | None:
        return None if name.startswith("torch_") or name in installed else f"is not installed ({name})"

    return DeviceFacts(device_type="cuda", capability=capability, problem_of=problem_of)


HOPPER, AMPERE, BLACKWELL, ADA, TURING = (9, 0), (8, 0), (10, 0), (8, 9), (7, 5)
ALL = ("fa2", "fa3", "fa4", "sage_attn")
BF16 = LayerNeeds(precision="bf16", head_dim=128)


@pytest.mark.parametrize(
    ("facts", "needs", "name"),
    [
        (gpu(HOPPER, *ALL), BF16, "fa3"),
        (gpu(HOPPER, "fa2", "fa4"), BF16, "torch_cudnn_sdpa"),
        (gpu(HOPPER, *ALL), LayerNeeds(precision="fp16", head_dim=128), "torch_cudnn_sdpa"),
        (gpu(HOPPER, *ALL), LayerNeeds(precision="fp32", head_dim=128), "torch_sdpa"),
        (gpu(HOPPER, *ALL), LayerNeeds(precision="bf16", head_dim=44), "torch_sdpa"),
        (gpu(HOPPER, "fa2"), LayerNeeds(precision="bf16", head_dim=256), "fa2"),
        (gpu(HOPPER, *ALL), LayerNeeds(precision="bf16", head_dim=128, mask=True), "torch_sdpa"),
        (gpu(HOPPER, "fa2"), LayerNeeds(precision="bf16", head_dim=128, lse=True), "fa2"),
        (gpu(HOPPER), LayerNeeds(precision="bf16", head_dim=128, lse=True), "torch_sdpa"),
        (gpu(BLACKWELL, *ALL), BF16, "torch_cudnn_sdpa"),
        (gpu(AMPERE, *ALL), BF16, "fa2"),
        (gpu(AMPERE), BF16, "torch_sdpa"),
        (gpu(ADA, "sage_attn"), BF16, "torch_sdpa"),
        (gpu(TURING, *ALL), BF16, "torch_sdpa"),
    ],
)
def test_the_best_exact_kernel_that_fits_is_chosen(facts: DeviceFacts, needs: LayerNeeds, name: str) -> None:
    assert choose_kernel(needs, facts).name == name


def test_the_reason_names_what_was_passed_over_and_why() -> None:
    choice = choose_kernel(LayerNeeds(precision="fp16", head_dim=256), gpu(HOPPER, "fa2"))
    assert choice.reason == (
        "the fastest for sm_90, fp16, head size 256; fa3 takes bf16, not fp16; "
        "torch_cudnn_sdpa takes head sizes in multiples of 8 up to 128, not 256; "
        "fa4 takes head sizes 64, 96 or 128, not 256"
    )
    assert (
        choose_kernel(BF16, gpu(HOPPER)).reason
        == "the fastest for sm_90, bf16, head size 128; fa3 is not installed (fa3)"
    )
    assert choose_kernel(LayerNeeds(precision="fp32"), device_facts(CPU)).reason == "the fastest for cpu, fp32"


def test_packages_that_the_choice_does_not_come_to_are_not_imported() -> None:
    asked: list[str] = []

    def problem_of(name: str) -> str | None:
        asked.append(name)
        return None

    choose_kernel(BF16, DeviceFacts(device_type="cuda", capability=AMPERE, problem_of=problem_of))
    choose_kernel(
        LayerNeeds(precision="fp32"), DeviceFacts(device_type="cuda", capability=HOPPER, problem_of=problem_of)
    )
    assert asked == ["fa2", "torch_sdpa"]


@pytest.mark.parametrize(
    ("facts", "wish", "name"),
    [
        (gpu(HOPPER, *ALL), "fa", "fa3"),
        (gpu(HOPPER, "fa2", "fa4"), "fa", "fa4"),
        (gpu(BLACKWELL, *ALL), "fa", "fa4"),
        (gpu(AMPERE, *ALL), "fa", "fa2"),
        (gpu(HOPPER, *ALL), "fa2", "fa2"),
        (gpu(HOPPER, *ALL), "sage_attn", "sage_attn"),
        (gpu(AMPERE), "torch_cudnn_sdpa", "torch_cudnn_sdpa"),
    ],
)
def test_a_kernel_that_is_asked_for_is_taken(facts: DeviceFacts, wish: str, name: str) -> None:
    assert choose_kernel(BF16, facts, wish=Wish("attention_backend", wish)).name == name


def test_the_reason_says_which_parameter_asked_and_what_its_family_lacks() -> None:
    choice = choose_kernel(BF16, gpu(AMPERE, "fa2"), wish=Wish("self_attention_backend", "fa"))
    assert choice.reason == "self_attention_backend asks for fa"
    choice = choose_kernel(BF16, gpu(HOPPER, "fa2"), wish=Wish("attention_backend", "fa"))
    assert choice.reason == "attention_backend asks for fa; fa3 is not installed (fa3); fa4 is not installed (fa4)"


@pytest.mark.parametrize(
    ("facts", "needs", "wish", "sentence"),
    [
        (
            device_facts(CPU),
            LayerNeeds(precision="fp32"),
            "fa3",
            "got fa3, but fa3 needs a CUDA device and this one is cpu; accepted here is torch_sdpa, torch_reference",
        ),
        (
            gpu(HOPPER),
            BF16,
            "fa",
            "got fa, but fa3 is not installed (fa3); fa4 is not installed (fa4); fa2 is not installed (fa2); "
            "accepted here is torch_sdpa, torch_cudnn_sdpa, torch_reference",
        ),
        (
            gpu(HOPPER, *ALL),
            LayerNeeds(precision="fp32", head_dim=64),
            "torch_cudnn_sdpa",
            "got torch_cudnn_sdpa, but torch_cudnn_sdpa takes bf16 or fp16, not fp32; accepted here is torch_sdpa, "
            "torch_reference",
        ),
        (
            gpu(HOPPER, *ALL),
            LayerNeeds(precision="bf16", head_dim=40),
            "sage_attn",
            "got sage_attn, but sage_attn takes head sizes 64, 96 or 128, not 40; accepted here is torch_sdpa, "
            "torch_cudnn_sdpa, fa2, fa3, torch_reference",
        ),
        (
            gpu(AMPERE, *ALL),
            BF16,
            "fa3",
            "got fa3, but fa3 needs compute capability 9.0 or newer and this GPU has 8.0; accepted here is torch_sdpa, "
            "torch_cudnn_sdpa, fa2, sage_attn, torch_reference",
        ),
        (
            gpu(BLACKWELL, *ALL),
            BF16,
            "fa3",
            "got fa3, but fa3 needs compute capability 9.x and this GPU has 10.0; accepted here is torch_sdpa, "
            "torch_cudnn_sdpa, fa2, fa4, torch_reference",
        ),
        (
            gpu(HOPPER, "fa2"),
            LayerNeeds(precision="bf16", head_dim=128, mask=True),
            "fa2",
            "got fa2, but fa2 takes no mask; accepted here is torch_sdpa, torch_reference",
        ),
        (
            gpu(HOPPER, "fa2"),
            LayerNeeds(precision="bf16", head_dim=128, lse=True),
            "torch_cudnn_sdpa",
            "got torch_cudnn_sdpa, but torch_cudnn_sdpa gives no log-sum-exp; accepted here is torch_sdpa, fa2, "
            "torch_reference",
        ),
        (
            device_facts(CPU),
            LayerNeeds(precision="fp32"),
            "fa9",
            "got fa9, but there is no such kernel; accepted here is torch_sdpa, torch_reference",
        ),
    ],
)
def test_an_impossible_choice_says_why_and_what_is_possible(
    facts: DeviceFacts, needs: LayerNeeds, wish: str, sentence: str
) -> None:
    with pytest.raises(AttentionNotAvailable) as caught:
        choose_kernel(needs, facts, wish=Wish("cross_attention_backend", wish))
    assert str(caught.value) == f"cross_attention_backend: {sentence}"
    assert (caught.value.code, caught.value.param) == ("attention_not_available", "cross_attention_backend")
    assert caught.value.http_status == 400


# Options


def test_options_and_requests_offer_exactly_the_kernels_that_exist() -> None:
    assert set(ATTENTION_BACKENDS) == set(KERNELS) | set(FAMILIES)
    assert len(ATTENTION_BACKENDS) == len(set(ATTENTION_BACKENDS))
    assert all(member in KERNELS for family in FAMILIES.values() for member in family)
    for report in describe_kernels(CPU):
        assert report.problem is not None or load_kernel(report.name).name == report.name


@pytest.mark.parametrize("options", [ExecutionArgs, SamplingParams])
def test_the_roles_own_option_goes_before_the_common_one(options: Callable[..., Any]) -> None:
    both = options(attention_backend="torch_sdpa", self_attention_backend="fa")
    assert wish_for("self", both) == ("self_attention_backend", "fa")
    assert wish_for("cross", both) == ("attention_backend", "torch_sdpa")
    assert wish_for("cross", options(self_attention_backend="fa")) is None


def test_the_environment_chooses_kernels_too() -> None:
    environ = {
        "SGLANG_DIFFUSION_ATTENTION_BACKEND": "torch_reference",
        "SGLANG_DIFFUSION_CROSS_ATTENTION_BACKEND": "torch_sdpa",
    }
    resolved = resolve_server_args({}, environ=environ)
    execution = resolved.args.execution
    assert (execution.attention_backend, execution.cross_attention_backend) == ("torch_reference", "torch_sdpa")
    assert resolved.sources["attention_backend"] == "env SGLANG_DIFFUSION_ATTENTION_BACKEND"
    assert resolved.warnings == ()
    with pytest.raises(InvalidValue, match=r"SGLANG_DIFFUSION_ATTENTION_BACKEND: got fa9, .*did you mean fa"):
        resolve_server_args({}, environ={"SGLANG_DIFFUSION_ATTENTION_BACKEND": "fa9"})


def test_unknown_kernels_are_refused_with_the_names_that_exist() -> None:
    with pytest.raises(InvalidValue, match=r"self_attention_backend: got sdpa, accepted is one of torch_sdpa, .*fa4"):
        SamplingParams.from_values({"prompt": "x", "self_attention_backend": "sdpa"})
    assert server_options()["cross_attention_backend"].declaration.choices == ATTENTION_BACKENDS


def test_a_head_size_that_the_chosen_kernel_cannot_do_is_refused_when_the_layer_is_built() -> None:
    options = ExecutionArgs(self_attention_backend="sage_attn")
    plan = AttentionPlan.chosen("self", options, facts=gpu(HOPPER, *ALL), precision="bf16")
    with pytest.raises(AttentionNotAvailable, match=r"self_attention_backend: got sage_attn, .* 128, not 384"):
        plan.build(384)


def test_what_device_precision_or_installation_rule_out_is_refused_before_a_layer_is_built() -> None:
    options = ExecutionArgs(attention_backend="fa", cross_attention_backend="torch_sdpa")
    with pytest.raises(AttentionNotAvailable, match="attention_backend: got fa, but fa3 is not installed"):
        AttentionPlan.chosen("self", options, facts=gpu(HOPPER), precision="bf16")
    assert (
        AttentionPlan.chosen("cross", options, facts=gpu(HOPPER), precision="bf16").build(8).kernel.name == "torch_sdpa"
    )
