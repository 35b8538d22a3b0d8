"""Which layout is taken, what is refused before anything starts, and what `sglang plan` says of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.cli.main import main
from sglang.multimodal_gen.configs.cost_model import H100
from sglang.multimodal_gen.configs.model_outline import outline_of
from sglang.multimodal_gen.configs.parallel_plan import GIB, ParallelPlan, PlanOptions, plan_layouts
from sglang.multimodal_gen.configs.published import published_directory, published_ids
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.visible_gpus import gpus_of_this_machine
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidValue, UnsupportedModel
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.entrypoints.cli import generate, serve
from sglang.multimodal_gen.runtime.pipelines_core.placement import place
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, ServerArgs, resolve_server_args
from sglang.multimodal_gen.test.measured_steps import FLUX, WAN_1_3B, WAN_14B, Z_IMAGE

TURBO = "Tongyi-MAI/Z-Image-Turbo"
EXPERTS = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
Capture = pytest.CaptureFixture[str]


def planned(model: str, num_gpus: int, *, gib: float = 80, **options: Any) -> ParallelPlan:
    outline = outline_of(get_model_info(model))
    params, hardware = options.pop("params", SamplingParams()), options.pop("hardware", H100)
    return plan_layouts(
        outline, outline.work(params), PlanOptions(num_gpus=num_gpus, hardware=hardware, gpu_bytes=gib * GIB, **options)
    )


def chosen(model: str, num_gpus: int, **options: Any) -> ReplicaShape:
    plan = planned(model, num_gpus, **options).chosen
    assert plan is not None
    return plan.shape


@pytest.mark.parametrize(
    ("model", "num_gpus", "shape"),
    [
        (WAN_1_3B, 2, ReplicaShape(cfg=2)),  # two rows: guidance first
        (WAN_14B, 4, ReplicaShape(cfg=2, ulysses=2)),
        (WAN_14B, 8, ReplicaShape(cfg=2, ulysses=4)),
        (WAN_1_3B, 6, ReplicaShape(cfg=2, ulysses=3)),
        (WAN_14B, 6, ReplicaShape(cfg=2, ring=3)),  # 40 heads do not divide by 3
        (FLUX, 2, ReplicaShape(ulysses=2)),  # one row
        (FLUX, 8, ReplicaShape(ulysses=8)),
        (FLUX, 7, ReplicaShape(ring=7)),
        ("hunyuanvideo-community/HunyuanVideo", 4, ReplicaShape(ulysses=4)),
        (Z_IMAGE, 4, ReplicaShape(cfg=2, ulysses=2)),
        (Z_IMAGE, 8, ReplicaShape(cfg=2, ring=2, ulysses=2)),
        (TURBO, 4, ReplicaShape(ring=2, ulysses=2)),  # 30 heads do not divide by 4
        ("demo", 2, ReplicaShape(cfg=2)),
    ],
)
def test_guidance_is_dealt_first_then_heads_then_the_ring(model: str, num_gpus: int, shape: ReplicaShape) -> None:
    assert chosen(model, num_gpus) == shape


@pytest.mark.parametrize("num_gpus", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("model", ["demo", *published_ids()])
def test_every_model_gets_a_layout_that_its_heads_allow(model: str, num_gpus: int) -> None:
    shape = chosen(model, num_gpus)
    assert shape.num_ranks == num_gpus
    shape.check_heads(outline_of(get_model_info(model)).shape.num_heads)


def test_weights_are_divided_only_where_they_do_not_fit_otherwise() -> None:
    assert chosen(EXPERTS, 4, gib=80).tp == 1
    assert chosen(EXPERTS, 4, gib=52).tp == 2
    assert chosen(EXPERTS, 8, gib=32).tp == 4
    assert chosen(WAN_14B, 2, gib=40) == ReplicaShape(tp=2)


def test_weights_that_fit_stay_whole_even_where_dividing_them_would_be_faster() -> None:
    """More tokens than are exchanged at once, so that Ulysses begins more exchanges than there are sums."""
    slow_exchanges = dataclasses.replace(H100, exchange_launch_s=2e-2)
    large = SamplingParams(width=2560, height=2560)
    plan = planned(TURBO, 2, hardware=slow_exchanges, fixed={"ring": 1}, params=large)
    by_shape = {layout.shape: layout.speedup or 0.0 for layout in plan.layouts if layout.dp == 1}
    assert by_shape[ReplicaShape(tp=2)] > 1.2 * by_shape[ReplicaShape(ulysses=2)]
    assert plan.chosen is not None and plan.chosen.shape == ReplicaShape(ulysses=2)
    assert "the fastest that keeps the weights whole with the degrees asked for" in plan.reason


def test_where_nothing_fits_the_layout_that_needs_least_is_taken_and_said_so() -> None:
    plan = planned(EXPERTS, 2, gib=24)
    assert plan.chosen is not None and plan.chosen.shape == ReplicaShape(tp=2) and not plan.chosen.fits
    assert "do not fit into 24" in plan.reason


def test_a_request_without_guidance_has_nothing_to_deal_to_a_second_branch() -> None:
    params = SamplingParams(guidance_scale=1.0)
    assert chosen(WAN_14B, 2, params=params) == ReplicaShape(ulysses=2)
    by_shape = {plan.shape: plan for plan in planned(WAN_14B, 2, params=params).layouts if plan.dp == 1}
    assert "a step has 1 row, so cfg 2 computes the same" in (by_shape[ReplicaShape(cfg=2)].problem or "")


@pytest.mark.parametrize(
    ("model", "params", "rows"),
    [
        (FLUX, {}, 1),
        (FLUX, {"true_cfg_scale": 4.0}, 1),  # there is no negative prompt
        (FLUX, {"true_cfg_scale": 4.0, "negative_prompt": "fog"}, 2),
        (Z_IMAGE, {"guidance_scale": 0.5}, 2),
        (TURBO, {}, 1),
        ("Qwen/Qwen-Image", {}, 2),
        ("Qwen/Qwen-Image", {"true_cfg_scale": 1.0}, 1),
    ],
)
def test_rows_of_a_step_are_those_that_guidance_needs(model: str, params: dict[str, Any], rows: int) -> None:
    assert outline_of(get_model_info(model)).work(SamplingParams(**params)).rows == rows


def test_tokens_of_a_step_follow_the_size() -> None:
    outline = outline_of(get_model_info(WAN_14B))
    assert outline.work(SamplingParams(width=832, height=480)).image_tokens == 21 * 30 * 52
    assert outline.work(SamplingParams(num_frames=1)).image_tokens == 45 * 80
    edit = outline_of(get_model_info("Qwen/Qwen-Image-Edit"))
    assert edit.work().image_tokens == 2 * 64 * 64  # the picture that is edited is tokens too
    assert outline_of(get_model_info("Wan-AI/Wan2.2-TI2V-5B-Diffusers")).work().image_tokens == 31 * 22 * 40


# --- options of the server ---


def degrees(**options: Any) -> tuple[ReplicaShape, tuple[str, ...]]:
    resolved = resolve_server_args(options, environ={})
    return resolved.args.parallel.replica, (*resolved.notes, *resolved.warnings)


def test_degrees_left_unset_are_chosen_and_the_reason_is_told() -> None:
    shape, (reason,) = degrees(model_path=TURBO, num_gpus=4)
    assert shape == ReplicaShape(ring=2, ulysses=2)
    assert reason.startswith("layout ring 2 x ulysses 2 for 4 GPUs: the fastest, about 2.")
    assert "a step has 1 row and 30 attention heads" in reason
    sources = resolve_server_args({"model_path": TURBO, "num_gpus": 4}, environ={}).sources
    assert (sources["ring_degree"], sources["ulysses_degree"], sources["num_gpus"]) == ("chosen", "chosen", "flag")


def test_degrees_that_were_given_are_kept() -> None:
    assert degrees(model_path=WAN_1_3B, num_gpus=4, tp_size=2)[0] == ReplicaShape(cfg=2, tp=2)
    assert degrees(model_path=WAN_1_3B, num_gpus=4, cfg_parallel_size=1)[0] == ReplicaShape(ulysses=4)
    assert degrees(model_path=WAN_1_3B, num_gpus=4, ring_degree=2)[0] == ReplicaShape(cfg=2, ring=2)
    shape, said = degrees(
        model_path=WAN_1_3B, num_gpus=4, cfg_parallel_size=1, ring_degree=2, ulysses_degree=2, tp_size=1
    )
    assert (shape, said) == (ReplicaShape(ring=2, ulysses=2), ())  # nothing was chosen


def test_what_speaks_against_degrees_that_were_given_is_a_warning() -> None:
    resolved = resolve_server_args({"model_path": FLUX, "num_gpus": 2, "cfg_parallel_size": 2}, environ={})
    assert resolved.args.parallel.replica == ReplicaShape(cfg=2)
    assert "a step has 1 row" in resolved.warnings[-1] and not resolved.notes


def test_in_python_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        args = ServerArgs.from_kwargs(num_gpus=2)
    assert args.parallel.replica == ReplicaShape(cfg=2)
    assert "layout cfg 2 for 2 GPUs" in caplog.text


def test_generate_tells_the_reason_where_it_logs(capsys: Capture) -> None:
    generate.configure(["--prompt", "a", "--num-gpus", "2"])
    assert capsys.readouterr().err == ""
    generate.configure(["--prompt", "a", "--num-gpus", "2", "--log-level", "info"])
    assert "layout cfg 2 for 2 GPUs" in capsys.readouterr().err
    assert serve.configure(["--num-gpus", "2"]).resolved.notes[0].startswith("layout cfg 2")


def test_a_model_that_is_not_known_before_it_loads_gets_ulysses_and_says_why() -> None:
    shape, (reason,) = degrees(model_path="somebody/something", num_gpus=4, tp_size=2)
    assert shape == ReplicaShape(ulysses=2, tp=2)
    assert reason.startswith("Ulysses takes the 2 GPUs that are left, since nothing better can be said")
    assert "somebody/something" in reason


def test_a_directory_is_planned_by_its_own_configs_and_files() -> None:
    resolved = get_model_info(str(published_directory(TURBO)), model_id=TURBO)
    assert outline_of(resolved).parameters["transformer"] == pytest.approx(6.15e9, rel=0.01)
    demo = outline_of(get_model_info("demo"))
    assert sum(demo.parameters.values()) > demo.parameters["transformer"] > 8e6


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"num_gpus": 4, "tp_size": 3},
            "num_gpus: got 4, accepted is the product of the parallel degrees: dp_size 1 × cfg_parallel_size 1 × "
            "ring_degree 1 × ulysses_degree 1 × tp_size 3 = 3; with those left unset chosen to fit, 3 or 6",
        ),
        (
            {"num_gpus": 4, "cfg_parallel_size": 1, "ring_degree": 1, "ulysses_degree": 2, "tp_size": 1, "dp_size": 1},
            "num_gpus: got 4, accepted is the product of the parallel degrees: dp_size 1 × cfg_parallel_size 1 × "
            "ring_degree 1 × ulysses_degree 2 × tp_size 1 = 2",
        ),
        (
            {"model_path": TURBO, "ulysses_degree": 4},
            "ulysses_degree: got 4, accepted is 1, 2, 3, 5, 6, 10, 15, 30: what divides the transformer's 30 attention "
            "heads",
        ),
        (
            {"model_path": TURBO, "num_gpus": 8, "tp_size": 4},
            "tp_size: got 4, accepted is 1, 2, 3, 5, 6, 10, 15, 30: what divides the transformer's 30 attention heads",
        ),
        (
            {"model_path": TURBO, "num_gpus": 4, "cfg_parallel_size": 1, "ring_degree": 1},
            "num_gpus: got 4, accepted is a number whose part for ulysses_degree and tp_size, here 4 / 1 = 4, divides "
            "the transformer's 30 attention heads; left unset, cfg_parallel_size and ring_degree take any number",
        ),
        (
            {"model_path": WAN_1_3B, "num_gpus": 2, "backend": "diffusers"},
            "num_gpus: got 2, accepted is 1 for a pipeline that diffusers runs",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_anything_starts(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        resolve_server_args(options, environ={})
    assert str(caught.value) == sentence


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidValue, match=r"^num_gpus: got 4, accepted is at most 2, the CUDA devices that are vis"):
        place(ExecutionArgs(), num_gpus=4)
    assert place(ExecutionArgs(device="cpu"), num_gpus=4).device.type == "cpu"


def test_a_checkpoint_whose_header_is_torn_is_named(tmp_path: Path) -> None:
    for path in published_directory(TURBO).rglob("*.json"):
        copy = tmp_path / "model" / path.relative_to(published_directory(TURBO))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x04\0\0\0\0\0\0\0nope")
    with pytest.raises(CorruptCheckpoint, match=r"^vae/diffusion_pytorch_model.safetensors has no header"):
        outline_of(get_model_info(str(tmp_path / "model")))


def test_a_model_without_a_known_transformer_has_no_outline() -> None:
    with pytest.raises(UnsupportedModel, match="has no transformer whose configs are known before it loads"):
        outline_of(get_model_info("null-model"))


def test_without_a_driver_no_gpu_is_found() -> None:
    found = gpus_of_this_machine()
    assert len(found) >= torch.cuda.device_count()
    assert all(gpu.memory_bytes > GIB and gpu.name for gpu in found)


# --- the command ---


def test_the_plan_lists_every_layout_and_marks_the_chosen_one(capsys: Capture) -> None:
    assert main(["plan", "--model-path", TURBO, "--num-gpus", "4", "--gpu-memory", "80", "--gpu", "h100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2].strip() for line in lines if line.startswith("  ->")] == ["ring 2 x ulysses 2"]
    assert any("ulysses 4 " in line and "30 attention heads do not divide by ulysses 4" in line for line in lines)
    assert any(line.strip().startswith("dp 4 x one rank") for line in lines)
    assert any(line.startswith("layout ring 2 x ulysses 2 for 4 GPUs: ") for line in lines)


def test_the_plan_as_json_holds_what_the_table_shows(capsys: Capture) -> None:
    command = ["plan", "--model-path", WAN_14B, "--num-gpus", "8", "--gpu-memory", "80", "--gpu", "h200", "--json"]
    assert main([*command, "--width", "832", "--height", "480"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu"], found["rows"], found["image_tokens"]) == ("h200", 2, 32_760)
    assert len(found["layouts"]) == 20 + 10 + 4 + 1
    [taken] = [layout for layout in found["layouts"] if layout["chosen"]]
    assert (taken["cfg"], taken["ulysses"], taken["dp"]) == (2, 4, 1)
    assert taken["speedup"] == pytest.approx(found["one_gpu_step_seconds"] / taken["step_seconds"])
    assert taken["memory_bytes"] > taken["transformer_bytes"] + taken["activation_bytes"]


def test_degrees_and_files_of_options_shape_the_plan(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"model-path: {WAN_1_3B}\nnum-gpus: 4\ngpu-memory: 80\nguidance-scale: 1\n")
    assert main(["plan", "--config", str(tmp_path / "plan.yaml"), "--tp-size", "2"]) == 0
    assert "layout ulysses 2 x tp 2 for 4 GPUs" in capsys.readouterr().out
    assert main(["plan", "--model-path", "a/b"]) == 2
    assert "a/b has no transformer" in capsys.readouterr().err


def test_planning_loads_nothing_heavy() -> None:
    script = (
        "import sys; from sglang.cli.main import main; main(['plan', '--num-gpus', '8', '--json']); "
        "print(sorted({'torch', 'numpy', 'zmq', 'yaml', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def report(**changes: Any) -> dict[str, Any]:
    """As `sglang bench parallel --json` writes it, as far as it is read."""
    layouts = [
        ({"cfg": 1, "ring": 1, "ulysses": 1, "tp": 1}, 0.12),
        ({"cfg": 1, "ring": 1, "ulysses": 2, "tp": 1}, 0.08),
    ]
    return {
        "benchmark": "parallel",
        "options": {"batch_size": 1, "width": None, "engine": {"model": {"model_path": FLUX, "model_id": None}}},
        "result": {
            "device_name": "NVIDIA H200",
            "layouts": [{"shape": shape, "seconds": {"median": seconds}} for shape, seconds in layouts],
        },
    } | changes


def test_the_plan_is_compared_with_what_was_measured(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report()))
    assert main(["plan", "--compare", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"].endswith("1 rows of 4096 tokens, NVIDIA H200 as h200")
    assert [layout["ulysses"] for layout in found["layouts"]] == [1, 2]
    assert all(abs(layout["error"]) < 0.15 for layout in found["layouts"])
    assert main(["plan", "--compare", str(path)]) == 0
    assert "ulysses 2" in capsys.readouterr().out


def test_what_is_no_report_of_that_benchmark_is_refused(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    for text in ("{", "[]", json.dumps(report(options={})), json.dumps(report(result={"layouts": 3}))):
        path.write_text(text)
        assert main(["plan", "--compare", str(path)]) == 1
        assert "accepted is a file that `sglang bench parallel --json` wrote" in capsys.readouterr().err
