"""Who is served next: shares of the device by class, weight and measured time. No process, no clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.managers.batching import Limits, UnitCursor, plan
from sglang.multimodal_gen.runtime.managers.fair_share import Account, FairShare, ShareClass
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes

IMAGE = SamplingParams(width=1024, height=1024, num_frames=1, num_inference_steps=4)
VIDEO = SamplingParams(width=832, height=480, num_frames=81, num_inference_steps=50)
SECONDS = {"image": 0.1, "video": 2.0, "text": 0.01, "decode-image": 0.1, "decode-video": 8.0}


def cursor(name: str, kind: str, account: Account, *, steps: int, order: int = 0, done: int = 0) -> UnitCursor:
    phases = (
        Phase(name="encode", lane="encode", units=1, batch_key="text", cost=1.0, peak_bytes=1),
        Phase(name="denoise", lane="denoise", units=steps, batch_key=kind, cost=1.0, peak_bytes=1),
        Phase(name="decode", lane="decode", units=4, batch_key=f"decode-{kind}", cost=1.0, peak_bytes=1),
    )
    return UnitCursor(request_id=name, phases=phases, order=order, account=account, issued=done, done=done)


@dataclass
class Device:
    """Runs what is planned, one tick after the other, as the dispatcher does. `seconds` are what each class had."""

    cursors: list[UnitCursor] = field(default_factory=list)
    share: FairShare = field(default_factory=FairShare)
    times: LearnedTimes = field(default_factory=LearnedTimes)
    seconds: Counter[ShareClass] = field(default_factory=Counter)
    ticks: list[dict[str, list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, seconds in SECONDS.items():
            for _ in range(2):
                self.times.record(key, seconds, 1)

    def add(self, name: str, kind: str, params: SamplingParams, *, steps: int, done: int = 0) -> UnitCursor:
        account = self.share.account(ShareClass.of(params))
        self.cursors.append(cursor(name, kind, account, steps=steps, order=len(self.cursors), done=done))
        return self.cursors[-1]

    def tick(self) -> dict[str, list[str]]:
        self.share.begin_turn({c.account for c in self.cursors if c.has_work})
        lanes = plan(self.cursors, Limits(max_batch_size=4, budget_bytes=1000, times=self.times))
        by_id = {c.request_id: c for c in self.cursors}
        for units in lanes.values():
            for index, unit in enumerate(units):
                found = by_id[unit.request_id]
                key = found.position(found.issued)[0].batch_key
                found.account.charge(SECONDS[key] * (index == 0))
                self.seconds[found.account.share_class] += SECONDS[key] / len(units)
                found.issued, found.done, found.last_served = found.issued + 1, found.done + 1, len(self.ticks)
        self.cursors = [c for c in self.cursors if not c.finished]
        self.ticks.append({lane: [unit.request_id for unit in units] for lane, units in lanes.items()})
        return self.ticks[-1]


def test_a_short_request_has_its_first_step_before_a_long_one_has_two_more() -> None:
    device = Device()
    video = device.add("video", "video", VIDEO, steps=50)
    for _ in range(20):
        device.tick()
    image, before = device.add("image", "image", IMAGE, steps=4), video.done
    while image.done < 2:  # its text and one step
        device.tick()
    assert video.done - before <= 2


def test_a_short_request_is_done_before_a_long_one_has_much_more() -> None:
    """Its four steps, its text and its decoding take less than one of the long one's steps."""
    device = Device()
    video = device.add("video", "video", VIDEO, steps=50)
    for _ in range(20):
        device.tick()
    image, before = device.add("image", "image", IMAGE, steps=4), video.done
    while not image.finished:
        device.tick()
    assert video.done - before <= 2


def test_a_long_decoding_holds_no_steps_of_others_back() -> None:
    device = Device()
    device.add("video", "video", VIDEO, steps=1, done=2)
    image = device.add("image", "image", IMAGE, steps=40, done=1)
    while device.tick().get("decode") != ["video"]:
        pass
    served = [device.tick() for _ in range(30)]
    assert all("decode" not in tick for tick in served), "the first piece of 8 s is worth 80 of these steps"
    assert image.done > 30


@pytest.mark.parametrize("priority", [-2, 0, 2])
def test_each_step_of_priority_doubles_the_share(priority: int) -> None:
    device = Device()
    favoured = SamplingParams(width=1024, height=1024, num_frames=1, num_inference_steps=4, priority=priority)
    device.add("favoured", "image", favoured, steps=4000, done=1)
    device.add("other", "video", VIDEO, steps=4000, done=1)
    for _ in range(2000):
        device.tick()
    had, others = device.seconds[ShareClass.of(favoured)], device.seconds[ShareClass.of(VIDEO)]
    assert had / others == pytest.approx(2.0**priority, rel=0.1)


def test_a_flood_of_short_requests_of_high_priority_does_not_stop_a_long_one_of_low_priority() -> None:
    """The proof that nobody starves: with the most against it, a class has its weight over the sum of weights."""
    device = Device()
    low = SamplingParams(width=832, height=480, num_frames=81, num_inference_steps=50, priority=-2)
    high = SamplingParams(width=1024, height=1024, num_frames=1, num_inference_steps=4, priority=2)
    video = device.add("video", "video", low, steps=500, done=1)
    for number in range(4000):
        while len(device.cursors) < 17:  # whoever is finished is replaced at once
            device.add(f"image-{number}-{len(device.cursors)}", "image", high, steps=4)
        device.tick()
    weights = ShareClass.of(low).weight, ShareClass.of(high).weight
    share = device.seconds[ShareClass.of(low)] / sum(device.seconds.values())
    assert share >= 0.9 * weights[0] / sum(weights)
    assert video.done > 2


def test_a_class_without_work_saves_no_turns_up() -> None:
    device = Device()
    device.add("image", "image", IMAGE, steps=1, done=1)
    device.add("video", "video", VIDEO, steps=500, done=1)
    for _ in range(100):
        device.tick()
    late = device.add("late", "image", IMAGE, steps=400, done=1)
    video_before = device.seconds[ShareClass.of(VIDEO)]
    for _ in range(60):
        device.tick()
    assert device.seconds[ShareClass.of(VIDEO)] - video_before == pytest.approx(0.1 * (late.done - 1), abs=4.0)


def test_requests_of_one_class_take_turns_and_those_of_one_key_share_forwards_with_any_class() -> None:
    device = Device()
    other = SamplingParams(width=1024, height=1024, num_frames=1, num_inference_steps=50)
    assert ShareClass.of(other) != ShareClass.of(IMAGE)
    for name, params in (("a", IMAGE), ("b", other), ("c", IMAGE)):
        device.add(name, "image", params, steps=4, done=1)
    device.add("d", "video", IMAGE, steps=4, done=1)
    served = [sorted(device.tick()["denoise"]) for _ in range(4)]
    assert all(names in (["d"], ["a", "b", "c"]) for names in served)
    assert served.count(["d"]) in (1, 2), "nor do those who share wait less than one who does not"


def test_classes_are_a_priority_and_a_size_of_work() -> None:
    assert ShareClass.of(IMAGE) != ShareClass.of(VIDEO)
    nearly = SamplingParams(width=1024, height=1024, num_frames=1, num_inference_steps=5)
    assert ShareClass.of(nearly) == ShareClass.of(IMAGE)
    assert ShareClass.of(SamplingParams(priority=1)).weight == 2.0


# --- how many share a forward ---


def timed(per_request: dict[int, float]) -> LearnedTimes:
    times = LearnedTimes()
    for size, seconds in per_request.items():
        for _ in range(2):
            times.record("k", seconds * size, size)
    return times


def test_a_batch_grows_while_each_request_gains_and_stops_where_none_does() -> None:
    assert timed({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.39}).best_batch("k", 16) == 4
    assert timed({1: 1.0, 2: 0.99}).best_batch("k", 16) == 1, "one request fills the device"
    assert timed({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.2, 16: 0.1}).best_batch("k", 16) == 16
    assert timed({1: 1.0, 2: 0.6, 4: 0.4}).best_batch("k", 3) == 3


def test_sizes_that_nobody_measured_are_tried_one_after_the_other() -> None:
    times, tried = LearnedTimes(), []
    for _ in range(8):
        size = times.best_batch("k", 16)
        tried.append(size)
        times.record("k", 1.0 + 0.1 * size, size)
    assert tried == [1, 1, 2, 2, 4, 4, 8, 8]


def test_forwards_of_no_length_are_shared_since_ticks_cost_something_too() -> None:
    assert timed({1: 1e-6, 2: 1e-6, 4: 2e-6, 8: 2e-6, 16: 3e-6}).best_batch("k", 16) == 16


def test_what_a_first_time_took_decides_nothing() -> None:
    times = timed({1: 1.0})
    times.record("k", 60.0, 2)
    assert times.best_batch("k", 16) == 2
    times.record("k", 1.2, 2)
    assert times.best_batch("k", 16) == 4


def test_only_without_a_set_size_is_the_batch_measured() -> None:
    slow = timed({1: 1.0, 2: 1.0})
    assert Limits(budget_bytes=1, times=slow).largest_batch("k") == 1
    assert Limits(budget_bytes=1, times=slow, max_batch_size=6).largest_batch("k") == 6
    assert Limits(budget_bytes=1, times=slow, max_batch_size=6, deterministic=True).largest_batch("k") == 1


# --- quarantine ---


def test_units_in_quarantine_run_with_nothing_beside_them() -> None:
    account = Account()
    suspect = cursor("suspect", "image", account, steps=4, done=1)
    suspect.quarantined = 3
    others = [
        cursor("other", "image", account, steps=4, order=1, done=1),
        cursor("new", "image", account, steps=4, order=2),
    ]
    limits = Limits(max_batch_size=4, budget_bytes=1000)
    assert {lane: [u.request_id for u in units] for lane, units in plan([suspect, *others], limits).items()} == {
        "denoise": ["suspect"]
    }
    suspect.last_served = 1
    assert {lane: [u.request_id for u in units] for lane, units in plan([suspect, *others], limits).items()} == {
        "encode": ["new"],
        "denoise": ["other"],
    }
    assert {lane: [u.request_id for u in units] for lane, units in plan([suspect, others[1]], limits).items()} == {
        "encode": ["new"]
    }
    suspect.issued = 3
    assert len(plan([suspect, *others], limits)["denoise"]) == 2
