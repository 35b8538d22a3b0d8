"""The engine's promises, kept with a family that does nothing: real processes, real pipes, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    EngineStopped,
    InvalidRequest,
    ModelError,
    RemoteError,
    RequestCancelled,
    ServingError,
)
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import (
    DiffGenerator,
    GenerationResult,
)
from sglang.multimodal_gen.runtime.managers.messages import (
    PROTOCOL_VERSION,
    Cancelled,
    CancelRequest,
    Codec,
    Failed,
    GenerateRequest,
    Hello,
    Progress,
    Queued,
    Refused,
    Started,
    ToClient,
    encode,
)
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.run_directories import private_run_directories

null_family.register()


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("null-model", batching_max_size=4) as generator:
        yield generator


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def wait_until(condition: Any, *, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def one(result: GenerationResult | list[GenerationResult]) -> GenerationResult:
    assert isinstance(result, GenerationResult)
    return result


# --- results ---


def test_one_output_gives_one_result_with_all_that_was_asked_for(engine: DiffGenerator) -> None:
    result = one(engine.generate({"prompt": "x", "seed": 7, "return_frames": True, "return_latents": True}))
    assert result.frames is not None and result.latents is not None
    assert result.frames.shape == (5, 16, 16, 3)
    assert result.frames.dtype == np.uint8
    assert result.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert result.latents.shape == (1, 1, 1, 1)
    assert (result.seed, result.size, result.output_file_path) == (7, (16, 16, 5), None)
    assert set(result.metrics["stage_seconds"]) >= {"encode", "denoise", "decode"}
    assert len(result.metrics["step_ms"]) == 4
    assert result.metrics["step_batch_sizes"] == [1, 1, 1, 1]
    assert result.peak_memory_mb > 0


def test_several_prompts_and_outputs_give_a_list_in_order(engine: DiffGenerator) -> None:
    results = engine.generate({"prompt": ["a", "a"], "num_outputs_per_prompt": 2, "seed": 5})
    assert isinstance(results, list)
    assert [(r.prompt_index, r.output_index, r.seed) for r in results] == [(0, 0, 5), (0, 1, 6), (1, 0, 5), (1, 1, 6)]


def test_an_unset_seed_is_drawn_and_reported(engine: DiffGenerator) -> None:
    seeds = {one(engine.generate({"prompt": "x"})).seed for _ in range(3)}
    assert len(seeds) == 3


def test_latent_output_decodes_nothing(engine: DiffGenerator) -> None:
    result = one(engine.generate({"prompt": "x", "output_type": "latent"}))
    assert result.latents is not None
    assert result.frames is None
    assert "decode" not in result.metrics["stage_seconds"]


def test_generate_async_works_in_any_loop_and_its_cancellation_cancels_the_request(engine: DiffGenerator) -> None:
    async def both() -> None:
        result = one(await engine.generate_async({"prompt": "x"}))
        assert result.size == (16, 16, 5)
        task = asyncio.create_task(engine.generate_async({"prompt": "sleep-50", "num_inference_steps": 1000}))
        await asyncio.sleep(0.3)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(both())
    assert wait_until(lambda: engine.status().num_running == 0, timeout_s=5)


# --- events ---


def test_events_come_in_order_with_rising_progress_and_an_eta(engine: DiffGenerator) -> None:
    events = [item.event for item in engine.stream({"prompt": "sleep-5", "num_inference_steps": 6})]
    assert [type(e) for e in events[:2]] == [Queued, Started]
    progress = [e for e in events if isinstance(e, Progress)]
    assert [p.step for p in progress] == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    fractions = [p.fraction for p in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    known = [p.eta_s for p in progress if p.eta_s is not None]
    assert len(known) >= 6
    assert known[-1] == pytest.approx(0.0, abs=0.05)
    assert isinstance(events[-1], GenerationResult)


def test_unequal_requests_interleave_and_share_forwards(engine: DiffGenerator) -> None:
    order: list[int] = []
    ends: list[int] = []
    wish = {"prompt": ["sleep-5 a", "sleep-5 b", "sleep-5 c"], "num_inference_steps": 12}
    for item in engine.stream(wish):
        if isinstance(item.event, Progress) and item.event.phase == "denoise":
            order.append(item.prompt_index)
        if isinstance(item.event, GenerationResult):
            ends.append(item.prompt_index)
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches > 12  # one after another would switch twice
    assert engine.status().mean_batch_size > 1.0


def test_a_short_request_overtakes_a_long_one(engine: DiffGenerator) -> None:
    long = engine.stream({"prompt": "sleep-10", "num_inference_steps": 300})
    for item in long:
        if isinstance(item.event, Progress):
            break
    begin = time.monotonic()
    engine.generate({"prompt": "x", "num_inference_steps": 2})
    assert time.monotonic() - begin < 2.0  # the long one takes 3 s and more
    assert engine.status().num_running == 1
    long.close()


# --- cancelling ---


def test_cancel_during_denoising_ends_the_request_and_runs_no_further_tick_of_it(engine: DiffGenerator) -> None:
    events = engine.stream({"prompt": "sleep-20", "num_inference_steps": 500})
    last_step = 0
    with contextlib.closing(events):
        for item in events:
            if isinstance(item.event, Progress) and item.event.step == 3:
                engine.cancel(item.request_id)
            if isinstance(item.event, Progress):
                last_step = item.event.step
            if isinstance(item.event, ServingError):
                assert isinstance(item.event, RequestCancelled)
    assert last_step < 10
    ticks = engine.status().ticks
    time.sleep(0.2)
    assert engine.status().ticks == ticks
    assert engine.status().ledger_files == 0


def test_cancelling_a_queued_request_leaves_the_others(engine: DiffGenerator) -> None:
    results = {}
    wish = {"prompt": [f"sleep-2 {i}" for i in range(12)], "num_inference_steps": 10}
    for item in engine.stream(wish):
        if isinstance(item.event, Queued) and item.prompt_index == 11:
            engine.cancel(item.request_id)
        if isinstance(item.event, GenerationResult | ServingError):
            results[item.prompt_index] = type(item.event)
    assert results.pop(11) is RequestCancelled
    assert set(results.values()) == {GenerationResult}


# --- errors ---


def test_a_failing_request_ends_with_its_own_error_and_the_engine_goes_on(engine: DiffGenerator) -> None:
    with pytest.raises(RemoteError, match="prompt: got a word that fails") as caught:
        engine.generate({"prompt": "fail"})
    assert (caught.value.code, caught.value.param) == (InvalidRequest.code, "prompt")
    assert one(engine.generate({"prompt": "x"})).size == (16, 16, 5)


@pytest.mark.parametrize(("fault", "code"), [("bug", "internal_error"), ("oom", "out_of_memory")])
def test_what_goes_wrong_in_a_unit_ends_in_a_sentence_that_hides_the_exception(
    engine: DiffGenerator, fault: str, code: str
) -> None:
    with pytest.raises(RemoteError) as caught:
        engine.generate({"prompt": fault})
    assert caught.value.code == code
    assert "the unit" not in caught.value.message
    assert one(engine.generate({"prompt": "x"})).size == (16, 16, 5)


def test_one_failing_request_does_not_take_its_batch_along(engine: DiffGenerator) -> None:
    ends: dict[int, type] = {}
    wish = {"prompt": ["sleep-3 a", "fail sleep-3", "sleep-3 b"], "num_inference_steps": 8}
    for item in engine.stream(wish):
        if isinstance(item.event, GenerationResult | ServingError):
            ends[item.prompt_index] = type(item.event)
    assert ends == {0: GenerationResult, 1: RemoteError, 2: GenerationResult}


def test_requests_that_fail_only_in_company_are_run_again_alone(engine: DiffGenerator) -> None:
    results = engine.generate({"prompt": ["fail-shared a", "fail-shared b"], "num_inference_steps": 5})
    assert isinstance(results, list)
    assert len(results) == 2


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"prompt": ""}, "prompt: got an empty text"),
        ({"prompt": "x", "width": 17}, "17x16, accepted are multiples of 16 in width and height; nearest: 16x16"),
        ({"prompt": "x", "num_frames": 6}, "num_frames: got 6, accepted are 4k.1 frames up to 1001; nearest: 5"),
        ({"prompt": "x", "width": 16000, "height": 16000}, "accepted are at most 1048576 pixels"),
        ({"prompt": "x", "guidance": 3}, "unknown parameter guidance; did you mean guidance_scale"),
        ({"prompt": "x", "seed": [1, 2], "num_outputs_per_prompt": 3}, "as many as outputs per prompt"),
        ({"prompt": ["a", "b"], "output_file_name": "x.mp4"}, "no fixed name when there are several prompts"),
        ({}, "prompt: nothing given"),
        ({"prompt": "x", "save_output": True, "output_file_name": "x.png"}, "a format that holds the 5 frames: mp4"),
        ({"prompt": "x", "num_inference_steps": float("nan")}, "num_inference_steps: got nan, accepted is an integer"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale: got nan, accepted is a finite number"),
        ({"prompt": "x", "seed": -1}, "seed: got -1"),
        ({"prompt": 5}, "prompt: got 5, accepted is a text or a list of texts"),
    ],
)  # fmt: skip
def test_a_bad_wish_is_refused_at_the_door_in_one_sentence(engine: DiffGenerator, wish: dict, says: str) -> None:
    ticks = engine.status().ticks
    with pytest.raises(ServingError, match=says):
        engine.generate(wish)
    assert engine.status().ticks == ticks


@pytest.mark.parametrize("payload", [b"\x80\x04\x95", b"", b"{}", pickle.dumps({"type": "generate"})])
def test_bytes_that_are_no_message_are_refused_alone(engine: DiffGenerator, payload: bytes) -> None:
    """Also pickles: nothing on this socket is ever unpickled."""
    with raw_client(engine) as socket:
        socket.send(payload)
        answer = Codec(ToClient).decode(socket.recv())
        assert isinstance(answer, Refused)
        assert answer.error.code == InvalidRequest.code
    assert one(engine.generate({"prompt": "x"})).size == (16, 16, 5)


def test_another_version_of_the_protocol_is_refused_by_name(engine: DiffGenerator) -> None:
    with raw_client(engine) as socket:
        socket.send(encode(Hello(protocol_version=PROTOCOL_VERSION + 1, client_name="future")))
        answer = Codec(ToClient).decode(socket.recv())
        assert isinstance(answer, Refused)
        assert answer.error.code == "protocol_mismatch"
        assert str(PROTOCOL_VERSION + 1) in answer.error.message


def test_a_request_id_that_is_running_is_refused(engine: DiffGenerator) -> None:
    params = SamplingParams(
        prompt="sleep-50", width=16, height=16, num_frames=5, fps=8, num_inference_steps=100, seed=1
    )  # fmt: skip
    with raw_client(engine) as socket:
        socket.send(encode(GenerateRequest(request_id="twice", params=params)))
        socket.send(encode(GenerateRequest(request_id="twice", params=params)))
        # What the first one tells of itself may come before the second is answered.
        while not isinstance(answer := Codec(ToClient).decode(socket.recv()), Failed):
            pass
        assert answer.error.param == "request_id"
        socket.send(encode(CancelRequest(request_id="twice")))
        while not isinstance(answer := Codec(ToClient).decode(socket.recv()), Cancelled):
            assert not isinstance(answer, Failed)


@contextlib.contextmanager
def raw_client(engine: DiffGenerator) -> Iterator[zmq.Socket[bytes]]:
    """A socket of its own at the engine's address."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger, socket.rcvtimeo = 0, 10_000
        socket.connect(engine._engine.client.run_dir.scheduler_address)
        yield socket


# --- dead and silent workers ---


def test_a_request_that_kills_its_worker_once_is_retried_and_others_lose_nothing(
    engine: DiffGenerator, tmp_path: Path
) -> None:
    restarts = engine.status().num_worker_restarts
    marker = tmp_path / "died"
    results = engine.generate({"prompt": [f"die-once-{marker}", "sleep-1 y"], "num_inference_steps": 6})
    assert isinstance(results, list)
    assert results[0].metrics["attempts"] == 2
    assert engine.status().num_worker_restarts == restarts + 1


def test_a_request_that_kills_every_worker_fails_after_two_and_the_next_one_runs(engine: DiffGenerator) -> None:
    with pytest.raises(RemoteError, match=r"the worker was lost 2 times .*, its process died") as caught:
        engine.generate({"prompt": "die"})
    assert caught.value.code == "poison_request"
    assert one(engine.generate({"prompt": "x"})).metrics["attempts"] == 1


def test_a_device_that_fails_is_a_lost_worker_and_the_reason_is_told(engine: DiffGenerator) -> None:
    reason = r"the worker was lost 2 times .*, its device failed: CUDA error: an illegal memory access was encountered$"
    with pytest.raises(RemoteError, match=reason) as caught:
        engine.generate({"prompt": "gpu-lost"})
    assert caught.value.code == "poison_request"
    assert one(engine.generate({"prompt": "x"})).metrics["attempts"] == 1


def test_a_stuck_unit_is_noticed_against_its_learned_time(engine: DiffGenerator) -> None:
    engine.generate({"prompt": "x"})  # learns this shape: microseconds, so the deadline is the 5 s of slack
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=r"the worker was lost .* a tick has run for"):
        engine.generate({"prompt": "hang"})
    assert time.monotonic() - begin < 40
    assert one(engine.generate({"prompt": "x"})).size == (16, 16, 5)


# --- ends ---


@pytest.fixture
def clean_slate() -> Iterator[None]:
    """Nothing of an engine started in the test may outlive it: no process, no directory."""
    mine = psutil.Process()
    before = {p.pid for p in mine.children(recursive=True)}
    with private_run_directories() as directories:
        yield

        def leftovers() -> list[str]:
            alive = [p for p in mine.children(recursive=True) if p.pid not in before]
            return [*map(str, alive), *map(str, directories.left())]

        assert wait_until(lambda: not leftovers()), leftovers()


def tree_of(generator: DiffGenerator) -> list[psutil.Process]:
    supervisor = generator._engine._child.pid
    return [psutil.Process(supervisor), *descendants(supervisor)]


def assert_all_gone(processes: list[psutil.Process]) -> None:
    gone = wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))
    assert gone, [p for p in processes if p.is_running()]


@pytest.mark.usefixtures("clean_slate")
def test_the_context_manager_leaves_nothing_also_in_the_middle_of_a_request() -> None:
    with DiffGenerator.from_pretrained("null-model") as generator:
        processes = tree_of(generator)
        assert len(processes) == 4  # supervisor, scheduler, output process, worker
        events = generator.stream({"prompt": "sleep-50", "num_inference_steps": 1000})
        next(events)
    assert_all_gone(processes)
    with pytest.raises(EngineStopped):
        generator.generate({"prompt": "x"})


@pytest.mark.usefixtures("clean_slate")
def test_garbage_collection_ends_the_engine() -> None:
    generator = DiffGenerator.from_pretrained("null-model")
    processes = tree_of(generator)
    del generator
    gc.collect()
    assert_all_gone(processes)


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.test import null_family
from sglang.multimodal_gen.test.run_directories import private_run_directories
null_family.register()
from sglang import DiffGenerator
generator = DiffGenerator.from_pretrained("null-model")
print(generator._engine._child.pid, flush=True)
for item in generator.stream({{"prompt": "sleep-20", "num_inference_steps": 1000}}):
    pass
"""


@pytest.mark.usefixtures("clean_slate")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_signal_to_the_parent_leaves_nothing_behind(number: signal.Signals) -> None:
    """A plain script without a main guard; SIGKILL included."""
    script = subprocess.Popen([sys.executable, "-c", SCRIPT.format(root="")], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert script.stdout is not None
    supervisor = int(script.stdout.readline())
    processes = [psutil.Process(supervisor), *descendants(supervisor)]
    assert len(processes) == 4
    time.sleep(0.3)
    script.send_signal(number)
    script.wait(timeout=30)
    script.stdout.close()
    assert_all_gone(processes)


@pytest.mark.usefixtures("clean_slate")
@pytest.mark.parametrize("victim", ["supervisor", "scheduler"])
def test_killing_an_inner_process_ends_requests_with_an_error_and_leaves_nothing(victim: str) -> None:
    with DiffGenerator.from_pretrained("null-model") as generator:
        processes = tree_of(generator)
        names = {"supervisor": "launch_server", "scheduler": "managers.scheduler"}
        target = next(p for p in processes if any(names[victim] in part for part in p.cmdline()))
        events = generator.stream({"prompt": "sleep-20", "num_inference_steps": 1000})
        next(events)
        threading.Timer(0.3, target.kill).start()
        last = [item.event for item in events][-1]
        assert isinstance(last, ServingError)
        if victim == "scheduler":  # it is replaced, and so are its workers
            assert one(generator.generate({"prompt": "x"})).size == (16, 16, 5)
            processes += tree_of(generator)
    assert_all_gone(processes)


@pytest.mark.usefixtures("clean_slate")
def test_a_stopped_worker_is_noticed_by_its_silence_and_replaced() -> None:
    with DiffGenerator.from_pretrained("null-model") as generator:
        (pid,) = generator.status().worker_pids
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        assert one(generator.generate({"prompt": "x"})).metrics["attempts"] == 2
        assert time.monotonic() - begin < 40
        assert generator.status().worker_pids != (pid,)


# --- models that do not load ---


@pytest.mark.usefixtures("clean_slate")
def test_a_model_that_cannot_be_loaded_ends_in_its_own_error_and_is_not_tried_again(tmp_path: Path) -> None:
    """Only a worker can find this one out: the directory looks like a model until its parts are opened."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(RemoteError) as caught:
        DiffGenerator.from_pretrained(str(tmp_path))
    assert caught.value.code == "unsupported_model"
    with DiffGenerator.from_server_args(ServerArgs.from_kwargs(model_path=str(tmp_path))) as generator:
        assert wait_until(lambda: generator.status().state.state == "failed")
        time.sleep(0.5)
        status = generator.status()
        assert (status.num_workers, status.num_worker_restarts) == (0, 0)


@pytest.mark.usefixtures("clean_slate")
def test_a_model_whose_workers_die_while_they_load_it_is_given_up() -> None:
    killed: set[int] = set()

    def failed() -> bool:
        status = generator.status()
        for pid in {*status.worker_pids} - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return status.state.state == "failed"

    with DiffGenerator.from_server_args(ServerArgs.from_kwargs(model_path="null-model")) as generator:
        assert wait_until(failed)
        error = generator.status().state.error
        assert error is not None and error.code == "model_not_loadable"
        assert f"the worker died {len(killed)} times while loading the model" in error.message
        with pytest.raises(RemoteError, match="while loading the model"):
            generator.generate({"prompt": "x"})


@pytest.mark.usefixtures("clean_slate")
def test_a_path_that_is_no_model_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    before = len(psutil.Process().children())
    with pytest.raises(ModelError, match=r"has no model_index.json"):
        DiffGenerator.from_pretrained(str(tmp_path))
    assert len(psutil.Process().children()) == before
