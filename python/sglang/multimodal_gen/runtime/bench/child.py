"""A benchmark's child process, seen from the benchmark."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from sglang.multimodal_gen.errors import BenchmarkFailed, RemoteError
from sglang.multimodal_gen.runtime.bench.messages import BenchMessage, Doing, FromChild, TaskFailed, encode
from sglang.multimodal_gen.runtime.managers.child_process import ChildProcess

T = TypeVar("T", bound=BenchMessage)
_STOP_GRACE_S = 5.0
_DECODER = msgspec.msgpack.Decoder(FromChild)


class BenchChild:
    """A running child with its task; leave the `with` block to end it."""

    def __init__(self, module: str, task: BenchMessage) -> None:
        self._child = ChildProcess(module, config=encode(task))

    def send(self, message: BenchMessage) -> None:
        """One more message; a child that is gone is noticed by `receive`."""
        self._child.send(encode(message))

    def receive(self, wanted: type[T]) -> T:
        """Wait for the next result; what the child does meanwhile is told on stderr.

        Raises:
            RemoteError: the child's own error.
            BenchmarkFailed: it died.
        """
        [result] = receive_all([self], wanted)
        return result

    @property
    def connection(self) -> Connection:
        """Readable when the child has said something or is gone."""
        return self._child.connection

    def take(self, wanted: type[T]) -> T | None:
        """The next message, if it is a result; see `receive`."""
        try:
            message = _DECODER.decode(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._child.process.wait()
            raise BenchmarkFailed(
                f"the benchmark's process {self._child.describe_exit()} before it had a result"
            ) from None
        except msgspec.DecodeError as error:
            raise BenchmarkFailed(f"the benchmark's process sent what cannot be read: {error}") from error
        if isinstance(message, TaskFailed):
            raise RemoteError(message.error)
        if isinstance(message, Doing):
            tell(message.detail)
            return None
        assert isinstance(message, wanted), f"{type(message).__name__} in place of {wanted.__name__}"
        return message

    def __enter__(self) -> BenchChild:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._child.close(grace_s=0 if exc_type is not None else _STOP_GRACE_S)


def receive_all(children: Sequence[BenchChild], wanted: type[T]) -> list[T]:
    """The next result of each, in the children's order. The first failure ends the wait for all: those that are left
    may wait for the one that failed.

    Raises: see BenchChild.receive.
    """
    results: dict[int, T] = {}
    while waiting := [child.connection for number, child in enumerate(children) if number not in results]:
        readable = wait(waiting)
        for number, child in enumerate(children):
            if child.connection in readable and (result := child.take(wanted)) is not None:
                results[number] = result
    return [results[number] for number in range(len(children))]


def all_of(*waits: Callable[[], Any]) -> list[Any]:
    """What each of them returns, all at the same time. The first that raises ends the wait, with its error; the others
    are left to themselves, and end when what they wait for is closed."""
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def run(number: int, wait_for: Callable[[], Any]) -> None:
        try:
            done.put((number, wait_for(), None))
        except BaseException as error:  # raised again in the thread that waits
            done.put((number, None, error))

    for number, wait_for in enumerate(waits):
        threading.Thread(target=run, args=(number, wait_for), name="bench-wait", daemon=True).start()
    results: dict[int, Any] = {}
    while len(results) < len(waits):
        number, result, error = done.get()
        if error is not None:
            raise error
        results[number] = result
    return [results[number] for number in range(len(waits))]


def tell(detail: str) -> None:
    """Say what goes on; stdout is for results."""
    sys.stderr.write(f"sglang bench: {detail}\n")
    sys.stderr.flush()
