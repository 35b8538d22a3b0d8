"""Several replicas behind one scheduler, on real processes: who runs where, what one's loss means for the others."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue, RemoteError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.managers.messages import Started, Status
from sglang.multimodal_gen.runtime.managers.replica import SILENCE_ADMITTING_S, Replicas
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.waiting_queue import WaitingQueue
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.test import null_family

null_family.register()

pytestmark = pytest.mark.timeout(240)

Pool = concurrent.futures.ThreadPoolExecutor
OPTIONS: dict[str, Any] = {"dp_size": 2, "batching_max_size": 1, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("null-model", **OPTIONS) as generator:
        yield generator


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(8) as executor:
        yield executor


def one(result: GenerationResult | list[GenerationResult]) -> GenerationResult:
    assert isinstance(result, GenerationResult)
    return result


def wait_for(engine: DiffGenerator, condition: Callable[[Status], bool]) -> Status:
    deadline = time.monotonic() + 60
    while not condition(status := engine.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    return status


def sleeper(steps: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": "where sleep-50", "num_inference_steps": steps, **fields}


def holder(result: GenerationResult | list[GenerationResult]) -> int:
    """The process that made it."""
    (note,) = one(result).notes
    return int(note.removeprefix("pid "))


def test_who_comes_next_goes_where_the_least_work_is_left(engine: DiffGenerator, pool: Pool, tmp_path: Path) -> None:
    """One worker is in a step that does not end, so whatever else ends runs on the other."""
    release = tmp_path / "go-on"
    assert engine.status().num_workers == 2
    stuck = pool.submit(engine.generate, {"prompt": f"where key-a until-{release}", "num_inference_steps": 100})
    wait_for(engine, lambda status: status.num_running == 1)
    others = [holder(engine.generate(sleeper(2, seed=seed))) for seed in range(3)]
    together = list(pool.map(engine.generate, [sleeper(2, seed=seed) for seed in range(8)]))
    assert not stuck.done()
    release.touch()
    pids = set(engine.status().worker_pids)
    assert {*others, *map(holder, together)} == pids - {holder(stuck.result())}


def test_requests_are_dealt_to_all_replicas(engine: DiffGenerator, pool: Pool) -> None:
    made = [holder(result) for result in pool.map(engine.generate, [sleeper(20, seed=seed) for seed in range(6)])]
    assert min(made.count(pid) for pid in engine.status().worker_pids) >= 2


def test_the_same_request_gives_the_same_frames_on_every_replica(engine: DiffGenerator, pool: Pool) -> None:
    wish = {"prompt": "sleep-20", "seed": 3, "return_frames": True, "return_latents": True}
    results = [one(result) for result in pool.map(engine.generate, [wish] * 6)]
    for result in results[1:]:
        np.testing.assert_array_equal(result.frames, results[0].frames)
        np.testing.assert_array_equal(result.latents, results[0].latents)


def test_a_lost_worker_is_replaced_and_the_other_replica_does_not_notice(engine: DiffGenerator, pool: Pool) -> None:
    pids = engine.status().worker_pids
    restarts = engine.status().num_worker_restarts
    both = [pool.submit(engine.generate, sleeper(80, seed=seed)) for seed in (1, 2)]
    wait_for(engine, lambda status: status.num_running == 2)
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGKILL)
    seen = set()

    def restarted(status: Status) -> bool:
        seen.add(status.state.state)
        return status.num_worker_restarts == restarts + 1

    wait_for(engine, restarted)
    results = [one(request.result()) for request in both]
    assert sorted(result.metrics["attempts"] for result in results) == [1, 2]
    assert all(len(result.metrics["step_ms"]) == 80 for result in results)
    status = wait_for(engine, lambda status: status.num_workers == 2)
    assert status.worker_pids[1] == pids[1] and status.worker_pids[0] != pids[0]
    assert seen | {status.state.state} == {"ready"}, "who asked for the state saw nothing of it"


def test_a_request_that_kills_its_worker_harms_nobody_on_the_other(engine: DiffGenerator, pool: Pool) -> None:
    beside = pool.submit(engine.generate, sleeper(150))
    wait_for(engine, lambda status: status.num_running == 1)
    time.sleep(0.2)
    with pytest.raises(RemoteError) as raised:
        engine.generate({"prompt": "die"})
    assert raised.value.code == "poison_request"
    assert one(beside.result()).metrics["attempts"] == 1
    wait_for(engine, lambda status: status.num_workers == 2 and status.num_running == 0)


def test_a_worker_that_hangs_costs_its_own_replica_only(engine: DiffGenerator, pool: Pool) -> None:
    """A stopped process says nothing any more, and is replaced when that shows."""
    pids = wait_for(engine, lambda status: status.num_workers == 2).worker_pids
    both = [pool.submit(engine.generate, sleeper(80, seed=seed)) for seed in (1, 2)]
    wait_for(engine, lambda status: status.num_running == 2)
    time.sleep(0.5)
    os.kill(pids[1], signal.SIGSTOP)
    results = [one(request.result()) for request in both]
    assert sorted(result.metrics["attempts"] for result in results) == [1, 2]
    assert wait_for(engine, lambda status: status.num_workers == 2).worker_pids[0] == pids[0]
    assert not psutil.pid_exists(pids[1])


def test_operations_on_the_engine_reach_every_replica(engine: DiffGenerator) -> None:
    def do(operation: Any) -> str:
        return engine._engine.spawn(engine._engine.client.control(operation)).result(100)

    wait_for(engine, lambda status: status.num_workers == 2)
    pids = set(engine.status().worker_pids)
    assert "forgotten" in do("flush_cache")
    assert do("release_memory_occupation") == "the memory is released"
    assert (engine.status().num_workers, engine.status().state.state) == (0, "asleep")
    assert not any(psutil.pid_exists(pid) for pid in pids)
    do("resume_memory_occupation")
    status = engine.status()
    assert (status.num_workers, status.state.state) == (2, "ready") and pids.isdisjoint(status.worker_pids)
    assert "loaded" in do("update_weights_from_disk")
    assert len(set(engine.status().worker_pids) | set(status.worker_pids)) == 4


def test_each_replica_warms_a_size_up_before_its_first_request(pool: Pool) -> None:
    with DiffGenerator.from_pretrained("null-model", **OPTIONS, warmup_mode="request") as engine:
        wishes = [sleeper(10, seed=seed) for seed in range(4)]
        results = [one(result) for result in pool.map(engine.generate, wishes)]
        assert all(result.metrics["warmup_excluded"] for result in results)
        started = [item.event for item in engine.stream(sleeper(1)) if isinstance(item.event, Started)]
        assert len(started) == 1 and engine.status().num_queued == 0


def test_workers_that_never_take_a_request_count_as_stuck() -> None:
    replicas, _ = Replicas.of(EngineConfig(args=ServerArgs(), run_dir=""), WaitingQueue())
    (replica,) = replicas
    replica.workers.ranks = [cast(Any, None)]
    record = RequestRecord(request_id="r", client=b"c", params=SamplingParams(prompt="a"), order=1, max_attempts=1)
    replica.take(record)
    record.status, record.handed_at = "admitting", time.monotonic() - SILENCE_ADMITTING_S + 10
    assert replica.silence() is None
    record.handed_at -= 20
    assert replica.silence() == "a request has been admitted for 130 s"
    record.status = "running"
    assert replica.silence() is None


def test_a_gpu_that_is_named_where_there_is_none_is_an_error() -> None:
    with pytest.raises(RemoteError, match=r"gpu_ids: got \(0, 1\), accepted is none; no CUDA device is visible"):
        DiffGenerator.from_pretrained("null-model", gpu_ids=(0, 1), dp_size=2, device="cpu")
    with pytest.raises(InvalidValue, match=r"gpu_ids: got .*, accepted is as many as num_gpus: 2, not 1"):
        DiffGenerator.from_pretrained("null-model", gpu_ids=(0,), num_gpus=2)
