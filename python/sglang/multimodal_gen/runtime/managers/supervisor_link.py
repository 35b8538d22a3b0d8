"""The scheduler's end of the supervisor's pipe."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import cast

from sglang.multimodal_gen.runtime.managers.messages import Codec, SchedulerAlive, SupervisorNote, encode

_ALIVE_S = 0.3


class SupervisorLink:
    """Notes in; out, that the loop goes round: a scheduler that is silent for long is replaced."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._codec = Codec(SupervisorNote)
        self._told_at = 0.0

    def fileno(self) -> int:
        """For polling."""
        return self._connection.fileno()

    def tell_alive(self) -> None:
        """Called at each turn of the loop; never waits for a supervisor that does not read."""
        now = time.monotonic()
        if now - self._told_at >= _ALIVE_S and select.select([], [self._connection], [], 0)[1]:
            self._told_at = now
            with contextlib.suppress(OSError):  # the supervisor is gone: its end of file says so
                self._connection.send_bytes(encode(SchedulerAlive()))

    def receive(self) -> Iterator[SupervisorNote]:
        """The notes that wait. Raises EOFError when the supervisor wants the engine to end, or is gone."""
        try:
            while self._connection.poll(0):
                yield cast(SupervisorNote, self._codec.decode(self._connection.recv_bytes()))
        except OSError as error:
            raise EOFError from error
