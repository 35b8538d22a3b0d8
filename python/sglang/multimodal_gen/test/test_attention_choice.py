"""The table of measured attention kernels: what is written is chosen, what does not fit is not, all ranks agree.

And `bench attention`, which writes it, and attention in 8 bits, which it never names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.cli.main import main
from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue, MissingParameter, StorageError
from sglang.multimodal_gen.runtime.bench.attention import cases_of
from sglang.multimodal_gen.runtime.bench.options import check_attention_options
from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE
from sglang.multimodal_gen.runtime.layers.attention import fp8
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.attention.choice_table import (
    AttentionShape,
    ChoiceTable,
    TableEntry,
    attention_file,
    identity_of,
    merge_into_table,
    ranked,
    read_table,
    token_bucket,
)
from sglang.multimodal_gen.runtime.layers.attention.dispatch import KernelSelector
from sglang.multimodal_gen.runtime.layers.attention.kernels import TorchReference
from sglang.multimodal_gen.runtime.layers.attention.registry import device_facts
from sglang.multimodal_gen.runtime.layers.attention.switch import choice_memory_of
from sglang.multimodal_gen.runtime.layers.attention.tabled import ChoiceMemory, SeenShape, TabledKernel
from sglang.multimodal_gen.runtime.layers.attention.traits import DeviceFacts, LayerNeeds
from sglang.multimodal_gen.runtime.layers.attention.tuning import AttentionInputs, timed_kernels, tuned_entry
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan
from sglang.multimodal_gen.runtime.managers.warm_up import WarmUp
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.attention_choice import AttentionTuner, read_choices
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, WarmupArgs
from sglang.multimodal_gen.test.test_attention_dispatch import ALL, HOPPER, gpu

CPU = torch.device("cpu")
FP32 = LayerNeeds(precision="fp32", head_dim=16)
Capture = pytest.CaptureFixture[str]


def shape(queries: int = 6, keys: int = 6, **values: Any) -> AttentionShape:
    return AttentionShape(
        **{"precision": "fp32", "head_dim": 16, "num_heads": 2, "masked": False}
        | {"queries": token_bucket(queries), "keys": token_bucket(keys)}
        | values
    )


def entry(*kernels: str, at: AttentionShape | None = None) -> TableEntry:
    return TableEntry(shape=at or shape(), kernels=kernels, seconds=dict.fromkeys(kernels, 1e-3))


def memory(*entries: TableEntry, notes_shapes: bool = False) -> ChoiceMemory:
    return ChoiceMemory(ChoiceTable(entries, origin="the table x.json"), notes_shapes=notes_shapes)


def tokens(number: int, *, heads: int = 2, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, number, heads, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(envs.CACHE_ROOT, str(tmp_path))
    return tmp_path


def test_tokens_are_rounded_up_to_two_sizes_an_octave() -> None:
    assert [token_bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 4097, 6144, 6145)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 6144, 6144, 8192
    ]  # fmt: skip


def test_the_usual_kernel_stays_first_unless_another_is_faster_by_more_than_noise() -> None:
    assert ranked({"fa3": 1.0, "fa2": 0.98, "torch_sdpa": 2.0}, "fa3") == ("fa3", "fa2", "torch_sdpa")
    assert ranked({"fa3": 1.0, "fa2": 0.9}, "fa3") == ("fa2", "fa3")
    assert ranked({"fa2": 2.0, "torch_sdpa": 1.0}, "fa3") == ("torch_sdpa", "fa2")


@pytest.mark.parametrize(
    ("needs", "kernels", "chosen"),
    [
        (FP32, ("torch_reference", "torch_sdpa"), "torch_reference"),
        (FP32, ("fa3", "torch_reference"), "torch_reference"),  # no such device
        (FP32, ("sage_attn", "fa3_fp8"), "torch_sdpa"),  # lossy ones never
        (LayerNeeds(precision="bf16", head_dim=16), ("torch_reference",), "torch_sdpa"),  # other precision
    ],
)
def test_a_call_takes_the_first_kernel_of_its_shape_that_can_serve(
    needs: LayerNeeds, kernels: tuple[str, ...], chosen: str
) -> None:
    source = KernelSelector(role="self", facts=device_facts(CPU), memory=memory(entry(*kernels)))
    kernel = source.kernel(needs)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[needs.precision]
    query = tokens(6).to(dtype)
    found = kernel.kernel_for(query, query, masked=False) if isinstance(kernel, TabledKernel) else kernel
    assert found.name == chosen


def test_masks_and_the_log_sum_exp_rule_kernels_out_of_a_layer() -> None:
    facts, masked = gpu(HOPPER, *ALL), LayerNeeds(precision="bf16", head_dim=128, mask=True)
    source = KernelSelector(role="self", facts=facts, memory=memory())
    assert source.is_admissible("fa2", LayerNeeds(precision="bf16", head_dim=128))
    assert not source.is_admissible("fa2", masked)
    assert not source.is_admissible("torch_cudnn_sdpa", LayerNeeds(precision="bf16", head_dim=128, lse=True))
    assert not source.is_admissible("fa3_fp8", LayerNeeds(precision="bf16", head_dim=128))
    assert not source.is_admissible("no_such_kernel", LayerNeeds(precision="bf16", head_dim=128))


def test_each_shape_has_its_own_kernel_and_results_are_that_kernels() -> None:
    held = memory(entry("torch_reference"), entry("torch_reference", at=shape(masked=True)))
    kernel = KernelSelector(role="self", facts=device_facts(CPU), memory=held).kernel(
        LayerNeeds(precision="fp32", head_dim=16, mask=True, lse=True)
    )
    assert isinstance(kernel, TabledKernel) and kernel.name not in ("torch_sdpa", "torch_reference")
    query, key, mask = tokens(6), tokens(6, seed=1), torch.tensor([True] * 4 + [False] * 2)[None, None, None]
    expected = TorchReference()(query, key, key, scale=0.3, mask=mask)
    assert torch.equal(kernel(query, key, key, scale=0.3, mask=mask), expected)
    assert torch.equal(kernel.with_lse(query, key, key, scale=0.3)[1], TorchReference().with_lse(
        query, key, key, scale=0.3)[1])  # fmt: skip
    assert kernel.kernel_for(query, key, masked=True).name == "torch_reference"
    assert kernel.kernel_for(tokens(9), key, masked=False).name == "torch_sdpa"
    assert kernel.kernel_for(tokens(6, heads=3), key, masked=False).name == "torch_sdpa"


def test_who_asks_for_a_kernel_gets_it_whatever_the_table_says() -> None:
    plan = AttentionPlan.chosen(
        "self", ExecutionArgs(attention_backend="torch_sdpa"), facts=device_facts(CPU), precision="fp32",
        memory=memory(entry("torch_reference")),
    )  # fmt: skip
    assert plan.build(16).kernel.name == "torch_sdpa"


def test_the_file_survives_writing_merging_and_reading(cache: Path) -> None:
    file = attention_file(cache, identity_of(CPU))
    assert read_table(file) == ((), "")
    other = entry("torch_sdpa", at=shape(queries=100))
    file.write([entry("torch_sdpa")])
    merge_into_table(file, [entry("torch_reference"), other])
    assert read_table(file) == ((entry("torch_reference"), other), "")
    assert list(file.path.parent.iterdir()) == [file.path]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "is ignored: Input data was truncated"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "its schema is 9"),
        (lambda text: text.replace('"device": "cpu', '"device": "NVIDIA H100'), "measured on another GPU"),
        (lambda text: text.replace('"torch_sdpa"', '"warp_drive"'), "'warp_drive', which is no kernel"),
        (lambda text: text.replace('"masked": false', '"masked": "maybe"'), "Expected `bool`"),
    ],
)
def test_a_corrupt_or_foreign_table_is_ignored_with_one_line(
    damage: Callable[[str], str], reason: str, cache: Path
) -> None:
    file = attention_file(cache, identity_of(CPU))
    file.write([entry("torch_sdpa")])
    file.path.write_text(damage(file.path.read_text()))
    heard: list[str] = []
    found = read_choices(CPU, SINGLE, autotune=False, report=heard.append)
    assert found.table.entries == ()
    [line] = heard
    assert file.path.name in line and reason in line


def test_every_rank_has_the_first_ones_table(cache: Path) -> None:
    attention_file(cache, identity_of(CPU)).write([entry("torch_reference")])
    program = """
        import sys
        from pathlib import Path
        import torch
        from sglang.multimodal_gen import envs
        from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
        from sglang.multimodal_gen.runtime.distributed.parallel_state import join_replica
        from sglang.multimodal_gen.runtime.pipelines_core.attention_choice import read_choices
        envs.meet_on_loopback()
        rank, device = int(sys.argv[1]), torch.device("cpu")
        parallel = join_replica(ReplicaShape(ulysses=2), rank, store=Path(sys.argv[2]), device=device, timeout_s=60)
        table = read_choices(device, parallel, autotune=False, report=print).table
        print([entry.kernels for entry in table.entries])
        """
    (cache / "elsewhere").mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(rank), str(cache / "store")],
            env={**os.environ, envs.CACHE_ROOT: str(cache if rank == 0 else cache / "elsewhere")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["[('torch_reference',)]"] * 2


def slow_sdpa(seen: SeenShape, facts: DeviceFacts, device: torch.device) -> TableEntry:
    return entry("torch_reference", "torch_sdpa", at=seen.shape)


def test_a_warm_up_is_measured_once_no_request_runs_and_remembered(cache: Path) -> None:
    execution = ExecutionArgs(enable_attention_backend_autotune=True)
    choices = read_choices(CPU, SINGLE, autotune=True, report=print)
    plan = AttentionPlan.chosen("self", execution, facts=device_facts(CPU), precision="fp32", memory=choices)
    layer: Attention = plan.build(16)
    tuner = AttentionTuner([layer], CPU, SINGLE, measure=slow_sdpa)

    def present() -> str:
        assert isinstance(layer.kernel, TabledKernel)
        return layer.kernel.kernel_for(tokens(6), tokens(6), masked=False).name

    layer(tokens(6), tokens(6), tokens(6))
    tuner.request_ended(was_warm_up=False, others_run=False)
    assert present() == "torch_sdpa"
    tuner.request_ended(was_warm_up=True, others_run=True)
    assert present() == "torch_sdpa"
    tuner.request_ended(was_warm_up=False, others_run=False)
    assert present() == "torch_reference"
    again = read_choices(CPU, SINGLE, autotune=False, report=print)
    assert again.table.kernels_for(shape()) == ("torch_reference", "torch_sdpa")
    layer(tokens(6), tokens(6), tokens(6))
    assert not choices.seen


@pytest.mark.parametrize("asked", [None, "off"])
def test_what_is_measured_or_compiled_at_first_has_a_warm_up_unless_it_is_turned_off(asked: str | None) -> None:
    assert not ExecutionArgs().needs_warm_up
    for option in ("enable_attention_backend_autotune", "enable_torch_compile"):
        assert ExecutionArgs(**{option: True}).needs_warm_up
    warm_up = WarmUp(WarmupArgs(warmup_mode=asked), is_needed=True)
    assert warm_up.choose_mode(serves_http=False, device="cpu") == (asked or "server")


def test_what_a_layer_was_called_with_is_what_is_measured() -> None:
    held = memory(notes_shapes=True)
    kernel = KernelSelector(role="self", facts=device_facts(CPU), memory=held).kernel(FP32)
    kernel(tokens(5), tokens(9), tokens(9), scale=1.0)
    [seen] = held.seen.values()
    assert (seen.batch_size, seen.num_queries, seen.num_keys, seen.usual) == (1, 5, 9, "torch_sdpa")
    assert seen.shape == shape(5, 9)
    # On a CPU there is one exact kernel beside the reference, so nothing to choose.
    assert tuned_entry(seen, device_facts(CPU), CPU) is None


def test_kernels_are_timed_in_turns_and_one_that_fails_is_left_out() -> None:
    inputs = AttentionInputs.drawn("fp32", (1, 8, 2, 16), num_keys=8, masked=True, device=CPU)
    names = ("torch_sdpa", "torch_reference", "torch_cudnn_sdpa")
    samples, problems = timed_kernels(inputs, names[:2], device=CPU, warmup_runs=0, repeats=3)
    assert {name: len(own) for name, own in samples.items()} == {"torch_sdpa": 3, "torch_reference": 3}
    assert inputs.error_of(inputs.attended_by(TorchReference())) == 0
    large = AttentionInputs.drawn("fp32", (1, 40_000, 8, 1), num_keys=4000, masked=False, device=CPU)
    samples, problems = timed_kernels(large, ["torch_reference"], device=CPU, warmup_runs=0, repeats=1)
    assert samples == {} and "GiB" in problems["torch_reference"]


def test_a_pipeline_uses_the_table_and_says_so(wan_checkpoint: Callable[[str], Path], cache: Path) -> None:
    """And what the reference computes is what torch's kernel computes, but for the order of summation."""
    request = {"prompt": "a dot", "width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 1, "seed": 3}

    def latents(heard: list[str], **options: Any) -> tuple[torch.Tensor, list[Attention]]:
        execution = ExecutionArgs(device="cpu", **options)
        pipeline = build_pipeline(str(wan_checkpoint("plain")), execution, report=heard.append)
        with torch.inference_mode():
            req = pipeline.admit("r", SamplingParams.from_values({**request, "max_sequence_length": 12}))
            for phase in req.phases[:2]:
                pipeline.run_unit(phase.name, [req])
        assert req.latents is not None
        return req.latents, [layer for layer in pipeline.transformer.modules() if isinstance(layer, Attention)]

    before: list[str] = []
    expected, layers = latents(before, enable_attention_backend_autotune=True)
    assert not any("table" in line for line in before)
    choices = choice_memory_of(layers)
    assert choices is not None
    seen = [entry("torch_reference", at=shape) for shape, _ in choices.seen]
    assert {each.shape.queries == each.shape.keys for each in seen} == {True, False}, "self- and cross-attention"
    attention_file(cache, identity_of(CPU)).write(seen)
    after: list[str] = []
    found, layers = latents(after)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert {layer.kernel.name for layer in layers} == {"torch_sdpa*"}
    kernels = [kernel.name for layer in layers for kernel in layer.kernel._chosen.values()]  # type: ignore[attr-defined]
    assert len(kernels) == len(layers) and set(kernels) == {"torch_reference"}
    assert any(line.startswith("self-attention torch_sdpa") and "but by the table cpu-" in line for line in after)


# bench attention


def bench_json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main(["bench", "attention", *arguments, "--warmup-runs", "0", "--repeats", "2", "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["result"]
    return found


def test_the_benchmark_times_what_runs_and_saves_what_an_engine_reads(cache: Path, capsys: Capture) -> None:
    own = ["--queries", "33", "--keys", "7", "--heads", "2", "--head-dim", "16", "--batch-size", "3", "--masked"]
    result = bench_json(capsys, *own, "--save")
    [case] = result["cases"]
    assert case["flops"] == 4 * 3 * 33 * 7 * 2 * 16
    assert set(case["kernels"]) == {"torch_sdpa", "torch_reference"} and case["usual"] == "torch_sdpa"
    for times in case["kernels"].values():
        assert times["error"] < 1e-5 and not times["lossy"]
        assert times["flops_per_second"] == pytest.approx(case["flops"] / times["seconds"]["median"])
        assert times["matmul_ratio"] == pytest.approx(times["flops_per_second"] / result["matmul_flops_per_second"])
    assert case["problems"]["fa3"] == "needs a CUDA device and this one is cpu"
    assert Path(result["table"]) == attention_file(cache, identity_of(CPU)).path
    [saved] = read_choices(CPU, SINGLE, autotune=False, report=print).table.entries
    assert saved.shape == shape(33, 7, masked=True) and saved.kernels[0] == case["chosen"]


def test_a_table_that_cannot_be_written_is_an_error(cache: Path, capsys: Capture) -> None:
    (cache / "attention").write_text("a file where the directory should be")
    assert main(["bench", "attention", "--queries", "4", "--heads", "1", "--head-dim", "8", "--repeats", "1", "--save"])
    assert "save: cannot write" in capsys.readouterr().err
    assert StorageError.code


def test_the_shapes_of_models_are_listed_once_under_all_their_names() -> None:
    options = {"queries": None, "models": ("black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")}
    flux, self_attention, cross_attention = cases_of(options)
    assert (flux.batch_size, flux.queries, flux.keys, flux.heads, flux.head_dim) == (1, 4608, 4608, 24, 128)
    assert (self_attention.queries, self_attention.keys, self_attention.heads) == (32760, 32760, 12)
    assert (cross_attention.queries, cross_attention.keys, cross_attention.batch_size) == (32760, 512, 2)
    every = cases_of({"queries": None, "models": None})
    assert any(len(case.names) > 1 for case in every)
    assert len({(c.batch_size, c.queries, c.keys, c.heads, c.head_dim) for c in every}) == len(every)


@pytest.mark.parametrize(
    ("given", "error", "param"),
    [
        ({"queries": 4}, MissingParameter, "heads"),
        ({"keys": 4}, MissingParameter, "queries"),
        ({"masked": True}, MissingParameter, "queries"),
        ({"queries": 4, "heads": 1, "head_dim": 8, "models": ("demo",)}, InvalidValue, "models"),
    ],
)
def test_half_a_shape_is_refused(given: dict[str, Any], error: type[Exception], param: str) -> None:
    nothing = dict.fromkeys(("queries", "keys", "heads", "head_dim", "models")) | {"masked": False}
    with pytest.raises(error) as caught:
        check_attention_options(nothing | given)
    assert caught.value.param == param  # type: ignore[attr-defined]


# Eight bits

FP8_PACKAGE = """
    import torch
    def flash_attn_func(q, k, v, softmax_scale=None, q_descale=None, k_descale=None, v_descale=None,
                        return_attn_probs=False):
        assert {q.dtype, k.dtype, v.dtype} == {torch.float8_e4m3fn}
        assert q_descale.shape == (q.shape[0], q.shape[2]) and q_descale.dtype == torch.float32
        q, k, v = (t.float() * d[:, None, :, None] for t, d in ((q, q_descale), (k, k_descale), (v, v_descale)))
        logits = torch.einsum("bshe,blhe->bhsl", q, k) * softmax_scale
        out = torch.einsum("bhsl,blhe->bshe", logits.softmax(-1), v).bfloat16()
        return (out, logits.logsumexp(-1)) if return_attn_probs else out
    """


@pytest.fixture
def eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], fp8.FlashAttention3FP8]:
    """The kernel over a package of this source."""

    def kernel(source: str) -> fp8.FlashAttention3FP8:
        (tmp_path / "flash_attn_interface.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
        return fp8.FlashAttention3FP8()

    yield kernel
    sys.modules.pop("flash_attn_interface", None)


def test_each_head_has_a_scale_of_its_own_and_is_rounded_once() -> None:
    heads = torch.tensor([1e-3, 1.0, 300.0, 0.0])
    given = (tokens(50, heads=4) * heads[None, None, :, None]).bfloat16()
    quantised, descale = fp8.quantised_heads(given)
    assert quantised.dtype == torch.float8_e4m3fn and descale.shape == (1, 4)
    back = quantised.float() * descale[:, None, :, None]
    # Half of the last of three fraction bits; the smallest numbers of a head have fewer.
    bound = given.float().abs() / 16 + descale[:, None, :, None] * 2**-10
    assert ((back - given.float()).abs() <= bound).all()
    assert (back[:, :, 3] == 0).all() and torch.isfinite(back).all()
    used = quantised.float().abs().amax(dim=(0, 1, 3))[:3]
    assert (used > 224).all(), "a head uses its range but for less than a factor of two"


def test_attention_in_eight_bits_is_near_the_exact_one(eight_bits: Callable[..., Any]) -> None:
    kernel = eight_bits(FP8_PACKAGE)
    sizes = torch.tensor([0.02, 1.0, 40.0])[None, None, :, None]
    query, key, value = ((tokens(40, heads=3, seed=seed)).bfloat16() for seed in range(3))
    value = value * sizes.bfloat16()
    exact, lse = TorchReference().with_lse(query, key, value, scale=0.25)
    found, found_lse = kernel.with_lse(query, key, value, scale=0.25)
    assert torch.equal(found, kernel(query, key, value, scale=0.25)) and found.dtype == torch.bfloat16
    difference, size = ((t.float().square().sum(dim=(0, 1, 3)).sqrt()) for t in (found - exact, exact))
    error = difference / size
    assert (error < 0.06).all(), error  # of every head, small or large
    assert (error > 1e-3).all(), "it is not exact, or it would not be in eight bits"
    torch.testing.assert_close(found_lse, lse, atol=0.1, rtol=0.05)


def test_a_release_without_descale_factors_is_told_apart(eight_bits: Callable[..., Any]) -> None:
    with pytest.raises(ImportError, match="without q_descale"):
        eight_bits("def flash_attn_func(q, k, v, softmax_scale=None): ...")
