"""The scheduler's policy: who shares a tick with whom."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.managers.batching import Limits, UnitCursor, plan
from sglang.multimodal_gen.runtime.managers.timing import UNLEARNED_DEADLINE_S, LearnedTimes

LIMITS = Limits(max_batch_size=4, budget_bytes=1000)


def cursor(name: str, order: int, *, steps: int = 4, key: str = "a", peak: int = 10, done: int = 1) -> UnitCursor:
    phases = (
        Phase(name="encode", lane="encode", units=1, batch_key="e", cost=1.0, peak_bytes=1),
        Phase(name="denoise", lane="denoise", units=steps, batch_key=key, cost=1.0, peak_bytes=peak),
        Phase(name="decode", lane="decode", units=2, batch_key="d", cost=1.0, peak_bytes=1),
    )
    return UnitCursor(request_id=name, phases=phases, order=order, issued=done, done=done)


def ids(lane: tuple) -> list[str]:
    return [unit.request_id for unit in lane]


def test_requests_at_different_steps_and_step_counts_share_a_tick() -> None:
    tick = plan([cursor("x", 0, steps=4, done=2), cursor("y", 1, steps=9, done=7)], LIMITS)
    assert [(u.request_id, u.index) for u in tick["denoise"]] == [("x", 1), ("y", 6)]


def test_requests_of_unlike_keys_take_turns() -> None:
    cursors = [cursor("x", 0, key="a"), cursor("y", 1, key="b"), cursor("z", 2, key="a")]
    served = []
    for seq in range(4):
        lane = plan(cursors, LIMITS)["denoise"]
        served.append(sorted(ids(lane)))
        for unit in lane:
            chosen = next(c for c in cursors if c.request_id == unit.request_id)
            chosen.issued, chosen.last_served = chosen.issued + 1, seq
    assert served == [["x", "z"], ["y"], ["x", "z"], ["y"]]


def test_a_batch_never_exceeds_its_size_or_the_reserved_memory() -> None:
    cursors = [cursor(str(i), i, peak=300) for i in range(6)]
    assert len(plan(cursors, LIMITS)["denoise"]) == 3
    assert len(plan(cursors, Limits(max_batch_size=2, budget_bytes=10**9))["denoise"]) == 2


def test_one_request_runs_even_when_it_is_larger_than_the_budget() -> None:
    assert ids(plan([cursor("x", 0, peak=5000)], LIMITS)["denoise"]) == ["x"]


def test_deterministic_mode_and_solo_requests_run_alone() -> None:
    cursors = [cursor("x", 0), cursor("y", 1)]
    assert ids(plan(cursors, Limits(max_batch_size=4, budget_bytes=1000, deterministic=True))["denoise"]) == ["x"]
    cursors[1].solo = True
    assert ids(plan(cursors, LIMITS)["denoise"]) == ["x"]
    cursors[0].last_served = 1
    assert ids(plan(cursors, LIMITS)["denoise"]) == ["y"]


def test_units_that_run_alone_take_turns_though_their_keys_agree() -> None:
    cursors = [cursor("x", 0), cursor("y", 1)]
    for c in cursors:
        c.phases = tuple(msgspec.structs.replace(phase, alone=True) for phase in c.phases)
    assert ids(plan(cursors, LIMITS)["denoise"]) == ["x"]
    cursors[0].last_served = 1
    assert ids(plan(cursors, LIMITS)["denoise"]) == ["y"]


def test_lanes_run_side_by_side_and_decoding_takes_one_request_at_a_time() -> None:
    cursors = [cursor("e", 0, done=0), cursor("d1", 1, done=5), cursor("n", 2), cursor("d2", 3, done=6)]
    tick = plan(cursors, LIMITS)
    assert (ids(tick["encode"]), ids(tick["denoise"]), ids(tick["decode"])) == (["e"], ["n"], ["d1"])


def test_finished_requests_are_not_planned() -> None:
    assert plan([cursor("x", 0, done=7)], LIMITS) == {}


def test_rollback_issues_again_what_was_not_answered() -> None:
    c = cursor("x", 0, done=2)
    c.issued = 4
    c.rollback()
    assert plan([c], LIMITS)["denoise"][0].index == 1


def test_a_tick_has_an_unlearned_deadline_until_each_of_its_keys_was_timed() -> None:
    learned = LearnedTimes()
    learned.record("a", 2.0, 1)
    assert learned.deadline_s({"a": 1, "b": 1}) == UNLEARNED_DEADLINE_S
    learned.record("b", 1.0, 1)
    assert learned.deadline_s({"a": 1, "b": 1}) == 2 * (2.0 + 1.0) + 5.0


def test_the_deadline_grows_with_the_batch() -> None:
    learned = LearnedTimes()
    learned.record("a", 2.0, 1)
    assert learned.deadline_s({"a": 8}) == 2 * 16.0 + 5.0
