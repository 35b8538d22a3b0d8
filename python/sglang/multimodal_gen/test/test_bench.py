"""`sglang bench`: real command lines at tiny sizes; what is reported must agree with itself and with hand counts."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from msgspec import structs

from sglang.cli.main import main
from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.models.encoders import UMT5EncoderConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, SamplingParams
from sglang.multimodal_gen.errors import BenchmarkFailed, IncompatibleParameters, MissingPackage, UnsupportedModel
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.bench import pipeline, report
from sglang.multimodal_gen.runtime.bench.child import BenchChild
from sglang.multimodal_gen.runtime.bench.idle import idle_time
from sglang.multimodal_gen.runtime.bench.machine import describe_machine
from sglang.multimodal_gen.runtime.bench.messages import (
    ComponentResult,
    ComponentTask,
    OutputError,
    ReferenceCall,
    StartupTask,
    StartupTimes,
)
from sglang.multimodal_gen.runtime.bench.options import BENCHMARKS
from sglang.multimodal_gen.runtime.bench.pipeline_result import Batch
from sglang.multimodal_gen.runtime.bench.startup import summarise_runs
from sglang.multimodal_gen.runtime.bench.statistics import compare, distribution, percentile, summarise
from sglang.multimodal_gen.runtime.bench.tables import Section, as_text, show_with_colour
from sglang.multimodal_gen.runtime.bench.worker import flops
from sglang.multimodal_gen.runtime.bench.worker.component import ComponentBench
from sglang.multimodal_gen.runtime.bench.worker.exactness import exact_output, output_error
from sglang.multimodal_gen.runtime.bench.worker.flops import count_flops
from sglang.multimodal_gen.runtime.bench.worker.memory import peak_bytes
from sglang.multimodal_gen.runtime.bench.worker.reference_module import require_reference
from sglang.multimodal_gen.runtime.bench.worker.reference_pipeline import ReferenceRunner
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent
from sglang.multimodal_gen.runtime.entrypoints.cli import bench
from sglang.multimodal_gen.runtime.entrypoints.cli.options import OptionParser
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import GenerationResult
from sglang.multimodal_gen.runtime.layers import device_timing
from sglang.multimodal_gen.runtime.layers.device_timing import time_in_turns
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.encoders.umt5 import UMT5EncoderModel
from sglang.multimodal_gen.runtime.pipelines_core import find_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.pipelines_core.workload import VideoDecoding, WorkSize
from sglang.multimodal_gen.runtime.server_args import ModelArgs, ServerArgs
from sglang.multimodal_gen.test import one_prompt_reference
from sglang.multimodal_gen.test.pipeline_parity import load, run_together
from sglang.multimodal_gen.test.test_cli import loaded_after, sentence_of
from sglang.multimodal_gen.test.tiny_families import FAMILIES, wish_of
from sglang.multimodal_gen.test.tiny_wan import TINY_TRANSFORMER, TINY_VAE, noise, vae_pair

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
SMALL = ["--width", "32", "--height", "32", "--num-frames", "5", "--warmup-runs", "0", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other on a busy machine take many times as long as one does for work this small."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def report_of(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """What `sglang bench … --json -` prints."""
    assert main(["bench", *arguments, "--json", "-"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def check_summary(summary: dict[str, Any], *, num_samples: int | None = None) -> None:
    """The median and all else lie within the samples, in their order."""
    samples = summary["samples"]
    assert num_samples is None or len(samples) == num_samples
    assert summary["minimum"] == min(samples) and summary["maximum"] == max(samples)
    assert summary["minimum"] <= summary["p10"] <= summary["median"] <= summary["p90"] <= summary["maximum"]


def check_ratio(ratio: dict[str, Any], ours: dict[str, Any], other: dict[str, Any]) -> None:
    assert ratio["value"] == pytest.approx(other["median"] / ours["median"])
    assert ratio["p10"] <= ratio["p90"]


# --- samples ---


def test_a_summary_interpolates_between_samples_and_keeps_their_order() -> None:
    summary = summarise([4.0, 1.0, 2.0, 3.0])
    assert (summary.median, summary.minimum, summary.maximum) == (2.5, 1.0, 4.0)
    assert (summary.p10, summary.p90) == pytest.approx((1.3, 3.7))
    assert summary.spread == pytest.approx(2.4 / 2.5)
    assert summary.samples == (4.0, 1.0, 2.0, 3.0)
    assert percentile([7.0], 0.9) == 7.0


def test_a_distribution_says_how_long_the_tail_is() -> None:
    found = distribution([float(number) for number in range(101)])
    assert found is not None
    assert (found.count, found.mean, found.maximum) == (101, 50.0, 100.0)
    assert (found.p50, found.p90, found.p95, found.p99) == (50.0, 90.0, 95.0, 99.0)
    assert distribution([]) is None


def test_a_ratio_is_the_others_time_over_ours_and_its_range_is_of_pairs() -> None:
    ratio = compare(summarise([1.0, 2.0, 4.0]), summarise([3.0, 4.0, 4.0]))
    assert ratio.value == 2.0
    assert (ratio.p10, ratio.p90) == pytest.approx((1.2, 2.8))


def test_sides_run_in_turns_until_both_the_count_and_the_time_are_reached() -> None:
    order: list[str] = []
    sides = [lambda: order.append("a"), lambda: order.append("b")]
    samples = time_in_turns(sides, lambda run: run() or 1.0, warmup_runs=1, repeats=2, min_seconds=3.0)
    assert samples == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert "".join(order) == "ab" * 4


def test_a_pause_comes_before_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(device_timing.time, "sleep", lambda seconds: order.append(f"pause {seconds}"))
    sides = [lambda: order.append("a"), lambda: order.append("b")]
    time_in_turns(sides, lambda run: run() or 1.0, warmup_runs=1, repeats=2, pause_seconds=0.5)
    assert order == ["a", "b", *(["pause 0.5", "a", "pause 0.5", "b"] * 2)]


def test_a_run_s_peak_is_what_it_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            # 64 MiB, freed before the next; up to 32 the C library may keep what was freed, and take more beside it.
            torch.ones(2**24)

    peak = peak_bytes(run, CPU)
    assert peak is not None and 63 << 20 < peak < 80 << 20


def test_starts_are_cut_where_their_moments_lie_and_the_longest_interval_is_named() -> None:
    runs = [
        (("imports", 1.0), ("torch", 4.0), ("ready", 4.0), ("first result", 9.0)),
        (("imports", 1.0), ("ready", 6.0), ("first result", 7.0)),
    ]
    result = summarise_runs("python", runs)
    assert result.ready_seconds.samples == (4.0, 6.0)
    assert result.first_result_seconds is not None and result.first_result_seconds.median == 8.0
    assert {name: summary.samples for name, summary in result.intervals.items()} == {
        "imports": (1.0, 1.0),
        "torch": (3.0, 0.0),
        "ready": (0.0, 5.0),
        "first result": (5.0, 1.0),
    }
    assert (result.dominant, result.dominant_share) == ("ready", 0.5)


def test_a_step_that_requests_share_is_counted_once() -> None:
    """Two requests share two steps of 60 ms; the second has one more of 20 ms for itself."""
    times = (([60.0, 60.0], [2, 2]), ([60.0, 60.0, 20.0], [2, 2, 1]))
    results = tuple(
        GenerationResult(
            prompt="a", prompt_index=0, output_index=index, seed=index, size=(16, 16, 1), output_file_path=None,
            generation_time=1.0, peak_memory_mb=1.0, metrics={"step_ms": step_ms, "step_batch_sizes": sizes},
        )
        for index, (step_ms, sizes) in enumerate(times)
    )  # fmt: skip
    batch = Batch(results=results, ends=(0.5, 0.7))
    assert batch.denoise_seconds == pytest.approx(0.14)
    assert batch.seconds == 0.7


# --- FLOPs ---


def dit_flops(
    config: WanTransformerConfig, latents: tuple[int, int, int], num_text_tokens: int, *, batch_size: int = 1
) -> int:
    """Counted by our counter on the meta device."""
    inputs = (
        torch.empty(batch_size, config.in_channels, *latents, device="meta"),
        torch.empty(batch_size, device="meta"),
        torch.empty(batch_size, num_text_tokens, config.text_dim, device="meta"),
    )
    return count_flops(WanTransformer3DModel, config, lambda module: module(*inputs))


@pytest.mark.parametrize(
    ("hub_id", "latents", "tera_flops"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (21, 60, 104), 283.0),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (21, 60, 104), 1678.4),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (21, 90, 160), 6523.4),
    ],
)
def test_the_published_transformers_cost_what_is_known_of_them(
    hub_id: str, latents: tuple[int, int, int], tera_flops: float
) -> None:
    """All blocks cost the same, so one and two of them tell the cost of all without tracing all."""
    config = WanTransformerConfig.from_dict(
        read_json_object(published_directory(hub_id) / "transformer" / "config.json")
    )
    one, two = (dit_flops(replace(config, num_layers=n), latents, 512) for n in (1, 2))
    assert (one + (config.num_layers - 1) * (two - one)) / 1e12 == pytest.approx(tera_flops, rel=1e-4)


def test_a_transformer_s_flops_are_those_counted_by_hand() -> None:
    config = WanTransformerConfig(**TINY_TRANSFORMER)
    tokens, text, width = 3 * 4 * 5, 7, config.hidden_size
    projections = 4 * tokens * width**2 + 2 * tokens * width**2 + 2 * text * width**2
    attention = 2 * tokens * tokens * width + 2 * tokens * text * width
    block = projections + attention + 2 * tokens * width * config.ffn_dim
    patches = tokens * width * 4 * (config.in_channels + config.num_output_channels)
    time = config.freq_dim * width + width**2 + 6 * width**2
    embedded_text = text * (config.text_dim * width + width**2)
    by_hand = 2 * (config.num_layers * block + patches + time + embedded_text)
    assert dit_flops(config, (3, 8, 10), text) == by_hand
    assert dit_flops(config, (3, 8, 10), text, batch_size=3) == 3 * by_hand


def test_an_encoder_s_flops_are_those_counted_by_hand() -> None:
    config = UMT5EncoderConfig(vocab_size=64, d_model=20, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    length, inner = 11, config.num_heads * config.d_kv
    layer = 4 * length * config.d_model * inner + 2 * length**2 * inner + 3 * length * config.d_model * config.d_ff
    ids = torch.empty(1, length, dtype=torch.long, device="meta")
    lengths = torch.empty(1, dtype=torch.long, device="meta")
    counted = count_flops(UMT5EncoderModel, config, lambda module: module(ids, lengths))
    assert counted == 2 * config.num_layers * layer


# --- components ---


def run_component(model_path: Path | str, workload: str, **changes: Any) -> ComponentResult:
    """A benchmark's child, in this process; its parent is the other end of a pipe that nobody reads.

    What the machine multiplies is measured with small matrices: no test looks at how fast it is."""
    args = ServerArgs.from_kwargs(model_path=str(model_path), **changes.pop("options", {}))
    task = ComponentTask(
        **{
            "engine": EngineConfig.of_this_process(args, run_dir=""),
            "workload": workload,
            "width": 32,
            "height": 32,
            "num_frames": 5,
            "max_sequence_length": 9,
            "chunk_frames": None,
            "batch_size": 2,
            "warmup_runs": 0,
            "repeats": 2,
            "min_seconds": 0.0,
            "compare": "diffusers",
        }
        | changes
    )
    ours, _theirs = Pipe()
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patched:
        patched.setitem(flops._MATMUL_SIZE, "cpu", 64)
        return ComponentBench(task, Parent(ours)).result()


@pytest.mark.parametrize(
    ("workload", "changes", "shape"),
    [
        ("dit", {}, (2, 4, 2, 4, 4)),
        ("dit", {"options": {"random_weights": True}}, (2, 4, 2, 4, 4)),
        ("vae_decode", {"chunk_frames": 1}, (2, 3, 5, 32, 32)),
        ("vae_encode", {}, (2, 4, 2, 4, 4)),
        ("encoder", {}, (2, 9, 20)),
    ],
)
def test_a_component_does_the_reference_s_work_and_the_report_agrees_with_itself(
    workload: str, changes: dict[str, Any], shape: tuple[int, ...], wan_checkpoint: Callable[[str], Path]
) -> None:
    result = run_component(wan_checkpoint("plain"), workload, **changes)
    assert result.output_shape == shape
    assert result.max_relative_difference is not None and result.max_relative_difference < 1e-4
    assert result.reference is not None and result.ratio is not None
    assert result.ratio.value == result.reference.seconds.median / result.ours.seconds.median
    for side in (result.ours, result.reference):
        assert len(side.seconds.samples) == 2
        assert side.flops_per_second == pytest.approx(result.flops / side.seconds.median)
        assert side.matmul_ratio == pytest.approx(side.flops_per_second / result.matmul_flops_per_second)
    assert result.weight_bytes == 4 * result.num_parameters


def test_quantised_weights_are_measured_against_the_same_ones_as_they_were(
    wan_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"random_weights": True, "quantization": "int8"}
    result = run_component(wan_checkpoint("plain"), "dit", compare=None, options=options)
    found = result.quantization
    assert found is not None
    assert 1e-4 < found.relative < 0.05
    assert result.weight_bytes < found.unquantized_weight_bytes == 4 * result.num_parameters
    assert len(found.unquantized_seconds.samples) == 2
    report.show("dit", describe_machine(), result)
    assert "against the same weights unquantised" in capsys.readouterr().out
    with pytest.raises(IncompatibleParameters, match="compare: diffusers cannot have these quantised weights"):
        run_component(wan_checkpoint("plain"), "dit", options=options)


def test_the_error_of_half_precision_is_against_fp32_with_the_same_weights() -> None:
    _, vae = vae_pair(TINY_VAE)
    workload, latents = VideoDecoding("vae"), noise(1, 4, 2, 3, 4)
    size = WorkSize(
        height=24, width=32, num_frames=5, latent_shape=(4, 2, 3, 4), batch_size=1, num_text_tokens=0, chunk_frames=1
    )
    with torch.no_grad():
        vae.bfloat16()
        exact = exact_output(workload, vae, (latents.bfloat16(),), size)
        error = output_error(vae.decode(latents.bfloat16()), exact, of_pixels=True)
    assert exact.dtype == torch.float32
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}, "the module stays as it was"
    assert 1e-4 < error.relative < 0.05, "bf16 has eight bits"
    assert error.psnr_db is not None and 30 < error.psnr_db < 80


def test_errors_and_kernels_are_shown(wan_checkpoint: Callable[[str], Path], capsys: Capture) -> None:
    result = run_component(wan_checkpoint("plain"), "vae_decode", profile=True)
    assert result.ours.error is None, "it is fp32 itself"
    assert result.kernels == tuple(sorted(result.kernels, key=lambda kernel: -kernel.seconds))
    assert any("conv" in kernel.name for kernel in result.kernels)
    assert sum(kernel.seconds for kernel in result.kernels) > 0
    error = OutputError(relative=0.0123, psnr_db=51.25)
    report.show("vae", describe_machine(), structs.replace(result, ours=structs.replace(result.ours, error=error)))
    shown = capsys.readouterr().out
    assert "where a run of ours spends its time" in shown
    assert "1.23e-02" in shown and "51.2 dB" in shown


def test_the_error_of_an_output_is_its_formula() -> None:
    exact = torch.tensor([0.5, -0.5, 1.0, -1.0])
    error = output_error((exact + 0.02).bfloat16().float(), exact, of_pixels=True)
    assert error.psnr_db == pytest.approx(40.0, abs=0.5)
    assert error.relative == pytest.approx(0.02 / 0.625**0.5, rel=0.05)
    same = output_error(exact, exact, of_pixels=True)
    assert (same.relative, same.psnr_db) == (0.0, None)


def test_a_model_without_components_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="null-model has no dit to measure; it has no component"):
        run_component("null-model", "dit")


def test_a_comparison_without_its_package_says_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackage, match="compare: needs the package diffusers"):
        require_reference()


def test_a_child_that_dies_ends_the_benchmark(tmp_path: Path) -> None:
    task = StartupTask(engine=EngineConfig.of_this_process(ServerArgs(), run_dir=""), num_inference_steps=1)
    with (
        BenchChild("sglang.multimodal_gen.runtime.bench.no_such_module", task) as child,
        pytest.raises(BenchmarkFailed, match="exited with status 1 before it had a result"),
    ):
        child.receive(StartupTimes)


# --- command lines ---


@pytest.mark.parametrize("arguments", [["--help"], ["dit", "--bad"], ["lora"]])
def test_nothing_heavy_loads_before_a_benchmark_runs(arguments: list[str]) -> None:
    assert loaded_after(f"from sglang.cli.main import main; main(['bench', *{arguments!r}])") == set()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_s_help_names_its_options_and_loads_nothing_heavy(name: str) -> None:
    parser = bench.parser(name)
    text = parser.format_help()
    assert isinstance(parser, OptionParser)
    for option in parser.options.values():
        assert f"{option.flag} " in text


def test_help_of_a_benchmark_loads_nothing_heavy() -> None:
    statement = (
        "from sglang.multimodal_gen.runtime.entrypoints.cli import bench; bench.parser('pipeline').format_help()"
    )
    assert loaded_after(statement) == set()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            "bench ditt",
            "unknown benchmark 'ditt', accepted is one of dit, parallel, vae, encoder, attention, pipeline, engine, "
            "startup, serve",
        ),
        ("bench dit --compare torch", "--compare: got torch, accepted is one of diffusers, diffusers-compiled"),
        (
            "bench encoder --compare diffusers-compiled",
            "--compare: got diffusers-compiled, accepted is one of diffusers",
        ),
        ("bench pipeline --compare diffusers-compiled", "--compare: got diffusers-compiled, accepted is one of d"),
        ("bench dit --batching-max-size 2", "unknown flag --batching-max-size"),
        ("bench vae --direction up", "--direction: got up, accepted is one of decode, encode"),
        ("bench engine --model-path demo", "unknown flag --model-path"),
        ("bench engine --concurrency 1 0", "--concurrency: got 0, accepted is"),
        ("bench pipeline --num-outputs-per-prompt 2", "unknown flag --num-outputs-per-prompt"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(capsys: Capture, command: str, sentence: str) -> None:
    assert sentence_of(capsys, *command.split()).startswith(sentence)


def test_options_come_from_flags_and_file_and_a_serving_recipe_is_accepted() -> None:
    Path("my.yaml").write_text("repeats: 7\nport: 1\nprecision: bf16\nwidth: 64\n")
    job = bench.configure(["dit", "--config", "my.yaml", "--width", "32"])
    assert isinstance(job, bench.BenchJob)
    assert (job.options["repeats"], job.options["width"], job.options["batch_size"]) == (7, 32, 1)
    assert (job.args.execution.precision, job.args.logging.log_level) == ("bf16", "warning")
    verbose = bench.configure(["engine", "--log-level", "info"])
    assert isinstance(verbose, bench.BenchJob) and verbose.args.logging.log_level == "info"


def test_the_first_help_lists_the_benchmarks(capsys: Capture) -> None:
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in BENCHMARKS)


def test_a_file_that_cannot_be_written_is_known_before_anything_runs(capsys: Capture) -> None:
    assert main(["bench", "engine", "--json", "no/such/file.json"]) == 1
    err = capsys.readouterr().err
    assert err == "sglang: error: json: cannot write no/such/file.json: No such file or directory\n"


def test_a_child_s_error_ends_the_benchmark_in_one_sentence(capsys: Capture) -> None:
    assert main(["bench", "dit", "--model-path", "nobody/nothing", "--random-weights"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sglang: error: model_path: the package has no configs of nobody/nothing; known are ")
    assert " Wan-AI/" in err


def test_dit_from_the_command_line_shows_a_table_and_writes_json(
    capsys: Capture, wan_checkpoint: Callable[[str], Path]
) -> None:
    model = str(wan_checkpoint("plain"))
    assert main(["bench", "dit", "--model-path", model, *SMALL, "--json", "dit.json"]) == 0
    out, err = capsys.readouterr()
    assert "time of a run" in out and "matrix products" in out and "\x1b" not in out
    assert "sglang bench: loading transformer" in err
    data = json.loads(Path("dit.json").read_text())
    assert (data["schema_version"], data["benchmark"]) == (1, "dit")
    assert data["options"]["width"] == 32 and data["options"]["engine"]["model"]["model_path"] == model
    assert data["machine"]["num_cores"] >= 1 and data["machine"]["packages"]["torch"] == torch.__version__
    check_summary(data["result"]["ours"]["seconds"], num_samples=2)


def test_parallel_times_decoding_once_for_each_number_of_ranks(
    capsys: Capture, wan_checkpoint: Callable[[str], Path]
) -> None:
    model, size = str(wan_checkpoint("plain")), ("--width", "80", "--height", "48", "--num-frames", "9")
    spread = ("--layouts", "cfg2", "ring2", "--decode", "--chunk-frames", "2", "--repeats", "2")
    assert main(["bench", "parallel", "--model-path", model, *size, *spread, "--json", "parallel.json"]) == 0
    assert "decoding by AutoencoderKLWan, float32" in capsys.readouterr().out
    result = json.loads(Path("parallel.json").read_text())["result"]
    assert len(result["layouts"]) == 3 and result["chunk_frames"] == [2, 2]
    alone, spread_over = result["decoding"]
    assert alone["relative_difference"] == 0.0
    assert 0.0 < spread_over["relative_difference"] <= 1e-5, "in fp32, by other sums"
    check_summary(spread_over["seconds"], num_samples=2)


def test_pipeline_compares_sharing_with_one_by_one_and_with_diffusers(
    capsys: Capture, wan_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With random weights, so that the reference's pipeline is put together from ours."""
    data = report_of(
        capsys, "pipeline", "--model-path", str(wan_checkpoint("plain")), *SMALL, "--num-inference-steps", "4",
        "--random-weights", "--prompt", "a red circle", "--concurrency", "3", "--compare", "diffusers",
        "--max-sequence-length", "16", "--profile", "--profile-dir", str(tmp_path),
    )  # fmt: skip
    result = data["result"]
    alone, together, reference = result["alone"], result["together"], result["reference"]
    check_summary(alone["seconds"], num_samples=6)
    check_summary(alone["step_ms"], num_samples=24)
    assert set(alone["stage_seconds"]) >= {"text_encode", "denoise", "decode"}
    assert alone["requests_per_second"] == pytest.approx(1 / alone["seconds"]["median"])
    check_ratio(together["ratio"], together["seconds"], together["seconds_one_by_one"])
    check_ratio(together["denoise_ratio"], together["denoise_seconds"], together["denoise_seconds_one_by_one"])
    assert 1 < together["mean_batch_size"] <= 3
    assert max(together["denoise_seconds"]["samples"]) < max(together["seconds"]["samples"])
    assert reference["pipeline"] == "diffusers.WanPipeline"
    assert reference["max_frame_difference"] <= 1
    check_ratio(reference["ratio"], reference["ours_seconds"], reference["seconds"])
    check_summary(reference["step_ms"], num_samples=6)
    assert reference["outputs_per_second"] == pytest.approx(1 / reference["seconds"]["median"])
    batch = reference["batch"]
    assert (batch["size"], batch["ours_seconds"]) == (3, together["seconds"])
    assert batch["max_frame_difference"] <= 1
    check_summary(batch["seconds"], num_samples=2)
    check_ratio(batch["ratio"], batch["ours_seconds"], batch["seconds"])
    check_summary(batch["step_ms"], num_samples=6)
    assert batch["outputs_per_second"] == pytest.approx(3 / batch["seconds"]["median"])
    assert 0 < result["idle"]["idle_seconds"] < result["idle"]["seconds"] < 4 * alone["seconds"]["p90"]
    assert Path(result["idle"]["trace"]).is_file()
    assert all(gap["after"].startswith("aten::") for gap in result["idle"]["gaps"]), "the CPU's operations"
    for phase, rate in result["rates"].items():
        assert rate["flops_per_second"] == pytest.approx(rate["flops"] / alone["stage_seconds"][phase]["median"])
        assert rate["matmul_ratio"] == pytest.approx(rate["flops_per_second"] / rate["matmul_flops_per_second"])
    config = WanTransformerConfig(**TINY_TRANSFORMER)
    assert result["rates"]["denoise"]["flops"] == 4 * 2 * dit_flops(config, (2, 4, 4), 16)


def test_a_reference_that_takes_one_prompt_at_a_time_is_noted_and_asked_once(
    capsys: Capture, wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_REFERENCE", one_prompt_reference.__name__)
    arguments = (
        "pipeline", "--model-path", str(wan_checkpoint("plain")), *SMALL, "--num-inference-steps", "2",
        "--concurrency", "2", "--compare", "diffusers", "--max-sequence-length", "16", "--json", "pipeline.json",
    )  # fmt: skip
    assert main(["bench", *arguments]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert "2 together" in out and "Traceback" not in err
    result = json.loads(Path("pipeline.json").read_text())["result"]
    refusal = "diffusers' WanPipeline did not make 2 outputs in one call (ValueError: batch size 1 alone, got 2)"
    assert result["notes"].count(refusal) == 1 and refusal in out
    assert result["together"]["concurrency"] == 2
    assert result["reference"]["batch"] is None and result["reference"]["max_frame_difference"] <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_of_diffusers_makes_at_once_what_ours_makes_of_the_same_seeds(family: str, tmp_path: Path) -> None:
    """Twice: a call that wrote into its prompts would make other outputs the second time."""
    save, _ = FAMILIES[family]
    directory = save(tmp_path / "model")
    reference = diffusers.DiffusionPipeline.from_pretrained(directory)
    reference.set_progress_bar_config(disable=True)
    runner = ReferenceRunner(reference, CPU, str(tmp_path))
    resolved, _ = find_pipeline(ModelArgs(model_path=str(directory)))
    params = SamplingParams.from_values(wish_of(family)).filled_from(resolved.defaults, GENERAL_DEFAULTS)
    seeds = (3, 4)
    together = run_together(load(directory), [(replace(params, seed=seed), EMPTY) for seed in seeds])
    ours = np.stack([frames for _, frames in together]).astype(int)
    assert np.abs(ours[0] - ours[1]).max() > 10, "of different noise"
    for _ in range(2):
        done = runner.run(ReferenceCall(params=params, seeds=seeds))
        assert done.refusal is None
        # A value that lies on the border between two steps of 1/255 may be rounded either way.
        assert np.abs(np.load(done.frames_file) - ours).max() <= 1


def test_one_step_is_too_few_to_record(capsys: Capture) -> None:
    assert main(["bench", "pipeline", "--profile", "--num-inference-steps", "1", "--repeats", "1"]) == 1
    assert "num_inference_steps: got 1, accepted is 2 and more with profile" in capsys.readouterr().err


def trace_of(path: Path, *works: tuple[str, str, float, float]) -> Path:
    """A recording of works, each a kind, a name, a beginning and a length in microseconds."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]
    events += [{"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur} for kind, name, ts, dur in works]
    with gzip.open(path, "wt") as stream:
        json.dump({"traceEvents": events}, stream)
    return path


def test_a_device_is_idle_where_no_stream_has_work(tmp_path: Path) -> None:
    """Works of several streams overlap, one may lie within another; what the host does is none of the device's."""
    trace = trace_of(
        tmp_path / "a.json.gz",
        ("kernel", "second", 150.0, 100.0), ("kernel", "first", 100.0, 200.0), ("gpu_memcpy", "copy", 310.0, 20.0),
        ("cpu_op", "aten::add", 0.0, 1000.0), ("kernel", "last", 400.0, 50.0), ("kernel", "none", 450.0, 0.0),
        ("kernel", "right behind it", 452.0, 48.0),
    )  # fmt: skip
    found = idle_time(trace)
    assert found is not None
    assert (found.seconds, found.idle_seconds) == pytest.approx((400e-6, 82e-6))
    assert (found.waiting_seconds, found.waiting_share) == pytest.approx((80e-6, 0.2))
    between = [("copy", "last"), ("first", "copy"), ("last", "right behind it")]
    assert [(gap.after, gap.before) for gap in found.gaps] == between
    assert found.gaps[0].seconds == pytest.approx(70e-6)
    assert idle_time(trace_of(tmp_path / "b.json.gz")) is None


@pytest.mark.parametrize(("name", "value"), [("guidance_rescale", "0.5"), ("scheduler", "euler")])
def test_what_diffusers_has_no_argument_for_is_not_compared(name: str, value: str, capsys: Capture) -> None:
    assert main(["bench", "pipeline", "--compare", "diffusers", "--" + name.replace("_", "-"), value]) == 1
    assert f"{name}: not supported here" in capsys.readouterr().err


def test_engine_measures_a_step_a_request_and_throughput(capsys: Capture) -> None:
    result = report_of(capsys, "engine", "--repeats", "2", "--steps", "20", "--concurrency", "1", "4")["result"]
    for name in ("request_ms", "step_ms"):
        check_summary(result[name], num_samples=2)
    assert [t["concurrency"] for t in result["throughput"]] == [1, 4]
    for throughput in result["throughput"]:
        check_summary(throughput["requests_per_second"], num_samples=2)


def test_startup_s_intervals_add_up_to_its_total(capsys: Capture) -> None:
    result = report_of(capsys, "startup", "--repeats", "1", "--warmup-runs", "0", "--num-inference-steps", "1")[
        "result"
    ]
    until_ready = list(result["intervals"])[: list(result["intervals"]).index("ready") + 1]
    assert {"interpreter and imports", "the engine's processes", "importing torch"} <= set(until_ready)
    total = sum(result["intervals"][name]["median"] for name in until_ready)
    assert total == pytest.approx(result["ready_seconds"]["median"])
    assert result["first_result_seconds"]["median"] > result["ready_seconds"]["median"]
    assert result["dominant"] in until_ready and 0 < result["dominant_share"] <= 1


def test_startup_of_a_server_waits_until_it_is_ready(capsys: Capture) -> None:
    result = report_of(
        capsys,
        "startup",
        "--entry-point",
        "serve",
        "--repeats",
        "1",
        "--warmup-runs",
        "0",
        "--model-path",
        "null-model",
    )["result"]
    intervals = list(result["intervals"])
    assert intervals[0] == "the server answers" and intervals[-1] == "ready" and "importing torch" in intervals
    total = sum(result["intervals"][name]["median"] for name in intervals)
    assert total == pytest.approx(result["ready_seconds"]["median"])
    assert result["ready_seconds"]["median"] > result["intervals"]["the server answers"]["median"]
    assert result["first_result_seconds"] is None


def test_a_server_that_cannot_load_ends_the_benchmark(capsys: Capture) -> None:
    assert main(["bench", "startup", "--entry-point", "serve", "--model-path", "no/such/dir/at-all"]) == 1
    assert "sglang: error: the server ended with status 1 before it was ready" in capsys.readouterr().err


def test_tables_for_a_terminal_show_every_cell_as_it_is(capsys: Capture) -> None:
    show_with_colour([Section("title", [("a", "prompt cut [short]")], ("", "median"))])
    out = capsys.readouterr().out
    assert all(text in out for text in ("title", "median", "prompt cut [short]"))


def test_tables_align_their_columns() -> None:
    text = as_text(Section("title", [("a", "1.00 s"), ("long name", "2 s")], ("", "median")))
    assert text == "title\n             median\n  a          1.00 s\n  long name  2 s\n"
