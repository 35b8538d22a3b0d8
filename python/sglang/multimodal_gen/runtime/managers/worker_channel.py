"""A worker's end of its pipe to the scheduler."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import cast

from sglang.multimodal_gen.runtime.managers.child_process import exit_with_parent
from sglang.multimodal_gen.runtime.managers.messages import Codec, Message, encode
from sglang.multimodal_gen.runtime.managers.worker_messages import Heartbeat, ToWorker

_HEARTBEAT_S = 1.0


class Channel:
    """Messages in by a thread, messages out from any thread; every second one that says that the process lives."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self._codec = Codec(ToWorker)
        self._lock = threading.Lock()
        self.allocated_bytes: Callable[[], int | None] = lambda: None

    def start(self) -> None:
        """Begin reading and beating."""
        exit_with_parent(self.connection, self._receive, cleanup=lambda: None)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self, message: Message) -> None:
        """One message to the scheduler; when it is gone, the reader thread ends this process."""
        with self._lock, contextlib.suppress(OSError):
            self.connection.send_bytes(encode(message))

    def _receive(self, payload: bytes) -> None:
        self.inbox.put(cast(ToWorker, self._codec.decode(payload)))

    def _beat(self) -> None:
        while True:
            self.send(Heartbeat(allocated_bytes=self.allocated_bytes()))
            time.sleep(_HEARTBEAT_S)
