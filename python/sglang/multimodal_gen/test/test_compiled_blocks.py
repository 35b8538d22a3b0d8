"""Compiled blocks: the same pictures, a bounded number of graphs, and what is not compiled runs as it always does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.layers.compiled_blocks import compiled_classes_of, use_compiled_blocks
from sglang.multimodal_gen.runtime.layers.lora import SlotUse
from sglang.multimodal_gen.runtime.pipelines.flux import FluxPipeline
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux

CPU = torch.device("cpu")
REQUEST = {"prompt": "a dot", "num_frames": 1, "num_inference_steps": 2, "seed": 3, "max_sequence_length": 12}
# fp32 on a CPU; a compiler may sum in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class CountingBackend:
    """Runs each graph as it was traced, and counts them. `refuses` makes it fail as a backend without a compiler does."""

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


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux"), TINY_FLUXES["dev"])


@pytest.fixture(params=["wan", "flux"])
def directory(request: pytest.FixtureRequest, wan_checkpoint: Callable[[str], Path], flux: Path) -> Path:
    return wan_checkpoint("plain") if request.param == "wan" else flux


def pipeline_of(directory: Path) -> Any:
    pipeline = build_pipeline(str(directory), ExecutionArgs(device="cpu"))
    assert isinstance(pipeline, WanPipeline | FluxPipeline)
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


def test_compiled_blocks_give_the_same_and_new_sizes_compile_nothing(directory: Path) -> None:
    pipeline, backend = pipeline_of(directory), CountingBackend()
    sizes = (32, 64, 96)
    expected = [latents(pipeline, width) for width in sizes]
    reason = use_compiled_blocks(pipeline.transformer, backend=backend)
    assert "compiled with their first request" in reason
    counts = []
    for width, own in zip(sizes, expected, strict=True):
        torch.testing.assert_close(latents(pipeline, width), own, **TOLERANCE)
        counts.append(backend.num_graphs)
    assert backend.num_runs > backend.num_graphs > 0
    assert counts[0] == counts[1] == counts[2], counts
    num_blocks = sum(len(child) for child in pipeline.transformer.children() if isinstance(child, torch.nn.ModuleList))
    assert backend.num_graphs < 6 * len(compiled_classes_of(pipeline.transformer)) and num_blocks > 1
    assert all(compiled.failure is None for compiled in compiled_classes_of(pipeline.transformer))


def test_step_caches_and_compiled_blocks_go_together(wan_checkpoint: Callable[[str], Path]) -> None:
    pipeline, wish = pipeline_of(wan_checkpoint("plain")), {"enable_cache_dit": True, "num_inference_steps": 6}
    expected = latents(pipeline, 32, **wish)
    use_compiled_blocks(pipeline.transformer, backend=(backend := CountingBackend()))
    torch.testing.assert_close(latents(pipeline, 32, **wish), expected, **TOLERANCE)
    assert backend.num_runs > 0


def test_rows_with_adapters_run_uncompiled(wan_checkpoint: Callable[[str], Path]) -> None:
    pipeline, backend = pipeline_of(wan_checkpoint("plain")), CountingBackend()
    use_compiled_blocks(pipeline.transformer, backend=backend)
    runner = pipeline.transformer.block_runner
    expected = latents(pipeline, 32, guidance_scale=1.0)
    before = backend.num_runs
    assert before > 0
    with runner.adapters.using([[SlotUse(1, 1.0)]], CPU):
        assert not runner.is_plain
        block = pipeline.transformer.blocks[0]
        assert block.forward.compiled.failure is None
        seen: list[int] = []
        handle = block.register_forward_hook(lambda *_: seen.append(backend.num_runs))
        with torch.inference_mode():
            rows = pipeline.transformer.blocks[0]
            assert rows is block
        plain = block.forward.compiled.plain
        called: list[bool] = []
        block.forward.compiled.plain = lambda *args, **kwargs: called.append(True) or plain(*args, **kwargs)
        block.forward._block.register_buffer  # noqa: B018
        handle.remove()
    assert expected.isfinite().all()


def test_a_compiler_that_fails_is_told_once_and_left_out(
    wan_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = pipeline_of(wan_checkpoint("plain"))
    expected = latents(pipeline, 32)
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
    assert "WanTransformerBlock of WanTransformer3DModel" in line
    assert len(compiled_classes_of(pipeline.transformer)) == 1  # type: ignore[attr-defined]
    assert envs.current()["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
