"""The worker's thread that writes requests' states to disk while the next steps run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.managers.worker_messages import StateSaved
from sglang.multimodal_gen.runtime.pipelines_core.state_file import write_state

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 10.0


class _Job(NamedTuple):
    request_id: str
    path: Path
    state: Mapping[str, Any]
    identity: str
    done: threading.Event


class StateWriter:
    """Takes states that are already on the host, writes them in order, reports each one."""

    def __init__(self, report: Callable[[StateSaved], None]) -> None:
        self._report = report
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._unwritten: dict[str, threading.Event] = {}
        threading.Thread(target=self._run, name="state-writer", daemon=True).start()

    def put(self, request_id: str, path: Path, state: Mapping[str, Any], *, identity: str) -> None:
        """Write `state` to `path`; a StateSaved is reported once it is on disk or has failed."""
        done = self._unwritten[request_id] = threading.Event()
        self._jobs.put(_Job(request_id, path, state, identity, done))

    def wait(self, request_id: str) -> None:
        """Until the newest state of the request is reported; a slow disk holds nobody up for longer than a while."""
        done = self._unwritten.pop(request_id, None)
        if done is not None and not done.wait(_LONGEST_WAIT_S):
            logger.warning("request %s: goes on though its state is not on disk yet", request_id)

    def forget(self, request_id: str) -> None:
        """The request has left; its state is written all the same."""
        self._unwritten.pop(request_id, None)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            error = None
            try:
                write_state(job.path, job.state, identity=job.identity)
            except OSError as failure:
                logger.warning("request %s: its state was not saved (%s)", job.request_id, failure.strerror)
                error = StorageError("state_dir: a request's state cannot be written there", param="state_dir").info()
            self._report(
                StateSaved(
                    request_id=job.request_id,
                    state_file=job.path.name,
                    units_done=job.state["units_done"],
                    error=error,
                )
            )
            job.done.set()
