"""Compiled blocks: the same pictures, a bounded number of graphs, and what is not compiled runs as it always does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.layers.compiled_blocks import (
    CompiledBlock,
    CompiledClass,
    compiled_classes_of,
    use_compiled_blocks,
)
from sglang.multimodal_gen.runtime.layers.lora import SlotUse
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

CPU = torch.device("cpu")
REQUEST = {"prompt": "a dot", "num_frames": 1, "num_inference_steps": 1, "seed": 3, "max_sequence_length": 12}
# fp32 on a CPU; a compiler may sum in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class CountingBackend:
    """Runs each graph as it was traced, and counts them. `refuses`: it fails as a backend without a compiler does."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.num_graphs = 0
        self.num_runs = 0
        self._refuses = refuses

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if self._refuses:
            raise RuntimeError("no C++ compiler was found")
        self.num_graphs += 1

        def run(*args: Any) -> Any:
            self.num_runs += 1
            return graph.forward(*args)

        return run


class Compiled(NamedTuple):
    """What the tests share."""

    plain: Any
    pipeline: Any
    backend: CountingBackend
    reason: str


def pipeline_of(directory: Path) -> Any:
    pipeline = build_pipeline(str(directory), ExecutionArgs(device="cpu"))
    assert isinstance(pipeline, WanPipeline)
    return pipeline


def latents(pipeline: Any, width: int, **values: Any) -> torch.Tensor:
    with torch.inference_mode():
        req = pipeline.admit("r", SamplingParams.from_values({**REQUEST, "width": width, "height": 48, **values}))
        for phase in req.phases:
            if phase.lane != "decode":
                for _ in range(phase.units):
                    pipeline.run_unit(phase.name, [req])
        found: torch.Tensor = req.latents
        return found.clone()


@pytest.fixture(scope="module")
def compiled(wan_checkpoint: Callable[[str], Path]) -> Compiled:
    """A pipeline without and one with compiled blocks, which are compiled once for all tests."""
    torch._dynamo.reset()
    (plain, pipeline), backend = (pipeline_of(wan_checkpoint("plain")) for _ in range(2)), CountingBackend()
    reason = use_compiled_blocks(pipeline.transformer, backend=backend)
    return Compiled(plain, pipeline, backend, reason)


def test_compiled_blocks_give_the_same_and_new_sizes_compile_nothing(compiled: Compiled) -> None:
    assert "WanBlock of WanTransformer3DModel compiled with their first request" in compiled.reason
    backend, counts = compiled.backend, []
    for width in (32, 64, 96):
        torch.testing.assert_close(latents(compiled.pipeline, width), latents(compiled.plain, width), **TOLERANCE)
        counts.append(backend.num_graphs)
    [block_class] = compiled_classes_of(compiled.pipeline.transformer)
    assert block_class.failure is None
    # One more at most for the second size: a first one may have dimensions that happen to be equal.
    assert counts[1] <= counts[0] + 1 and counts[2] == counts[1], counts
    assert len(compiled.pipeline.transformer.blocks) > 1 and backend.num_runs > 3 * counts[0]


def test_step_caches_and_compiled_blocks_go_together(compiled: Compiled) -> None:
    wish, before = {"enable_cache_dit": True, "num_inference_steps": 6}, compiled.backend.num_runs
    found, expected = latents(compiled.pipeline, 64, **wish), latents(compiled.plain, 64, **wish)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert compiled.backend.num_runs > before


def test_rows_with_adapters_run_uncompiled(compiled: Compiled) -> None:
    runner, layer, backend = compiled.plain.transformer.block_runner, torch.nn.Linear(2, 2), CountingBackend()
    block, tokens = CompiledBlock(layer, runner, CompiledClass(torch.nn.Linear, backend)), torch.ones(3, 2)
    with torch.inference_mode():
        with runner.adapters.using([[SlotUse(1, 1.0)]], CPU):
            assert torch.equal(block(tokens), layer(tokens)) and backend.num_runs == 0
        assert torch.equal(block(tokens), layer(tokens)) and backend.num_runs == 1
    block(tokens)  # with gradients
    assert backend.num_runs == 1


def test_a_compiler_that_fails_is_told_once_and_left_out(
    wan_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = pipeline_of(wan_checkpoint("plain"))
    expected = latents(pipeline, 32)
    torch._dynamo.reset()
    use_compiled_blocks(pipeline.transformer, backend=CountingBackend(refuses=True))
    assert torch.equal(latents(pipeline, 32), expected)
    assert len([line for line in caplog.messages if "runs uncompiled" in line]) == 1


def test_modules_that_cannot_be_compiled_say_why(wan_checkpoint: Callable[[str], Path]) -> None:
    assert "does not say which its blocks are" in use_compiled_blocks(torch.nn.Linear(2, 2))
    pipeline = pipeline_of(wan_checkpoint("plain"))
    pipeline.transformer.block_runner._axes = (None, type("Axis", (), {"size": 2}))
    assert "tensor-parallel ranks" in use_compiled_blocks(pipeline.transformer)
    assert not compiled_classes_of(pipeline.transformer)


def test_the_option_compiles_and_keeps_the_code_in_the_cache_directory(
    wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(envs.CACHE_ROOT, str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    heard: list[str] = []
    execution = ExecutionArgs(device="cpu", enable_torch_compile=True)
    pipeline = build_pipeline(str(wan_checkpoint("plain")), execution, report=heard.append)
    [line] = [line for line in heard if line.startswith("enable_torch_compile")]
    assert "WanBlock of WanTransformer3DModel" in line
    assert len(compiled_classes_of(pipeline.transformer)) == 1  # type: ignore[attr-defined]
    assert envs.current()["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
