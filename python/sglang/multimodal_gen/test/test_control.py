"""Operations on the whole engine, on real processes: flushing, releasing and resuming memory, new weights."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

import sglang
from sglang.multimodal_gen.errors import RemoteError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import Progress, Status
from sglang.multimodal_gen.test import null_family

null_family.register()

pytestmark = pytest.mark.timeout(240)  # each of these loads torch once or twice

DEMO = Path(sglang.__file__).parent / "multimodal_gen/assets/demo_model"
_DONE_S = 100.0
Pending = concurrent.futures.Future[str]


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("null-model", batching_max_size=1) as generator:
        yield generator


def begin(engine: DiffGenerator, operation: Any, **options: Any) -> Pending:
    """The operation, under way."""
    return engine._engine.spawn(engine._engine.client.control(operation, **options))


def do(engine: DiffGenerator, operation: Any, **options: Any) -> str:
    """The operation, done."""
    return begin(engine, operation, **options).result(_DONE_S)


def refusal(engine: DiffGenerator, operation: Any, **options: Any) -> RemoteError:
    with pytest.raises(RemoteError) as raised:
        do(engine, operation, **options)
    return raised.value


def one(result: GenerationResult | list[GenerationResult]) -> GenerationResult:
    assert isinstance(result, GenerationResult)
    return result


def pid_of(status: Status) -> int:
    (pid,) = status.worker_pids
    return pid


def test_a_flush_goes_on_beside_a_generation(engine: DiffGenerator) -> None:
    flushed = None
    for item in engine.stream({"prompt": "sleep-200 a", "num_inference_steps": 10}):
        if isinstance(item.event, Progress) and flushed is None:
            flushed = begin(engine, "flush_cache")
            assert "forgotten" in flushed.result(5)
    assert flushed is not None
    before = pid_of(engine.status())
    assert "forgotten" in do(engine, "flush_cache") and pid_of(engine.status()) == before


def test_released_memory_is_a_worker_less_until_it_is_resumed(engine: DiffGenerator) -> None:
    worker = psutil.Process(pid_of(engine.status()))
    assert do(engine, "release_memory_occupation") == "the memory is released"
    assert not worker.is_running()
    status = engine.status()
    assert (status.state.state, status.num_workers, status.allocated_bytes) == ("asleep", 0, None)
    assert "before" in do(engine, "release_memory_occupation")
    assert refusal(engine, "update_weights_from_disk").code == "memory_released"
    assert "nothing" in do(engine, "flush_cache")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.generate, {"prompt": "a", "return_frames": True})
        assert engine.status().num_workers == 0, "reads go on meanwhile"
        assert "loaded" in do(engine, "resume_memory_occupation")
        assert one(waiting.result(30)).frames is not None, "what came meanwhile waited"
    assert "not released" in do(engine, "resume_memory_occupation")
    assert pid_of(engine.status()) != worker.pid


def test_what_has_begun_ends_first_and_what_waits_waits(engine: DiffGenerator) -> None:
    before = engine.status()
    worker = pid_of(before)
    operation: Pending | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        later: concurrent.futures.Future[Any] | None = None
        for item in engine.stream({"prompt": "sleep-100 a", "num_inference_steps": 12}):
            if isinstance(item.event, Progress) and operation is None:
                operation = begin(engine, "update_weights_from_disk")
                later = pool.submit(engine.generate, {"prompt": "b"})
                assert refusal(engine, "release_memory_occupation").code == "operation_in_progress"
                assert refusal(engine, "resume_memory_occupation").code == "operation_in_progress"
                status = engine.status()
                assert not operation.done() and status.worker_pids == (worker,)
        assert operation is not None and later is not None
        assert "loaded" in operation.result(_DONE_S)
        assert one(later.result(30)).metrics["attempts"] == 1
    status = engine.status()
    assert pid_of(status) != worker and status.num_worker_restarts == before.num_worker_restarts


@pytest.mark.parametrize(
    ("model_path", "code"), [("image-model", "weights_do_not_fit"), ("/no/such/directory", "not_a_model")]
)
def test_what_cannot_be_loaded_leaves_the_weights_of_before(engine: DiffGenerator, model_path: str, code: str) -> None:
    error = refusal(engine, "update_weights_from_disk", model_path=model_path)
    assert (error.code, error.param, error.http_status) == (code, "model_path", 400)
    assert "the weights of before are in use" in str(error)
    assert engine.status().state.state == "ready"
    assert one(engine.generate({"prompt": "a", "return_frames": True})).frames is not None
    assert "loaded" in do(engine, "update_weights_from_disk")


def test_a_request_whose_worker_is_lost_meanwhile_still_ends_first(engine: DiffGenerator, tmp_path: Path) -> None:
    operation: Pending | None = None
    before = engine.status().num_worker_restarts
    prompt = f"sleep-100 die-at-6-{tmp_path / 'died'}"
    for item in engine.stream({"prompt": prompt, "num_inference_steps": 10}):
        if isinstance(item.event, Progress) and operation is None:
            operation = begin(engine, "update_weights_from_disk")
    assert (tmp_path / "died").exists() and operation is not None
    assert "loaded" in operation.result(_DONE_S)
    assert engine.status().num_worker_restarts == before + 1


@pytest.mark.timeout(400)  # three workers load torch one after another
def test_results_are_of_the_weights_that_were_loaded(tmp_path: Path) -> None:
    """The embedded model, and a copy of it with other numbers in one matrix."""
    other = shutil.copytree(DEMO, tmp_path / "other")
    path = other / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("proj_out.weight"))
    save_file({**weights, name: weights[name] / 2}, path)
    request = {"prompt": "a red circle", "width": 64, "height": 64, "num_frames": 1, "num_inference_steps": 2}
    request |= {"seed": 3, "return_latents": True, "output_type": "latent"}

    with DiffGenerator.from_pretrained("demo", deterministic=True) as engine:

        def latents() -> np.ndarray:
            found = one(engine.generate(request)).latents
            assert found is not None
            return found

        first = latents()
        assert "0.0 MiB" not in do(engine, "flush_cache"), "the prompt's embeddings were kept"
        assert "0.0 MiB" in do(engine, "flush_cache")
        assert np.array_equal(latents(), first)
        do(engine, "update_weights_from_disk", model_path=str(other))
        second = latents()
        assert np.abs(second - first).max() > 0.01
        do(engine, "release_memory_occupation")
        do(engine, "resume_memory_occupation")
        assert np.array_equal(latents(), second), "resumed are the weights that were released"


def test_an_engine_that_loads_again_says_so_until_it_is_ready(engine: DiffGenerator) -> None:
    """And not `loading`, in which entry points refuse requests."""
    client = engine._engine.client
    told: list[str] = []
    before, client.on_state = client.on_state, lambda state: told.append(state.state)
    try:
        do(engine, "update_weights_from_disk")
        engine.generate({"prompt": "a"})
    finally:
        client.on_state = before
    assert set(told) == {"reloading", "ready"} and told[-1] == "ready"
