"""The scheduling policy in a running engine: turns, deadlines, floods, and requests that kill their workers."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import DeadlineExceeded, PoisonRequest, RemoteError, RequestTooLarge, ServingError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import (
    DiffGenerator,
    GenerationEvent,
    GenerationResult,
)
from sglang.multimodal_gen.runtime.managers.messages import (
    PROTOCOL_VERSION,
    TERMINAL_EVENTS,
    CancelRequest,
    Codec,
    Failed,
    Finished,
    GenerateRequest,
    Hello,
    Progress,
    Queued,
    Started,
    ToClient,
    encode,
)
from sglang.multimodal_gen.test import null_family

null_family.register()
# Of another class and another batch key than the short ones.
LONG = {"prompt": "key-long sleep-50", "width": 64, "height": 64, "num_frames": 41, "num_inference_steps": 1000}


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffGenerator]:
    """One place for each class and one more: two batches of one request."""
    with DiffGenerator.from_pretrained("null-model", batching_max_size=1, max_queued_requests=200) as generator:
        yield generator


class Follower:
    """Reads a stream in a thread; `close` cancels it."""

    def __init__(self, engine: DiffGenerator, wish: dict[str, Any]) -> None:
        self.events: list[GenerationEvent] = []
        self._engine = engine
        self._wish = wish
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for item in self._engine.stream(self._wish):
            self.events.append(item)

    @property
    def steps(self) -> int:
        return sum(isinstance(item.event, Progress) and item.event.phase == "denoise" for item in list(self.events))

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.events[-3:]
            time.sleep(0.005)

    def end(self) -> list[GenerationEvent]:
        """Cancel what still runs."""
        for request_id in {item.request_id for item in self.events}:
            self._engine.cancel(request_id)
        self._thread.join(60)
        return self.events


@contextlib.contextmanager
def following(engine: DiffGenerator, wish: dict[str, Any]) -> Iterator[Follower]:
    follower = Follower(engine, wish)
    try:
        yield follower
    finally:
        follower.end()


# --- turns ---


def test_a_short_request_has_its_first_step_within_two_ticks_of_a_long_one(engine: DiffGenerator) -> None:
    """Both are followed on one connection, so their events come in the order in which they happened."""
    events: list[tuple[int, Any]] = []
    with raw_client(engine) as client:
        client.send(0, **LONG)
        while client.num_open:
            event = client.receive()
            if not hasattr(event, "request_id"):
                continue
            number = client.number(event.request_id)
            events.append((number, event))
            if isinstance(event, Progress) and number == 0 and event.step == 5:
                client.send(1, prompt="key-short", num_inference_steps=4)
            if isinstance(event, Finished) and number == 1:
                client.cancel(0)
    places = [index for index, (number, event) in enumerate(events) if number == 1]
    queued, steps = places[0], [i for i in places if isinstance(events[i][1], Progress) and events[i][1].step > 0]
    assert isinstance(events[queued][1], Queued)
    between = [event for number, event in events[queued : steps[0]] if number == 0 and isinstance(event, Progress)]
    assert len(between) <= 2
    during = [event for number, event in events[steps[0] : steps[3]] if number == 0 and isinstance(event, Progress)]
    assert len(during) <= 1, "four of its steps are less than one of the other's"


def test_a_short_request_starts_though_long_ones_hold_every_place_and_fill_the_queue(engine: DiffGenerator) -> None:
    with following(engine, LONG | {"num_outputs_per_prompt": 10, "num_inference_steps": 100}) as long:
        long.wait(lambda: engine.status().num_running == 2 and engine.status().num_queued == 8)
        result = engine.generate({"prompt": "key-short", "num_inference_steps": 4})
        assert isinstance(result, GenerationResult)
        status = engine.status()
        assert (status.num_running, status.num_queued) == (2, 8), "the short one had a place of its own"
        assert not any(isinstance(item.event, GenerationResult) for item in long.events)


def test_higher_priorities_start_first_and_each_is_first_come_first_served(engine: DiffGenerator) -> None:
    started: list[tuple[int, int]] = []
    with raw_client(engine) as client:
        for number in range(4):  # two of them hold the places of their class
            client.send(number, prompt="sleep-20 key-a", num_inference_steps=20)
        for number in range(4, 24):
            client.send(number, prompt="sleep-2 key-b", num_inference_steps=10, priority=(number % 2) * 4 - 2)
        while client.num_open:
            event = client.receive()
            if isinstance(event, Started) and client.number(event.request_id) >= 4:
                number = client.number(event.request_id)
                started.append(((number % 2) * 4 - 2, number))
    for priority in (-2, 2):
        numbers = [number for its, number in started if its == priority]
        assert len(numbers) == 10 and numbers == sorted(numbers)
    halfway = [priority for priority, _ in started[:10]]
    assert halfway.count(2) > halfway.count(-2) > 0, "none waits for all of the others"


def test_those_who_wait_hear_of_their_place_and_their_time(engine: DiffGenerator) -> None:
    engine.generate({"prompt": "sleep-20 key-c", "num_inference_steps": 10})
    heard: dict[int, list[Queued]] = {}
    wish = {"prompt": [f"sleep-20 key-c {i}" for i in range(8)], "num_inference_steps": 60}
    for item in engine.stream(wish):
        if isinstance(item.event, Queued):
            heard.setdefault(item.prompt_index, []).append(item.event)
    first = [events[0].position for _, events in sorted(heard.items())]
    # One more waits with each that comes; on a busy machine some have started meanwhile.
    assert first[0] == 0 and max(first) >= 3
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(first))
    last = heard[7]
    assert all(event.eta_s is not None and event.eta_s > 0 for event in last)
    positions = [event.position for event in last]
    assert len(positions) >= 2 and positions == sorted(set(positions), reverse=True)


# --- deadlines ---


def test_a_deadline_ends_a_running_request_and_no_tick_contains_it_any_more(engine: DiffGenerator) -> None:
    with pytest.raises(RemoteError) as caught:
        engine.generate({"prompt": "sleep-20", "num_inference_steps": 1000, "deadline_s": 0.5})
    assert caught.value.code == DeadlineExceeded.code
    assert (caught.value.http_status, caught.value.retryable, caught.value.param) == (504, False, "deadline_s")
    ticks = engine.status().ticks
    time.sleep(0.2)
    status = engine.status()
    assert (status.ticks, status.num_running, status.reserved_bytes, status.ledger_files) == (ticks, 0, 0, 0)


def test_a_deadline_ends_a_request_that_waits_and_leaves_the_others(engine: DiffGenerator) -> None:
    wish = {"prompt": "sleep-20 key-d", "num_inference_steps": 60, "num_outputs_per_prompt": 3}
    with following(engine, wish) as others:
        others.wait(lambda: engine.status().num_queued == 1)
        begin = time.monotonic()
        with pytest.raises(RemoteError, match=r"within 0\.3 s, and it has passed"):
            engine.generate({"prompt": "sleep-20 key-d", "num_inference_steps": 60, "deadline_s": 0.3})
        assert time.monotonic() - begin < 30
        others.wait(lambda: sum(isinstance(i.event, GenerationResult) for i in others.events) == 3)
    ends = {type(item.event) for item in others.events if isinstance(item.event, GenerationResult | ServingError)}
    assert ends == {GenerationResult}


def test_a_deadline_ends_a_request_whose_frames_are_being_decoded(engine: DiffGenerator, tmp_path: Path) -> None:
    never = tmp_path / "never"
    threading.Timer(3.0, never.touch).start()  # so that the worker, which nothing interrupts, is free again
    with pytest.raises(RemoteError) as caught:
        engine.generate({"prompt": f"noise-until-{never}", "return_frames": True, "deadline_s": 1.0})
    assert caught.value.code == "deadline_exceeded"
    assert isinstance(engine.generate({"prompt": "x"}), GenerationResult)
    assert engine.status().ledger_files == 0


def test_a_deadline_that_is_kept_changes_nothing(engine: DiffGenerator) -> None:
    wish = {"prompt": "x", "seed": 3, "return_frames": True}
    plain = engine.generate(wish)
    hurried = engine.generate(wish | {"deadline_s": 600, "priority": 2})
    assert isinstance(plain, GenerationResult) and isinstance(hurried, GenerationResult)
    assert np.array_equal(plain.frames, hurried.frames)


def test_a_deadline_that_cannot_be_kept_is_refused_before_anything_runs(engine: DiffGenerator) -> None:
    for _ in range(2):
        engine.generate({"prompt": "sleep-50 key-slow", "width": 48, "num_inference_steps": 4})
    ticks = engine.status().ticks
    with pytest.raises(RemoteError, match="such a request takes at least"):
        engine.generate({"prompt": "sleep-50 key-slow", "width": 48, "num_inference_steps": 900, "deadline_s": 2.0})
    assert engine.status().ticks == ticks


def test_more_work_than_a_request_may_ask_for_is_refused_at_the_door(engine: DiffGenerator) -> None:
    with pytest.raises(RequestTooLarge, match=r"1024 x 1024 x 5 x 1000 x 10 = \d+, accepted is at most"):
        engine.generate({"prompt": "x", "width": 1024, "height": 1024, "num_inference_steps": 1000,
                         "num_outputs_per_prompt": 10})  # fmt: skip


# --- floods ---


class RawClient:
    """Speaks the protocol without an EngineClient, so that nothing slows it down."""

    def __init__(self, socket: zmq.Socket[bytes], name: str) -> None:
        self._socket, self._name = socket, name
        self._codec = Codec(ToClient)
        self.num_open = 0

    def send(self, number: int, *, max_attempts: int = 2, **values: Any) -> None:
        own = {"width": 16, "height": 16, "num_frames": 5, "fps": 8, "num_inference_steps": 1, "guidance_scale": 1.0}
        params = SamplingParams.from_values(own | {"prompt": "x", "seed": 1} | values)
        request_id = f"{self._name}-{number}"
        self._socket.send(encode(GenerateRequest(request_id=request_id, params=params, max_attempts=max_attempts)))
        self.num_open += 1

    def cancel(self, number: int) -> None:
        self._socket.send(encode(CancelRequest(request_id=f"{self._name}-{number}")))

    def receive(self) -> Any:
        event = self._codec.decode(self._socket.recv())
        self.num_open -= isinstance(event, TERMINAL_EVENTS)
        return event

    def number(self, request_id: str) -> int:
        return int(request_id.removeprefix(f"{self._name}-"))


@contextlib.contextmanager
def raw_client(engine: DiffGenerator) -> Iterator[RawClient]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger, socket.rcvtimeo = 0, 60_000
        socket.set_hwm(0)
        socket.connect(engine._engine.client.run_dir.scheduler_address)
        socket.send(encode(Hello(protocol_version=PROTOCOL_VERSION, client_name="raw")))
        yield RawClient(socket, f"raw{time.monotonic_ns()}")


def test_of_thousands_at_once_each_is_taken_or_told_when_to_come_back(engine: DiffGenerator) -> None:
    taken, refused, finished = [], [], []
    with raw_client(engine) as client:
        for number in range(3000):
            client.send(number)
        while client.num_open:
            event = client.receive()
            if isinstance(event, Started):
                taken.append(client.number(event.request_id))
            elif isinstance(event, Finished):
                finished.append(client.number(event.request_id))
            elif isinstance(event, Failed):
                refused.append(event.error)
    assert len(finished) + len(refused) == 3000
    assert len(finished) >= 200 and len(refused) > 0
    assert taken == sorted(taken), "first come, first served"
    assert sorted(finished) == taken
    assert {error.code for error in refused} == {"queue_full"}
    assert all(error.retry_after_s is not None and 1 <= error.retry_after_s <= 120 for error in refused)
    status = engine.status()
    assert (status.num_queued, status.num_running, status.ledger_files) == (0, 0, 0)


def test_cancelling_from_the_middle_of_a_long_queue_leaves_the_others_in_order(engine: DiffGenerator) -> None:
    started, ends = [], {}
    with raw_client(engine) as client:
        for number in range(150):
            client.send(number, prompt="sleep-20" if number < 2 else "x", num_inference_steps=10)
        for number in range(20, 150, 2):
            client.cancel(number)
        while client.num_open:
            event = client.receive()
            if isinstance(event, Started):
                started.append(client.number(event.request_id))
            if isinstance(event, TERMINAL_EVENTS):
                ends[client.number(event.request_id)] = type(event)
    cancelled = {number for number, kind in ends.items() if kind is not Finished}
    assert cancelled and cancelled <= set(range(20, 150, 2))
    kept = [number for number in started if number not in cancelled]
    assert kept == sorted(kept) and len(kept) == 150 - len(cancelled)


# --- requests that kill their workers ---


def test_a_request_that_kills_every_worker_is_found_and_those_beside_it_are_unharmed() -> None:
    """Nobody knows at first whose fault it was; the second time it runs alone."""
    ends: dict[int, GenerationResult | ServingError] = {}
    with DiffGenerator.from_pretrained("null-model", batching_max_size=4) as engine:
        wish = {"prompt": ["sleep-5 a", "sleep-5 die", "sleep-5 b", "sleep-5 c"], "num_inference_steps": 12}
        for item in engine.stream(wish):
            if isinstance(item.event, GenerationResult | ServingError):
                ends[item.prompt_index] = item.event
        assert engine.status().num_worker_restarts == 2
    poison = ends.pop(1)
    assert isinstance(poison, RemoteError)
    assert (poison.code, poison.http_status, poison.retryable) == (PoisonRequest.code, 500, False)
    assert "the worker was lost 2 times" in poison.message
    assert all(isinstance(event, GenerationResult) for event in ends.values())


def test_a_request_that_is_not_tried_again_says_that_its_worker_was_lost(engine: DiffGenerator) -> None:
    """Once proves nothing against it."""
    with raw_client(engine) as client:
        client.send(0, max_attempts=1, prompt="die", num_inference_steps=4)
        while client.num_open:
            event = client.receive()
    assert isinstance(event, Failed)
    assert event.error.code == "worker_lost"
    assert (event.error.http_status, event.error.retryable) == (503, False)


# --- results ---

COMPANY = [
    {"prompt": "a red circle", "num_inference_steps": 6, "guidance_scale": 4.0, "seed": 1},
    {"prompt": "a green square", "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 2},
    {"prompt": "a blue star", "num_inference_steps": 9, "guidance_scale": 7.0, "seed": 3, "priority": 2},
]


@pytest.mark.parametrize("deterministic", [False, True])
def test_who_shares_the_device_changes_no_result(wan_checkpoint: Callable[[str], Path], deterministic: bool) -> None:
    """Steps, guidance and its absence differ. Sharing forwards changes the order of summation, which may turn a value
    of 255 into its neighbour; with `--deterministic` nothing changes."""
    options: dict[str, Any] = {"device": "cpu", "deterministic": deterministic, "batching_max_size": 4}
    base = {"width": 48, "height": 48, "num_frames": 9, "return_frames": True, "return_latents": True}
    with DiffGenerator.from_pretrained(str(wan_checkpoint("plain")), **options) as engine:
        alone = [engine.generate(base | wish) for wish in COMPANY]
        with ThreadPoolExecutor(len(COMPANY)) as pool:
            for _ in range(10):  # on a busy machine the first may be done before the last has come
                together = list(pool.map(lambda wish: engine.generate(base | wish), COMPANY))
                if shared := max(max(result.metrics["step_batch_sizes"]) for result in together) > 1:
                    break
    assert shared is not deterministic
    for lone, beside in zip(alone, together, strict=True):
        assert isinstance(lone, GenerationResult)
        if deterministic:
            assert np.array_equal(lone.frames, beside.frames) and np.array_equal(lone.latents, beside.latents)
        else:
            assert np.abs(lone.frames.astype(int) - beside.frames.astype(int)).max() <= 1
            assert np.abs(lone.latents - beside.latents).max() <= 1e-4 * np.abs(lone.latents).max()
