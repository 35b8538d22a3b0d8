"""Saved states: the file, going on from it to the bit, and a worker killed in the middle of real work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidState
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers import state_writer
from sglang.multimodal_gen.runtime.managers.messages import Progress
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.state_file import read_state, to_host, write_state
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

CPU = torch.device("cpu")
TREE = {
    "done": {"encode": 1, "denoise": 3},
    "nothing": None,
    "scale": 1.5,
    "name": "ü",
    "history": [torch.arange(6.0).reshape(2, 3), torch.tensor(7, dtype=torch.int64)],
    "embeds": torch.randn(3, 5).to(torch.bfloat16),
    "empty": [],
}
REQUEST = {
    "prompt": "a red circle",
    "negative_prompt": "green",
    "width": 48,
    "height": 48,
    "num_frames": 9,
    "guidance_scale": 4.0,
    "seed": 3,
}


# --- the file ---


def test_a_tree_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_state(tmp_path / "s", TREE, identity="me")
    back = read_state(tmp_path / "s", identity="me", device=CPU)
    assert back.keys() == TREE.keys()
    assert {name: back[name] for name in ("done", "nothing", "scale", "name", "empty")} == {
        name: TREE[name] for name in ("done", "nothing", "scale", "name", "empty")
    }
    assert all(torch.equal(a, b) for a, b in zip(back["history"], TREE["history"], strict=True))
    assert torch.equal(back["embeds"], TREE["embeds"])
    assert back["embeds"].dtype is torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_copy_on_the_host_does_not_change_with_the_original() -> None:
    tensor = torch.zeros(3)
    copy = to_host({"a": [tensor]})
    tensor += 1
    assert copy["a"][0].tolist() == [0, 0, 0]


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(os.urandom(500))
    elif how == "flipped":
        path.write_bytes(data[:20] + bytes(255 - byte for byte in data[20:60]) + data[60:])


@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "garbage", "flipped"])
def test_a_damaged_file_is_refused(tmp_path: Path, how: str) -> None:
    write_state(tmp_path / "s", TREE, identity="me")
    damaged(tmp_path / "s", how)
    with pytest.raises(InvalidState, match=r"missing or damaged|another format"):
        read_state(tmp_path / "s", identity="me", device=CPU)


def test_a_file_of_another_request_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path / "s", TREE, identity="me")
    with pytest.raises(InvalidState, match="another request"):
        read_state(tmp_path / "s", identity="you", device=CPU)


def test_who_waits_for_a_state_goes_on_when_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps a request no further than one interval from its newest state, however slow the disk."""
    may_write, reported = threading.Event(), []

    def write_slowly(*arguments: Any, **options: Any) -> None:
        assert may_write.wait(10)
        write_state(*arguments, **options)

    monkeypatch.setattr(state_writer, "write_state", write_slowly)
    writer = state_writer.StateWriter(reported.append)
    writer.put("a", tmp_path / "s", {"units_done": {"denoise": 2}}, identity="me")
    writer.wait("of another request")
    assert reported == []
    threading.Timer(0.2, may_write.set).start()
    writer.wait("a")
    [saved] = reported
    assert saved.error is None and saved.units_done == {"denoise": 2}
    writer.wait("a")  # nothing is outstanding


# --- the pipeline ---


@pytest.fixture(scope="module")
def pipeline(wan_checkpoint: Callable[[str], Path]) -> WanPipeline:
    built = build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu"))
    assert isinstance(built, WanPipeline)
    return built


def run(pipeline: WanPipeline, req: Req, units: int | None = None) -> list[torch.Tensor]:
    """The next `units` units over all phases, None: all."""
    frames: list[torch.Tensor] = []
    with torch.inference_mode():
        for phase in req.phases:
            while req.done(phase.name) < phase.units and (units is None or units > 0):
                frames += [output.frames for output in pipeline.run_unit(phase.name, [req])]
                units = None if units is None else units - 1
    return frames


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("units", [1, 2, 3, 5, 6, 7])
def test_a_request_goes_on_to_the_bit_from_its_file(
    pipeline: WanPipeline, tmp_path: Path, sampler: str, units: int
) -> None:
    """After the text, after each kind of step of a multistep sampler, after the last one, and after decoding, which
    begins anew."""
    params = SamplingParams.from_values(REQUEST | {"scheduler": sampler, "num_inference_steps": 5})
    whole = pipeline.admit("a", params)
    frames = run(pipeline, whole)
    first = pipeline.admit("b", params)
    run(pipeline, first, units)
    write_state(tmp_path / "s", pipeline.saved_state(first), identity=pipeline.state_identity(first))
    pipeline.release(first)
    second = pipeline.admit("b", params)
    pipeline.restore(second, tmp_path / "s")
    assert sum(second.units_done.values()) == min(units, 6)
    assert all(torch.equal(a, b) for a, b in zip(run(pipeline, second), frames, strict=True))
    assert whole.latents is not None and second.latents is not None
    assert torch.equal(second.latents, whole.latents)


def test_the_state_of_other_parameters_is_refused(pipeline: WanPipeline, tmp_path: Path) -> None:
    first = pipeline.admit("a", SamplingParams.from_values(REQUEST | {"num_inference_steps": 5}))
    run(pipeline, first, 3)
    write_state(tmp_path / "s", pipeline.saved_state(first), identity=pipeline.state_identity(first))
    second = pipeline.admit("b", SamplingParams.from_values(REQUEST | {"num_inference_steps": 6}))
    with pytest.raises(InvalidState):
        pipeline.restore(second, tmp_path / "s")
    assert second.units_done == {}


# --- the engine ---

EVERY = 2
STEPS = 9


@pytest.fixture(scope="module")
def engine(wan_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffGenerator]:
    state_dir = tmp_path_factory.mktemp("state")
    (state_dir / "checkpoints").mkdir()
    (state_dir / "checkpoints" / "state-of-a-dead-server.safetensors").touch()
    options: dict[str, Any] = {"device": "cpu", "checkpoint_every": EVERY, "state_dir": str(state_dir)}
    with DiffGenerator.from_pretrained(str(wan_checkpoint("plain")), **options) as generator:
        yield generator


def state_files(engine: DiffGenerator) -> list[str]:
    return sorted(path.name for path in Path(engine.args.storage.state_dir or "").glob("checkpoints/*"))


@pytest.mark.parametrize("kill_at", [1, 4, 7])
def test_a_request_whose_worker_is_killed_goes_on_from_its_last_state_with_the_same_bytes(
    engine: DiffGenerator, kill_at: int
) -> None:
    wish = REQUEST | {
        "num_inference_steps": STEPS,
        "width": 96,
        "height": 96,
        "num_frames": 9,
        "return_frames": True,
    }
    undisturbed = engine.generate(wish)
    steps: list[int] = []
    result = None
    for item in engine.stream(wish):
        # That none is done yet is told again after a restart, and is no step.
        if isinstance(item.event, Progress) and item.event.phase == "denoise" and item.event.step > 0:
            steps.append(item.event.step)
            if item.event.step == kill_at and steps.count(kill_at) == 1:
                [pid] = engine.status().worker_pids
                os.kill(pid, signal.SIGKILL)
        if isinstance(item.event, GenerationResult):
            result = item.event
    assert isinstance(result, GenerationResult) and isinstance(undisturbed, GenerationResult)
    assert result.metrics["attempts"] == 2
    assert np.array_equal(result.frames, undisturbed.frames)
    assert len(result.metrics["step_ms"]) == STEPS
    # Steps that were told twice were done twice; none is when the state is that of the last step that was told.
    repeated = len(steps) - len(set(steps))
    assert repeated <= EVERY
    deadline = time.monotonic() + 10
    while state_files(engine) and time.monotonic() < deadline:  # the last one may still be on its way to the disk
        time.sleep(0.05)
    assert state_files(engine) == []
