"""What runs in two streams of a GPU is in the order that results need, by stand-ins that know what waits for what."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from sglang.multimodal_gen.configs.request_plan import LAUNCH_ORDER, Lane
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache
from sglang.multimodal_gen.runtime.pipelines_core.lane_streams import LaneStreams
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

MAIN, SIDE = 0, 1
Clock = tuple[int, int]
"""Of a moment: how many works of each stream are done before it."""


class Work(NamedTuple):
    """One unit: in which stream, its number there, and what is done before it."""

    stream: int
    number: int
    before: Clock

    def is_before(self, other: Work) -> bool:
        return other.before[self.stream] >= self.number


class OrderedStreams:
    """Two streams that do nothing but know their order."""

    def __init__(self) -> None:
        self.clocks: list[Clock] = [(0, 0), (0, 0)]
        self.current = MAIN

    def main_event(self) -> Clock:
        return self.clocks[MAIN]

    def side_event(self) -> Clock:
        return self.clocks[SIDE]

    def main_waits(self, event: Clock) -> None:
        self._wait(MAIN, event)

    def side_waits(self, event: Clock) -> None:
        self._wait(SIDE, event)

    def _wait(self, stream: int, event: Clock) -> None:
        mine = self.clocks[stream]
        self.clocks[stream] = (max(mine[0], event[0]), max(mine[1], event[1]))

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.current = SIDE
        yield
        self.current = MAIN

    def work(self) -> Work:
        """Give one to the current stream."""
        before = self.clocks[self.current]
        after = list(before)
        after[self.current] += 1
        self.clocks[self.current] = (after[0], after[1])
        return Work(self.current, after[self.current], before)


def request(name: str) -> Req:
    return Req(request_id=name, params=SamplingParams(prompt="x"))


class Engine:
    """Gives units to streams as a worker does, each after the one before of its request, with tables that are made when
    they are not kept any more."""

    def __init__(self) -> None:
        self.streams = OrderedStreams()
        self.lanes = LaneStreams(self.streams)
        self.works: dict[str, list[Work]] = {}
        self.makers: dict[int, Work] = {}
        self.uses: list[tuple[Work, Work]] = []
        self._present: Work | None = None
        self.table = table_cache(2)(self._make)

    def _make(self, number: int) -> int:
        assert self._present is not None
        self.makers[number] = self._present
        return number

    def tick(self, units: dict[Lane, list[Req]], *, beside: bool = True, tables: Sequence[int] = ()) -> list[Any]:
        """All lanes of one; each unit uses these tables. What is to be kept."""
        with self.lanes.tick([req for reqs in units.values() for req in reqs], beside=beside) as kept:
            for lane in LAUNCH_ORDER:
                if units.get(lane):
                    with self.lanes.lane(lane, units[lane]):
                        for req in units[lane]:
                            self._unit(req, tables)
        return kept

    def _unit(self, req: Req, tables: Sequence[int]) -> None:
        self._present = work = self.streams.work()
        self.works.setdefault(req.request_id, []).append(work)
        for number in tables:
            self.table(number)
            if self.makers[number] != work:
                self.uses.append((self.makers[number], work))


def test_frames_run_beside_the_denoising_of_others_and_behind_their_own() -> None:
    engine, first, second = Engine(), request("a"), request("b")
    engine.tick({"encode": [first, second]})
    engine.tick({"denoise": [first, second]})
    engine.tick({"denoise": [second], "decode": [first]})
    engine.tick({"denoise": [second]})
    (_, denoised, decoded), (encoded, _, beside, later) = engine.works["a"], engine.works["b"]
    assert decoded.stream == SIDE and encoded.stream == SIDE
    assert denoised.is_before(decoded) and encoded.is_before(beside)
    assert not beside.is_before(decoded) and not decoded.is_before(beside), "neither waits for the other"
    assert not decoded.is_before(later), "nor do the steps that follow"


def test_where_it_may_not_all_is_in_one_stream() -> None:
    engine, first, second = Engine(), request("a"), request("b")
    engine.tick({"encode": [first, second]})
    engine.tick({"denoise": [second], "encode": [request("c")]}, beside=False)
    engine.tick({"denoise": [second]})
    assert [work.stream for work in engine.works["b"]] == [SIDE, MAIN, MAIN]
    assert engine.works["c"][0].stream == MAIN and engine.works["a"][0].is_before(engine.works["c"][0])
    engine.lanes.join()
    assert engine.streams.main_event()[SIDE] == 2


@pytest.mark.parametrize("seed", range(40))
def test_every_work_comes_after_what_it_needs(seed: int) -> None:
    """Requests that come and go in any order: each after its own work before, each table's use after its making."""
    engine, draw = Engine(), random.Random(seed)
    state: dict[str, tuple[Req, list[Lane]]] = {}
    for number in range(300):
        if draw.random() < 0.4:
            name = f"request {number}"
            state[name] = (request(name), ["encode", *["denoise"] * draw.randrange(1, 6), "decode", "decode"])
        units: dict[Lane, list[Req]] = {"encode": [], "denoise": [], "decode": []}
        for name in [name for name in state if draw.random() < 0.6]:
            req, left = state[name]
            units[left.pop(0)].append(req)
            if not left:
                del state[name]
        tables = draw.sample(range(4), draw.randrange(3))
        engine.tick(units, beside=draw.random() < 0.9, tables=tables)
        for name in list(engine.works):
            if name not in state and draw.random() < 0.5:
                engine.lanes.forget(name)
        if draw.random() < 0.05:
            engine.lanes.join()
    assert {work.stream for works in engine.works.values() for work in works} == {MAIN, SIDE}
    for works in engine.works.values():
        assert all(one.is_before(other) for one, other in itertools.pairwise(works))
    assert len(engine.uses) > 100
    assert all(maker.is_before(user) for maker, user in engine.uses)


def test_what_a_tick_may_still_read_is_kept_with_it() -> None:
    """Though its request lets go of it, and its table makes room for others."""
    engine, req = Engine(), request("a")
    tables = table_cache(1)(lambda number: torch.zeros(number))
    req.latents, req.conditioning = torch.zeros(1), {"image": torch.zeros(1)}
    seen = [weakref.ref(req.latents), weakref.ref(req.conditioning["image"])]
    with engine.lanes.tick([req], beside=True) as kept:
        with engine.lanes.lane("decode", [req]):
            seen.append(weakref.ref(tables(1)))
            tables(2)
        del req.conditioning["image"]
        req.drop_tensors()
    assert all(ref() is not None for ref in seen)
    kept.clear()
    assert all(ref() is None for ref in seen)


def test_without_a_second_stream_nothing_is_kept() -> None:
    lanes = LaneStreams()
    with lanes.tick([request("a")], beside=True) as kept, lanes.lane("decode", []):
        pass
    lanes.join()
    assert kept == [] and not lanes.are_two
