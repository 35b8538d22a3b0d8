"""Where weights go on GPUs of any size, what options say of it, what is refused, and what `sglang plan` shows."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from sglang.cli.main import main
from sglang.multimodal_gen.configs.cost_model import CODING_BYTES, CONTEXT_BYTES, H100
from sglang.multimodal_gen.configs.memory_args import MemoryArgs, as_flags, share_of
from sglang.multimodal_gen.configs.memory_plan import (
    GIB,
    MemoryPlan,
    MemoryWish,
    component_needs,
    plan_memory,
    spread,
)
from sglang.multimodal_gen.configs.model_outline import outline_of
from sglang.multimodal_gen.configs.published import published_ids
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.server_args import ServerArgs, WarmupArgs
from sglang.multimodal_gen.test.measured_steps import FLUX, WAN_14B

EXPERTS = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
SMALL = SamplingParams(width=832, height=480)
LAYERWISE, MOVED, RESIDENT = "layerwise-offload", "component-offload", "resident"
COMPONENTS = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "image_encoder", "vae")


def planned(
    model: str, gib: float, *, params: SamplingParams | None = None, shape: ReplicaShape | None = None, **args: Any
) -> MemoryPlan:
    """On an H100 with so much memory."""
    outline = outline_of(get_model_info(model))
    wish = MemoryWish(gpu_bytes=gib * GIB, hardware=H100, args=MemoryArgs(**args), shape=shape or ReplicaShape())
    return plan_memory(outline, outline.work(params), wish)


@pytest.mark.parametrize(
    ("model", "gib", "modes"),
    [
        (FLUX, 80, (RESIDENT, RESIDENT, RESIDENT, RESIDENT)),
        (FLUX, 28, (RESIDENT, RESIDENT, LAYERWISE, RESIDENT)),
        (FLUX, 16, (LAYERWISE, RESIDENT, LAYERWISE, MOVED)),
        (FLUX, 8, (LAYERWISE, RESIDENT, LAYERWISE, MOVED)),
        (WAN_14B, 40, (RESIDENT, LAYERWISE, RESIDENT)),
        (WAN_14B, 8, (LAYERWISE, LAYERWISE, MOVED)),
    ],
)
def test_what_costs_least_goes_first_and_all_of_it_fits(model: str, gib: float, modes: tuple[str, ...]) -> None:
    plan = planned(model, gib, params=SMALL if model == WAN_14B else None)
    assert tuple(plan.modes.values()) == modes
    assert plan.fits and plan.peak_bytes <= gib * GIB
    if LAYERWISE in modes[:1]:
        assert plan.peak_bytes == pytest.approx(gib * GIB), "what is left is for blocks that stay"


@pytest.mark.parametrize("model", ["demo", *published_ids()])
def test_every_model_has_a_plan_for_every_size_and_more_memory_is_never_slower(model: str) -> None:
    plans = [planned(model, gib) for gib in (4, 8, 16, 24, 48, 80, 200)]
    for small, large in itertools.pairwise(plans):
        assert large.step_seconds <= small.step_seconds * (1 + 1e-9)
        assert large.host_bytes <= small.host_bytes
    assert not plans[-1].offloads and plans[-1].slowdown == 1.0


def test_a_step_takes_as_long_as_its_transfers_or_its_arithmetic() -> None:
    flux, wan = planned(FLUX, 8), planned(WAN_14B, 8, params=SMALL)
    assert flux.step_seconds == pytest.approx(flux.streamed_bytes / H100.host_bandwidth)
    assert 3 < flux.slowdown < 4
    assert wan.slowdown == 1.0 and wan.streamed_bytes > 2 * 24 * GIB, "rows one at a time bring every block twice"
    half = planned(EXPERTS, 16, params=SMALL, dit_layerwise_resident_layers=0)
    in_blocks = sum(sum(need.blocks) for need in half.components if need.is_transformer)
    assert half.streamed_bytes == pytest.approx(in_blocks / 2), "of one of two transformers"


def test_peak_is_of_denoising_or_of_what_comes_before_and_after() -> None:
    plan = planned(FLUX, 16, dit_layerwise_resident_layers=0)
    needs = {need.name: need for need in plan.components}
    blocks = max(max(need.blocks, default=0.0) for need in needs.values())
    always = needs["transformer"].outside + needs["text_encoder"].num_bytes + 3 * blocks
    assert plan.num_slots == 3
    turn = max(needs["text_encoder_2"].outside, needs["vae"].num_bytes)
    assert plan.peak_bytes == pytest.approx(always + max(plan.activations, CODING_BYTES + turn) + CONTEXT_BYTES)
    assert planned(FLUX, 5, performance_mode="memory").num_slots == 2, "where it is tight, one is on its way"


def test_tensor_parallel_ranks_hold_less() -> None:
    outline = outline_of(get_model_info(FLUX))
    one, two = (
        component_needs(outline, MemoryWish(gpu_bytes=0, hardware=H100, shape=ReplicaShape(tp=tp))) for tp in (1, 2)
    )
    for alone, shared in zip(one, two, strict=True):
        assert shared.num_bytes <= alone.num_bytes and sum(shared.blocks) <= sum(alone.blocks)
    assert 0.5 < two[0].num_bytes / one[0].num_bytes < 0.8


# --- options ---


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        ({}, {}),
        ({"dit_cpu_offload": True}, {"transformer": MOVED, "transformer_2": MOVED}),
        ({"dit_cpu_offload": False}, {"transformer": RESIDENT, "transformer_2": RESIDENT}),
        (
            {"dit_cpu_offload": False, "dit_layerwise_offload": True},
            {"transformer": LAYERWISE, "transformer_2": LAYERWISE},
        ),
        ({"dit_cpu_offload": True, "dit_layerwise_offload": False}, {"transformer": MOVED, "transformer_2": MOVED}),
        (
            {"text_encoder_cpu_offload": True, "vae_cpu_offload": False},
            {"text_encoder": MOVED, "text_encoder_2": MOVED, "vae": RESIDENT},
        ),
        ({"image_encoder_cpu_offload": True}, {"image_encoder": MOVED}),
        ({"cpu_offload_components": ("vae", "transformer_2")}, {"vae": MOVED, "transformer_2": MOVED}),
        ({"vae_cpu_offload": True, "cpu_offload_components": ("none",)}, {"vae": RESIDENT}),
        ({"layerwise_offload_components": ("all",)}, dict.fromkeys(COMPONENTS, LAYERWISE)),
        (
            {"component_residency": ("text_encoder=component-offload",), "text_encoder_cpu_offload": False},
            {"text_encoder": MOVED, "text_encoder_2": RESIDENT},
        ),
        (
            {"component_residency": ("transformer=resident", "dit=layerwise-offload")},
            {"transformer": RESIDENT, "transformer_2": LAYERWISE},
        ),
    ],
)
def test_the_last_word_on_a_component(options: dict[str, Any], modes: dict[str, str]) -> None:
    assert MemoryArgs(**options).asked(COMPONENTS) == modes


def test_a_name_counts_before_a_group_and_a_wish_before_the_mode() -> None:
    plan = planned(FLUX, 80, component_residency=("all=component-offload", "transformer=resident"))
    assert plan.modes == {"transformer": RESIDENT, "text_encoder": MOVED, "text_encoder_2": MOVED, "vae": MOVED}
    plan = planned(FLUX, 80, performance_mode="memory", component_residency=("vae=resident",))
    assert plan.modes == {"transformer": LAYERWISE, "text_encoder": MOVED, "text_encoder_2": LAYERWISE, "vae": RESIDENT}
    for mode in ("speed", "manual"):
        assert not planned(FLUX, 8, performance_mode=mode).offloads


@pytest.mark.parametrize(
    ("number", "whole", "found"), [(0, 57, 0), (1, 57, 1), (0.5, 57, 29), (100, 57, 57), (3, 57, 3), (0.01, 57, 1)]
)
def test_a_number_or_a_part_of_the_blocks(number: float, whole: int, found: int) -> None:
    assert share_of(number, whole) == found


@pytest.mark.parametrize(
    ("sizes", "budget", "policy", "kept"),
    [
        ([1] * 6, 3, "strided", [1, 3, 5]),
        ([1] * 6, 3, "leading", [0, 1, 2]),
        ([1] * 6, 2.9, "leading", [0, 1]),
        ([1] * 6, 100, "strided", [0, 1, 2, 3, 4, 5]),
        ([1] * 6, 0, "strided", []),
        ([4, 4, 1, 1, 1, 1], 6, "strided", [1, 3, 5]),
        ([], 6, "strided", []),
    ],
)
def test_blocks_that_stay_are_spread_over_all(sizes: list[int], budget: float, policy: str, kept: list[int]) -> None:
    assert spread(sizes, budget, policy=policy) == kept
    assert sum(sizes[index] for index in kept) <= budget


# --- what is refused ---


def test_a_limit_below_the_least_says_the_least() -> None:
    with pytest.raises(InvalidValue, match=r"gpu_memory_limit: got 3, accepted is at least 4\.\d GiB"):
        planned(FLUX, 3, gpu_memory_limit=3)
    least = planned(FLUX, 3).least_bytes / GIB
    assert planned(FLUX, least * 1.01, gpu_memory_limit=least * 1.01).fits
    with pytest.raises(InvalidValue, match=r"at least 3[0-9]"):
        planned(FLUX, 16, gpu_memory_limit=16, performance_mode="speed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"component_residency": ("vea=resident",)}, "component_residency: got vea, accepted is one of dit, "),
        (
            {"cpu_offload_components": ("transformer_2",)},
            "cpu_offload_components: got transformer_2",
        ),
        ({"layerwise_offload_components": ("x",)}, "layerwise_offload_components: got x"),
    ],
)
def test_a_component_that_there_is_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        planned(FLUX, 80, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"component_residency": ["vae=away"]},
        {"component_residency": ["vae"]},
        {"performance_mode": "fast"},
        {"gpu_memory_limit": 0.0},
        {"gpu_memory_limit": "much"},
        {"dit_offload_prefetch_size": -1.0},
    ],
)
def test_options_that_say_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue.__mro__[1]):
        ServerArgs.from_kwargs(**options)


# --- sglang plan ---


def test_the_plan_shows_components_options_and_other_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model-path", FLUX, "--gpu", "h100", "--gpu-memory", "80", "--gpu-memory-limit", "16"]) == 0
    shown = capsys.readouterr().out
    assert "16.0 GiB of 16.0 GiB" in shown and "text_encoder_2=layerwise-offload" in shown
    assert main(["plan", "--model-path", FLUX, "--gpu", "h100", "--gpu-memory", "16", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["modes"] == dict(planned(FLUX, 16).modes)
    assert memory["options"] == as_flags(planned(FLUX, 16).modes)
    assert [card["gib"] for card in memory["cards"]] == [8, 12, 16, 24, 32, 48, 80]
    assert [card["modes"]["transformer"] for card in memory["cards"]].count(RESIDENT) == 3
    assert ServerArgs.from_kwargs(component_residency=[text for text in memory["options"] if "=" in text])


def test_the_plan_of_a_size_says_how_a_server_plans_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A server of few GiB would otherwise plan for the model's own size, and refuse to start."""
    plan = ["plan", "--model-path", WAN_14B, "--gpu", "h100", "--gpu-memory", "8", "--json"]
    assert main([*plan, "--width", "832", "--height", "480", "--num-frames", "41"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["fits"]
    options = memory["options"]
    assert options[:4] == ["--warmup-resolutions", "832x480", "--warmup-num-frames", "41"]
    sized = WarmupArgs(warmup_resolutions=("640x480", "832x480"), warmup_num_frames=41).largest
    assert sized is not None and (sized.width, sized.height, sized.num_frames) == (832, 480, 41)
    assert WarmupArgs().largest is None
    assert main(plan) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert not memory["fits"] and "--warmup-resolutions" not in memory["options"]


def test_the_plan_refuses_a_limit_that_is_too_low(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model-path", FLUX, "--gpu-memory-limit", "3"]) == 2
    assert "gpu_memory_limit: got 3.0, accepted is at least" in capsys.readouterr().err
    assert main(["plan", "--model-path", FLUX, "--gpu-memory-limit", "3", "--width", "512"]) == 2
    assert "the least that black-forest-labs/FLUX.1-dev needs at 512x1024 with" in capsys.readouterr().err
