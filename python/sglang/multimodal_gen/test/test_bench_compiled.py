"""`sglang bench dit --compare`: diffusers' module as it is and compiled, in the same turns, and the error of each side.

The compiler is a stand-in that runs the graphs as they were traced, since torch's own takes half a minute on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sglang.cli.main import main
from sglang.multimodal_gen.errors import IncompatibleParameters
from sglang.multimodal_gen.runtime.bench import report
from sglang.multimodal_gen.runtime.bench.machine import describe_machine
from sglang.multimodal_gen.runtime.bench.worker import component
from sglang.multimodal_gen.runtime.bench.worker.compiled_reference import compile_reference
from sglang.multimodal_gen.runtime.bench.worker.exactness import SameWeights, output_in_fp32
from sglang.multimodal_gen.runtime.pipelines_core.workload import Inputs, Workload, WorkSize
from sglang.multimodal_gen.test.test_bench import run_component
from sglang.multimodal_gen.test.test_compiled_blocks import CountingBackend
from sglang.multimodal_gen.test.tiny_wan import TINY_TRANSFORMER

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
COMPILED = {"compare": "diffusers-compiled"}
HALF = {"options": {"precision": "bf16"}}


class Doubling(torch.nn.Module):
    """It has no blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 2 * tokens


@pytest.fixture(autouse=True)
def _compilers_memory_is_emptied() -> None:
    torch._dynamo.reset()


def use_backend(monkeypatch: pytest.MonkeyPatch, *, refuses: bool = False) -> CountingBackend:
    """What compiles from now on."""
    backend = CountingBackend(refuses=refuses)
    monkeypatch.setattr(component, "compile_reference", partial(compile_reference, backend=backend))
    return backend


def test_the_compiled_module_is_timed_beside_the_eager_one(
    wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    backend = use_backend(monkeypatch)
    result = run_component(wan_checkpoint("plain"), "dit", **COMPILED)
    forwards = {"to compile": 1, "for the difference": 1, "timed": 2, "for the peak": 1}
    assert backend.num_runs == TINY_TRANSFORMER["num_layers"] * sum(forwards.values()), "the eager side stays eager"
    assert result.reference is not None and result.compiled_reference is not None
    assert result.ratio is not None and result.compiled_ratio is not None
    for ratio, side in ((result.ratio, result.reference), (result.compiled_ratio, result.compiled_reference)):
        assert ratio.value == side.seconds.median / result.ours.seconds.median
        assert len(side.seconds.samples) == 2 and side.peak_bytes is not None
    assert result.compiled_reference.seconds != result.reference.seconds
    assert result.compiled_max_relative_difference is not None and result.compiled_max_relative_difference < 1e-4
    assert any(note.startswith("the first forward of compiled WanTransformerBlock took ") for note in result.notes)
    report.show("dit", describe_machine(), result)
    against = capsys.readouterr().out.partition("sglang against them")[2].splitlines()
    assert against[1].split("  ")[-1] == "diffusers compiled" and "diffusers.WanTransformer3DModel" in against[1]
    assert against[2].count(" to ") == 2, "the range of either's ratios"
    assert against[3].endswith(f"{result.compiled_max_relative_difference:.2e}")


def test_only_the_choice_of_it_compiles(
    wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    backend = use_backend(monkeypatch)
    result = run_component(wan_checkpoint("plain"), "dit")
    assert backend.num_graphs == 0
    assert (result.compiled_reference, result.compiled_ratio, result.compiled_max_relative_difference) == (None,) * 3
    report.show("dit", describe_machine(), result)
    shown = capsys.readouterr().out
    assert "sglang against it" in shown and "compiled" not in shown


def test_a_module_that_names_no_blocks_is_compiled_whole() -> None:
    backend, module, tokens = CountingBackend(), Doubling(), torch.ones(3, 2)
    assert compile_reference(module, backend=backend) == "Doubling"
    assert torch.equal(module(tokens), 2 * tokens) and backend.num_runs == 1


def test_a_compiler_that_fails_ends_the_comparison_in_one_sentence(
    wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, refuses=True)
    with pytest.raises(IncompatibleParameters, match=r"no C\+\+ compiler was found") as caught:
        run_component(wan_checkpoint("plain"), "dit", **COMPILED)
    assert caught.value.param == "compare"
    assert "torch's compiler failed on WanTransformerBlock" in caught.value.message and "\n" not in caught.value.message


def test_a_machine_without_a_compiler_for_its_processor_is_told_so(
    wan_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where nothing is compiled already
    model, size = str(wan_checkpoint("plain")), ("--width", "32", "--height", "32", "--num-frames", "5")
    assert main(["bench", "dit", "--model-path", model, *size, "--compare", "diffusers-compiled"]) == 1
    out, err = capfd.readouterr()
    assert "sglang bench: compiling WanTransformerBlock of diffusers, which may take minutes\n" in err
    assert "sglang: error: compare: diffusers-compiled is not possible here, torch's compiler failed on " in err
    assert "No working C++ compiler found" in err
    assert out == "" and "Traceback" not in err


# --- errors against fp32 ---


def test_a_compared_transformer_in_half_precision_tells_each_side_s_error(
    wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    use_backend(monkeypatch)
    exact_modules: list[torch.nn.Module] = []

    def watched(workload: Workload, wide: torch.nn.Module, inputs: Inputs, size: WorkSize) -> torch.Tensor:
        exact_modules.append(wide)
        return output_in_fp32(workload, wide, inputs, size)

    monkeypatch.setattr(component, "output_in_fp32", watched)
    result = run_component(wan_checkpoint("plain"), "dit", **HALF, **COMPILED)
    [exact] = exact_modules
    for weight in exact.blocks.get_submodule("0.ffn").parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.bfloat16().float()), "the rounded weights, not those of the files"
    assert result.reference is not None and result.compiled_reference is not None
    for side in (result.ours, result.reference, result.compiled_reference):
        assert side.error is not None and side.error.psnr_db is None
        assert 1e-4 < side.error.relative < 0.05, "bf16 has eight bits"
    report.show("dit", describe_machine(), result)
    shown = capsys.readouterr().out.partition("difference from fp32")[2].splitlines()
    assert [line.split()[0] for line in shown[1:4]] == ["sglang", "diffusers.WanTransformer3DModel", "diffusers"]
    assert "PSNR" not in "".join(shown), "no column without a number"


@pytest.mark.parametrize(
    ("workload", "changes"),
    [("dit", {"compare": None, **HALF}), ("dit", {}), ("encoder", HALF)],
    ids=["not compared", "fp32 itself", "no transformer"],
)
def test_other_work_has_no_error(
    workload: str, changes: dict[str, object], wan_checkpoint: Callable[[str], Path]
) -> None:
    result = run_component(wan_checkpoint("plain"), workload, **changes)
    assert result.ours.error is None
    assert result.reference is None or result.reference.error is None


def raise_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [("free_bytes", lambda device: 0), ("output_in_fp32", raise_out_of_memory)],
    ids=["as expected", "although it was expected"],
)
def test_without_room_for_fp32_there_is_no_error_and_a_note(
    name: str,
    stand_in: Callable[..., object],
    wan_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(component, name, stand_in)
    result = run_component(wan_checkpoint("plain"), "dit", **HALF)
    assert result.ours.error is None and result.reference is not None and result.reference.error is None
    assert any(note.startswith("not compared with fp32, which takes ") for note in result.notes)


def test_the_module_in_fp32_has_the_same_numbers_in_memory_of_its_own() -> None:
    ours, wide = torch.nn.Linear(3, 2).bfloat16(), torch.nn.Linear(3, 2)
    taken = SameWeights(ours).tensors_for(Path(), wide, dtype_of=lambda name: torch.float32, device=CPU)
    assert {name: tensor.dtype for name, tensor in taken.items()} == dict.fromkeys(("weight", "bias"), torch.float32)
    assert torch.equal(taken["weight"], ours.weight.float())
    same = SameWeights(wide).tensors_for(Path(), ours, dtype_of=lambda name: torch.float32, device=CPU)
    assert same["weight"].data_ptr() != wide.weight.data_ptr()
