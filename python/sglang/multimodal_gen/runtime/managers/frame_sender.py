"""A worker's decoded frames on their way out: written into files by a thread while the next unit runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from sglang.multimodal_gen.runtime.managers.messages import Message
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.worker_messages import OutputChunk

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch


class FrameSender:
    """Sends frames in the order in which they come, one chunk of a request behind its decoding at most."""

    def __init__(self, run_dir: RunDir, send: Callable[[Message], None]) -> None:
        self._run_dir = run_dir
        self._send = send
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="frames")
        self._sending: dict[str, Future[None]] = {}

    def put(self, batch: OutputBatch) -> None:
        """Send these frames; the last ones of a request, and those before them, have left when this returns.

        Raises: StorageError when there was no room for these, or for those that the request put before.
        """
        self._wait_for(batch.request_id)
        self._sending[batch.request_id] = self._thread.submit(self._leave, batch)
        if batch.last:
            self._wait_for(batch.request_id)

    def forget(self, request_id: str) -> None:
        """The request has left: nothing of it follows, and what kept frames from leaving no longer matters."""
        sending = self._sending.pop(request_id, None)
        if sending is not None:
            sending.exception()

    def _wait_for(self, request_id: str) -> None:
        sending = self._sending.pop(request_id, None)
        if sending is not None:
            sending.result()

    def _leave(self, batch: OutputBatch) -> None:
        frames = self._run_dir.send(batch.frames.numpy())
        self._send(
            OutputChunk(request_id=batch.request_id, first_frame=batch.first_frame, last=batch.last, frames=frames)
        )
