"""A benchmark's child process, seen from the benchmark."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TypeVar

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
        while True:
            try:
                message = _DECODER.decode(self._child.connection.recv_bytes())
            except (EOFError, OSError):
                self._child.process.wait()
                raise BenchmarkFailed(
                    f"the benchmark's process {self._child.describe_exit()} before it had a result"
                ) from None
            if isinstance(message, TaskFailed):
                raise RemoteError(message.error)
            if isinstance(message, Doing):
                tell(message.detail)
            else:
                assert isinstance(message, wanted), f"{type(message).__name__} in place of {wanted.__name__}"
                return message

    def __enter__(self) -> BenchChild:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._child.close(grace_s=0 if exc_type is not None else _STOP_GRACE_S)


def tell(detail: str) -> None:
    """Say what goes on; stdout is for results."""
    sys.stderr.write(f"sglang bench: {detail}\n")
    sys.stderr.flush()
