"""A benchmark's child process, seen from inside: its task, what it tells, and how it gives up."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec

from sglang.multimodal_gen.errors import InternalError, OutOfMemory, ServingError
from sglang.multimodal_gen.runtime.bench.messages import BenchMessage, Doing, TaskFailed, encode
from sglang.multimodal_gen.runtime.managers.child_process import exit_with_parent, inherited_connection

logger = logging.getLogger("sglang.multimodal_gen.runtime.bench")

T = TypeVar("T", bound=BenchMessage)


class Parent:
    """The benchmark that started this process; when it is gone, the process ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tell(self, detail: str) -> None:
        """Say what goes on."""
        self.send(Doing(detail=detail))

    def send(self, message: BenchMessage) -> None:
        """One message."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(encode(message))


def take_task(task_type: type[T]) -> tuple[Connection, T]:
    """The pipe to the benchmark and the task that it sent first; one that cannot be read ends the process."""
    connection = inherited_connection()
    payload = connection.recv_bytes()
    with failures_told(Parent(connection)):
        task = msgspec.msgpack.decode(payload, type=task_type)
    return connection, task


def watch_parent(connection: Connection, on_message: Callable[[bytes], None] = lambda _: None) -> Parent:
    """Leave when the benchmark is gone; `on_message` gets what it sends. What that raises is told, and ends the
    process: the benchmark waits for an answer that would never come."""
    parent = Parent(connection)

    def take(payload: bytes) -> None:
        with failures_told(parent):
            on_message(payload)

    exit_with_parent(connection, take, cleanup=lambda: None)
    return parent


@contextlib.contextmanager
def failures_told(parent: Parent) -> Iterator[None]:
    """Tell the benchmark what stopped the block, then exit with status 1."""
    try:
        yield
    except ServingError as error:
        parent.send(TaskFailed(error=error.info()))
        sys.exit(1)
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            text = "the device ran out of memory; use a smaller size, fewer frames or a lower precision"
            parent.send(TaskFailed(error=OutOfMemory(text).info()))
        else:
            logger.exception("a benchmark failed")
            text = f"the benchmark failed ({type(error).__name__}: {error}); the lines above say where"
            parent.send(TaskFailed(error=InternalError(text).info()))
        sys.exit(1)
