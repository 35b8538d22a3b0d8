"""In which order a worker gives its device ticks and answers them, by a device that goes on while the host prepares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.managers.worker_messages import (
    Admit,
    CacheFlushed,
    FlushCache,
    RankLost,
    Release,
    StopWorker,
    Tick,
    TickDone,
    Unit,
)
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.tiny_families import FAMILIES, wish_of
from sglang.multimodal_gen.test.worker_case import InProcessWorker

UNIT_S = 0.05


class SlowDevice:
    """Takes as long for every unit, one after the other, and says so by its marks. `fails_at`: the number of the unit
    that it never ends."""

    def __init__(self) -> None:
        self.fails_at: int | None = None
        self._free_at = 0.0
        self._num_marks = 0

    def mark(self) -> SlowMark:
        """Where a unit begins, then where it ends."""
        self._free_at = max(time.monotonic(), self._free_at) + UNIT_S * (self._num_marks % 2)
        self._num_marks += 1
        return SlowMark(self._free_at, failed=self._num_marks // 2 == self.fails_at)


class SlowMark:
    def __init__(self, at: float, *, failed: bool) -> None:
        self._at, self._failed = at, failed

    def is_reached(self) -> bool:
        self._raise_if_failed()
        return time.monotonic() >= self._at

    def wait(self) -> None:
        self._raise_if_failed()
        time.sleep(max(0.0, self._at - time.monotonic()))

    def _raise_if_failed(self) -> None:
        if self._failed:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def ms_since(self, earlier: SlowMark) -> float:
        return (self._at - earlier._at) * 1000


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = FAMILIES["flux"][0](tmp_path_factory.mktemp("flux"))
    return build_pipeline(str(directory), ExecutionArgs(device="cpu", precision="fp32"))


class LoggingWorker(InProcessWorker):
    """One whose device is slow; `log` has what it does, in order."""

    def __init__(self, pipeline: Any, directory: Path) -> None:
        super().__init__(pipeline, directory)
        self.log: list[str] = []
        self.answers: dict[int, TickDone] = {}
        self._send = self.channel.send
        self.channel.send = self._log_answer  # type: ignore[method-assign]
        self._num_launched = 0

    def _log_answer(self, message: Any) -> None:
        if isinstance(message, TickDone):
            self.log.append(f"answered {message.seq}")
            self.answers[message.seq] = message
        elif isinstance(message, CacheFlushed | RankLost):
            self.log.append(type(message).__name__)
        self._send(message)

    def launches(self, run_unit: Callable[..., Any]) -> Callable[..., Any]:
        """The pipeline's method, which says when it returned."""

        def run(phase: str, requests: Any) -> Any:
            outputs = run_unit(phase, requests)
            self.log.append(f"launched {phase}")
            return outputs

        return run


@pytest.fixture
def worker(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoggingWorker]:
    """It holds request `r`, whose text is encoded."""
    made = LoggingWorker(pipeline, tmp_path)
    made.give(admit("r"), Tick(seq=1, epoch=0, encode=(Unit("r", "text_encode", 0),)))
    made.log.clear()
    monkeypatch.setattr(pipeline, "clock", SlowDevice())
    monkeypatch.setattr(pipeline, "run_unit", made.launches(pipeline.run_unit))
    yield made
    made.give(*(Release(request_id=request_id) for request_id in list(made.worker.requests)))


def admit(request_id: str) -> Admit:
    wish = wish_of("flux", num_inference_steps=9)
    return Admit(request_id=request_id, params=SamplingParams.from_values(wish))


def steps(*seqs: int, epoch: int = 0) -> list[Tick]:
    return [Tick(seq=seq, epoch=epoch, denoise=(Unit("r", "denoise", 0),)) for seq in seqs]


def test_the_next_tick_is_under_way_before_one_is_answered(worker: LoggingWorker) -> None:
    begin = time.monotonic()
    worker.give(*steps(2, 3, 4))
    passed_ms = (time.monotonic() - begin) * 1000
    launched = "launched denoise"
    assert worker.log == [launched, launched, "answered 2", launched, "answered 3", "answered 4"]
    times = [lane.ms for seq in (2, 3, 4) for lane in worker.answers[seq].lanes]
    assert len(times) == 3 and min(times) >= UNIT_S * 999
    assert sum(times) <= passed_ms + 1, "each has its own time, not that of those before"


def test_a_tick_with_none_behind_it_is_answered_when_it_is_done(worker: LoggingWorker) -> None:
    running = threading.Thread(target=lambda: torch.inference_mode()(worker.worker.run)())
    running.start()
    for seq in (2, 3):
        begin = time.monotonic()
        worker.channel.inbox.put(steps(seq)[0])
        while seq not in worker.answers:
            assert time.monotonic() < begin + 20
            time.sleep(0.001)
        assert time.monotonic() - begin >= UNIT_S, "it is answered when the device is done, not when it is given to it"
    worker.channel.inbox.put(StopWorker())
    running.join()


def test_requests_are_admitted_and_released_beside_a_tick_and_caches_cleared_behind_it(worker: LoggingWorker) -> None:
    worker.give(*steps(2), admit("s"), Release(request_id="s"), FlushCache(query_id="q"))
    assert worker.log == ["launched denoise", "answered 2", "CacheFlushed"]
    worker.log.clear()
    encode = Tick(seq=4, epoch=0, encode=(Unit("s", "text_encode", 0),))
    worker.give(*steps(3), admit("s"), encode)
    assert worker.log == ["launched denoise", "launched text_encode", "answered 3", "answered 4"]


def test_after_a_failure_the_tick_before_is_answered_first(
    worker: LoggingWorker, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is given back then, which that tick may still use; those behind it are dropped."""
    launch, answers = pipeline.run_unit, iter([False, True])

    def run_out(phase: str, requests: Any) -> Any:
        if next(answers):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(phase, requests)

    def shrink(phase: str, req: Any) -> bool:
        worker.log.append("shrunk")
        return False

    monkeypatch.setattr(pipeline, "run_unit", run_out)
    monkeypatch.setattr(pipeline, "shrink", shrink)
    worker.give(*steps(2, 3, 4))
    assert worker.log == ["launched denoise", "answered 2", "shrunk", "answered 3", "answered 4"]
    [failure] = worker.answers[3].failures
    assert failure.error.code == "out_of_memory" and not worker.answers[2].failures
    assert worker.answers[4].dropped


def test_a_device_that_fails_under_a_tick_ends_the_worker(
    worker: LoggingWorker, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    pipeline.clock.fails_at = 1
    with pytest.raises(SystemExit):
        worker.give(*steps(2))
    assert worker.log == ["launched denoise", "RankLost"]
    worker.worker._open = None
    while not worker.channel.inbox.empty():
        worker.channel.inbox.get()
