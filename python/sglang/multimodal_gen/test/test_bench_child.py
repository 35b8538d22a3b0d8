"""A benchmark and its child processes: whatever stops a child stops the benchmark, at once and with an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sglang.multimodal_gen.errors import BenchmarkFailed, RemoteError
from sglang.multimodal_gen.runtime.bench.child import BenchChild, all_of, receive_all
from sglang.multimodal_gen.runtime.bench.messages import BenchMessage, ReferenceDone, ReferenceTask, StartupTask
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.test import silent_child

ENGINE = EngineConfig.of_this_process(ServerArgs(), run_dir="")
TASK = StartupTask(engine=ENGINE, num_inference_steps=1)
# Starting an interpreter takes a second or two; a wait that does not end is ended by this.
PATIENCE_S = 30.0


@contextmanager
def silent(task: BenchMessage = TASK) -> Iterator[BenchChild]:
    """A child that says nothing by itself; one that is waited for too long is killed, which is another error."""
    with BenchChild(silent_child.__name__, task) as child:
        killing = threading.Timer(PATIENCE_S, child._child.process.kill)
        killing.start()
        yield child
        killing.cancel()


def test_a_child_that_cannot_read_a_message_says_so_and_ends() -> None:
    with silent() as child:
        child.send(TASK)
        with pytest.raises(RemoteError, match=r"the benchmark failed \(ValidationError: .*unknown field"):
            child.receive(ReferenceDone)
        assert child._child.process.wait(PATIENCE_S) == 1, "deaf to the end of its parent it would stay"


def test_a_child_that_cannot_read_its_task_says_so() -> None:
    with (
        silent(ReferenceTask(engine=ENGINE, directory="")) as child,
        pytest.raises(RemoteError, match=r"the benchmark failed \(ValidationError: "),
    ):
        child.receive(ReferenceDone)


def test_a_child_that_dies_ends_the_wait_for_those_that_would_wait_for_it() -> None:
    with silent() as first, silent() as second:
        second._child.process.kill()
        with pytest.raises(BenchmarkFailed, match="ended by SIGKILL"):
            receive_all([first, second], ReferenceDone)
        assert first._child.is_alive()


def test_of_several_waits_the_first_that_fails_ends_all() -> None:
    never = threading.Event()

    def fail() -> None:
        raise BenchmarkFailed("one of them")

    with pytest.raises(BenchmarkFailed, match="one of them"):
        all_of(lambda: never.wait(PATIENCE_S), fail)
    assert not never.is_set()
    assert all_of(lambda: 1, lambda: "two") == [1, "two"]
