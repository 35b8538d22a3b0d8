"""The queue: its limits, its order, whom it lets into the workers, what those who wait are told. No process."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sglang.multimodal_gen.configs.model_info import ModelInfo, TaskLimits
from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import DeadlineExceeded, QueueFull, RequestTooLarge
from sglang.multimodal_gen.runtime.managers.admission import Admission, with_cost_limit
from sglang.multimodal_gen.runtime.managers.batching import UnitCursor
from sglang.multimodal_gen.runtime.managers.deadlines import Deadlines
from sglang.multimodal_gen.runtime.managers.fair_share import FairShare, ShareClass
from sglang.multimodal_gen.runtime.managers.intake import Intake
from sglang.multimodal_gen.runtime.managers.queue_news import QueueNews
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.timing import LearnedTimes
from sglang.multimodal_gen.runtime.managers.waiting_queue import PATIENCE_S, WaitingQueue
from sglang.multimodal_gen.runtime.managers.worker_messages import Admitted
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

SHORT = SamplingParams(width=512, height=512, num_frames=1, num_inference_steps=4, fps=8, seed=1)
LONG = SamplingParams(width=832, height=480, num_frames=81, num_inference_steps=50, fps=16, seed=1)
MODEL = ModelInfo(
    name="m",
    pipeline_class="P",
    tasks=("T2V",),
    precision="fp32",
    device="cpu",
    num_parameters=1,
    weight_bytes=4,
    load_seconds=0.1,
    limits=TaskLimits(size_multiple=16, max_pixels=1 << 40, frame_stride=1, max_frames=100_000, max_sequence_length=64),
    defaults=SamplingParams(width=832, height=480, num_frames=81, fps=16, num_inference_steps=50),
)
_numbers = iter(range(1_000_000))


def record(params: SamplingParams = SHORT, *, priority: int = 0, warm_up: bool = False, **values: Any) -> RequestRecord:
    number = next(_numbers)
    params = SamplingParams.from_values({**vars(params), "priority": priority, **values})
    client = None if warm_up else b"client"
    replica = 0 if warm_up else None
    return RequestRecord(
        request_id=f"r{number}", client=client, params=params, order=number, max_attempts=2, replica=replica
    )


class Policy(Admission):
    """With the only replica's intake."""

    intake: Intake


def admission(**options: Any) -> Policy:
    active: dict[str, RequestRecord] = {}
    made = Policy(ExecutionArgs(**options), LearnedTimes(), WaitingQueue(), active.values)
    made.intake = Intake(made, FairShare(), active)
    made.model_ready(MODEL)
    return made


def start(policy: Policy) -> RequestRecord | None:
    """Hand over whoever is next."""
    found = policy.intake.next_to_start(lambda head: True, is_busy=False)
    if found is not None:
        policy.waiting.remove(found)
        assert isinstance(policy.intake.active, dict)
        policy.intake.active[found.request_id] = found
        found.status = "running"
    return found


# --- the queue ---


def test_a_class_is_first_come_first_served_whatever_leaves_in_between() -> None:
    queue, rng = WaitingQueue(), random.Random(1)
    records = [record(rng.choice([SHORT, LONG]), priority=rng.randint(-2, 2)) for _ in range(10_000)]
    for each in records:
        queue.push(each)
    gone = set(rng.sample(range(len(records)), 3000))
    for index in gone:
        queue.remove(records[index])
    left = [each for index, each in enumerate(records) if index not in gone]
    assert (len(queue), queue.cost) == (7000, sum(each.cost for each in left))
    served: dict[ShareClass, list[int]] = {}
    while heads := queue.heads():
        head = rng.choice(heads)
        served.setdefault(head.share_class, []).append(head.order)
        queue.remove(head)
    assert sum(map(len, served.values())) == 7000
    assert all(orders == sorted(orders) for orders in served.values())
    assert (len(queue), queue.cost) == (0, 0)


def test_who_lost_its_turn_comes_first_in_its_class_and_warm_ups_before_everybody() -> None:
    policy = admission()
    first, second, again, warm_up = record(), record(), record(), record(warm_up=True)
    for each in (first, second, warm_up):
        policy.waiting.push(each)
    policy.waiting.push(again, front=True)
    assert [start(policy) for _ in range(5)] == [warm_up, again, first, second, None]


def test_within_a_class_whoever_is_due_first_comes_first_and_nobody_is_overtaken_for_ever() -> None:
    queue = WaitingQueue()
    patient, usual, urgent, later = (record(deadline_s=s) for s in (None, PATIENCE_S, 5.0, 2 * PATIENCE_S))
    for age, each in ((60.0, later), (50.0, patient), (40.0, usual), (0.0, urgent)):
        each.received_at -= age
        queue.push(each)
    assert [queue.place(each).position for each in (urgent, patient, usual, later)] == [0, 1, 2, 3]
    newcomers = []
    for _ in range(50):  # a flood of urgent ones, each of which overtakes all that came lately
        newcomers.append(record(deadline_s=100.0))
        newcomers[-1].received_at += PATIENCE_S - 120.0
        queue.push(newcomers[-1])
    served = []
    while heads := queue.heads():
        served.append(heads[0])
        queue.remove(heads[0])
    assert served == [urgent, patient, usual, *newcomers, later], "who has waited long is overtaken by nobody"


def test_places_in_a_mixed_line_agree_with_the_order_in_which_it_is_served() -> None:
    queue, rng = WaitingQueue(), random.Random(2)
    for _ in range(300):
        queue.push(record(deadline_s=rng.choice([None, 1.0, 50.0, 900.0])), front=rng.random() < 0.1)
    listed = list(queue.places())
    assert listed == [(each, queue.place(each)) for each, _ in listed]
    while heads := queue.heads():
        assert (heads[0], queue.place(heads[0]).position) == (listed.pop(0)[0], 0)
        queue.remove(heads[0])
    assert not listed


def test_a_place_counts_who_is_expected_to_start_before() -> None:
    queue, long_ones = WaitingQueue(), [record(LONG) for _ in range(10)]
    for each in long_ones:
        queue.push(each)
    assert queue.place(long_ones[-1]).position == 9
    short = record(SHORT)
    queue.push(short)
    assert queue.place(short).position == 0, "it waits for no long one"
    assert queue.place(long_ones[-1]).position == 10
    favoured = record(LONG, priority=2)
    queue.push(favoured)
    place = queue.place(favoured)
    assert place.position == 0
    assert place.work < 3 * favoured.cost


# --- into the queue ---


def test_a_queue_is_full_by_number_and_says_when_to_come_back() -> None:
    policy = admission(max_queued_requests=20)
    for _ in range(20):
        assert policy.refusal(SHORT, has_inputs=False) is None
        policy.waiting.push(record())
    refusal = policy.refusal(SHORT, has_inputs=False)
    assert refusal is not None
    assert (refusal.code, refusal.http_status, refusal.retryable) == (QueueFull.code, 429, True)
    assert "max-queued-requests is 20" in refusal.message
    policy.rate.record(SHORT.cost, 3.0)  # one such request in 3 s; a tenth of the queue leaves in 6
    refusal = policy.refusal(SHORT, has_inputs=False)
    assert refusal is not None and refusal.retry_after_s == 6
    policy.rate.record(0, 600.0)
    refusal = policy.refusal(SHORT, has_inputs=False)
    assert refusal is not None and refusal.retry_after_s == 120


def test_a_queue_is_full_by_work() -> None:
    policy = admission(max_queued_cost=3 * LONG.cost)
    for _ in range(3):
        assert policy.refusal(LONG, has_inputs=False) is None
        policy.waiting.push(record(LONG))
    policy.rate.record(1e6, 0.001)
    refusal = policy.refusal(LONG, has_inputs=False)
    assert refusal is not None and "max-queued-cost" in refusal.message
    assert refusal.retry_after_s is not None and 1 <= refusal.retry_after_s <= 120


def test_an_empty_queue_takes_any_request_that_the_server_takes_at_all() -> None:
    assert admission(max_queued_cost=1).refusal(LONG, has_inputs=False) is None


def test_by_default_the_queue_holds_as_much_work_as_that_many_default_requests() -> None:
    policy = admission(max_queued_requests=4)
    for _ in range(3):
        policy.waiting.push(record(LONG))
    assert policy.refusal(LONG, has_inputs=False) is None
    more = SamplingParams.from_values({**vars(LONG), "num_inference_steps": 51})
    refusal = policy.refusal(more, has_inputs=False)
    assert refusal is not None and "max-queued-cost" in refusal.message


# --- what one request may ask for ---


def test_by_default_a_request_may_have_a_thousand_steps_at_the_model_s_own_size() -> None:
    limits = with_cost_limit(MODEL, ExecutionArgs()).limits
    most = SamplingParams.from_values({**vars(LONG), "num_inference_steps": 1000})
    limits.check(most)
    with pytest.raises(
        RequestTooLarge, match=r"832 x 480 x 82 x 1000 x 1 = 32747520000, accepted is at most 32348160000"
    ):
        limits.check(SamplingParams.from_values({**vars(most), "num_frames": 82}))
    with pytest.raises(RequestTooLarge, match="max-request-cost"):
        limits.check(SamplingParams.from_values({**vars(most), "num_outputs_per_prompt": 2}))


def test_no_combination_of_fields_exceeds_the_limit() -> None:
    limit, rng = 10**9, random.Random(2)
    limits = with_cost_limit(MODEL, ExecutionArgs(max_request_cost=limit)).limits
    taken = 0
    for _ in range(3000):
        sides = [16 * rng.randint(1, 2 ** rng.randint(0, 9)) for _ in range(2)]
        frames, steps = rng.randint(1, 2 ** rng.randint(0, 10)), rng.randint(1, 1000)
        outputs: dict[str, Any] = {"num_outputs_per_prompt": rng.randint(1, 10)}
        if rng.random() < 0.5:
            outputs = {"seed": list(range(rng.randint(1, 10)))}
        params = SamplingParams.from_values(
            {"width": sides[0], "height": sides[1], "num_frames": frames, "num_inference_steps": steps, **outputs}
        )
        count = len(outputs["seed"]) if "seed" in outputs else outputs["num_outputs_per_prompt"]
        is_small = sides[0] * sides[1] * frames * steps * count <= limit
        try:
            limits.check(params)
        except RequestTooLarge:
            assert not is_small
        else:
            assert is_small
            taken += 1
    assert 300 < taken < 2700


# --- into the workers ---


def test_a_short_request_starts_though_long_ones_hold_every_place() -> None:
    policy = admission(batching_max_size=2)
    for _ in range(50):
        policy.waiting.push(record(LONG))
    for _ in range(4):
        assert start(policy) is not None
    assert start(policy) is None, "two batches are in the workers"
    short = record(SHORT)
    policy.waiting.push(short)
    policy.waiting.push(record(SHORT))
    assert start(policy) is short
    assert start(policy) is None


def test_places_go_to_classes_by_weight() -> None:
    policy = admission(batching_max_size=5)
    for _ in range(20):
        policy.waiting.push(record(priority=2))
        policy.waiting.push(record(priority=0))
    started = [start(policy) for _ in range(10)]
    assert sum(each is not None and each.params.priority == 2 for each in started) == 8


def test_a_class_whose_batches_do_not_pay_holds_two_places() -> None:
    policy = admission()
    for _ in range(2):
        policy.times.record("d", 1.0, 1)
        policy.times.record("d", 2.0, 2)
    for _ in range(10):
        policy.waiting.push(record(LONG))
    first = start(policy)
    assert first is not None
    phases = (Phase(name="d", lane="denoise", units=50, batch_key="d", cost=1.0, peak_bytes=1),)
    first.begin(Admitted(request_id=first.request_id, phases=phases), policy.intake.share.account(first.share_class))
    policy.admitted(first)
    assert start(policy) is not None
    assert start(policy) is None


def test_a_suspect_waits_until_the_workers_rest_and_nobody_starts_beside_it() -> None:
    policy = admission()
    suspect, other = record(), record()
    suspect.blame()
    policy.waiting.push(suspect)
    policy.waiting.push(other)
    assert policy.intake.next_to_start(lambda head: True, is_busy=True) is None
    assert policy.intake.must_rest
    assert start(policy) is suspect
    assert not policy.intake.must_rest
    suspect.status = "admitting"
    assert start(policy) is None
    suspect.status, suspect.is_suspect = "running", False
    assert start(policy) is other


# --- deadlines ---


def learned_steps(policy: Policy, seconds: float) -> None:
    """A short request was run, at so many seconds a step."""
    phases = (Phase(name="d", lane="denoise", units=4, batch_key="d", cost=1.0, peak_bytes=1),)
    known = record()
    known.begin(Admitted(request_id=known.request_id, phases=phases), policy.intake.share.account(known.share_class))
    policy.admitted(known)
    for _ in range(2):
        policy.times.record("d", seconds, 1)


def test_a_deadline_that_cannot_be_kept_is_refused_at_once_but_only_for_sure() -> None:
    policy = admission()
    hurried = SamplingParams.from_values({**vars(SHORT), "deadline_s": 3.0})
    assert policy.refusal(hurried, has_inputs=False) is None, "nobody knows how long it takes"
    learned_steps(policy, 1.0)
    refusal = policy.refusal(hurried, has_inputs=False)
    assert refusal is not None
    assert (refusal.code, refusal.http_status, refusal.retryable) == (DeadlineExceeded.code, 504, False)
    assert "takes at least 4 s" in refusal.message
    assert policy.refusal(hurried, has_inputs=True) is None, "with a picture it may have fewer steps"
    patient = SamplingParams.from_values({**vars(SHORT), "deadline_s": 5.0})
    assert policy.refusal(patient, has_inputs=False) is None


def test_who_waited_too_long_is_not_started() -> None:
    policy = admission()
    learned_steps(policy, 1.0)
    waiting = record(deadline_s=5.0)
    assert policy.too_late(waiting, has_inputs=False) is None
    waiting.received_at -= 2.0
    assert policy.too_late(waiting, has_inputs=False) is not None
    waiting.has_saved_state = True
    assert policy.too_late(waiting, has_inputs=False) is None, "part of it is done"


def test_deadlines_expire_in_order_and_once() -> None:
    deadlines = Deadlines()
    requests = {each.request_id: each for each in (record(deadline_s=s) for s in (3.0, 1.0, 2.0))}
    for each in [*requests.values(), record()]:
        deadlines.watch(each)
    first = min(each.received_at for each in requests.values())
    assert deadlines.expired(requests, first) == []
    left = deadlines.seconds_left(first)
    assert left is not None and 0.9 < left < 1.1
    expired = deadlines.expired(requests, first + 2.5)
    assert [each.params.deadline_s for each in expired] == [1.0, 2.0]
    assert deadlines.expired(requests, first + 2.5) == []
    assert deadlines.expired({}, first + 10) == [], "it has ended"
    assert deadlines.seconds_left(first) is None


def test_deadlines_of_what_has_ended_take_no_room() -> None:
    deadlines = Deadlines()
    for _ in range(5000):
        deadlines.watch(record(deadline_s=600.0))
    deadlines.expired({}, 0.0)
    assert deadlines.seconds_left(0.0) is None


# --- what those who wait are told ---


def test_everybody_hears_of_a_new_place_but_not_all_the_time() -> None:
    queue, news, now = WaitingQueue(), QueueNews(), 1000.0
    records = [record() for _ in range(200)]
    for position, each in enumerate(records):
        queue.push(each)
        each.told_position, each.told_at = position, now
    assert news.due(queue, now) == []
    queue.remove(records[0])
    records[0].status = "running"
    told: dict[str, list[int]] = {}
    slices = []
    for tick in range(1000):
        now = 1010.0 + tick * 0.01
        found = news.due(queue, now)
        slices.append(len(found))
        for each, place in found:
            each.told_position, each.told_at = place.position, now
            told.setdefault(each.request_id, []).append(place.position)
    assert told == {each.request_id: [index] for index, each in enumerate(records[1:])}
    assert max(slices) <= 32


def test_the_eta_of_a_queued_request_follows_from_the_work_before_it() -> None:
    policy, waiting = admission(), [record() for _ in range(4)]
    for each in waiting:
        policy.waiting.push(each)
    assert policy.eta_s(policy.waiting.place(waiting[0]).work) is None
    policy.rate.record(SHORT.cost, 2.0)
    assert policy.eta_s(policy.waiting.place(waiting[-1]).work) == pytest.approx(8.0)
    running = record()
    phases = (Phase(name="d", lane="denoise", units=4, batch_key="d", cost=1.0, peak_bytes=1),)
    running.cursor = UnitCursor(request_id=running.request_id, phases=phases, order=0, done=2)
    assert isinstance(policy.intake.active, dict)
    policy.intake.active[running.request_id] = running
    policy.units_done([], seconds=0.0)
    assert policy.eta_s(policy.waiting.place(waiting[-1]).work) == pytest.approx(9.0)


def test_where_a_request_stands_makes_no_other_result() -> None:
    params = SamplingParams.from_values({**vars(SHORT), "prompt": "x", "priority": 2, "deadline_s": 5.0})
    assert params.recorded() == SamplingParams.from_values({**vars(SHORT), "prompt": "x"}).recorded()
    assert params.without_scheduling() == SamplingParams.from_values({**vars(SHORT), "prompt": "x"})
