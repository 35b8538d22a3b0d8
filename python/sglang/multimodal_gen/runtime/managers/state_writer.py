"""The worker's thread that writes requests' states to disk while the next steps run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.managers.messages import StateSaved
from sglang.multimodal_gen.runtime.pipelines_core.state_file import write_state

logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    request_id: str
    path: Path
    state: Mapping[str, Any]
    identity: str


class StateWriter:
    """Takes states that are already on the host, writes them in order, reports each one."""

    def __init__(self, report: Callable[[StateSaved], None]) -> None:
        self._report = report
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="state-writer", daemon=True).start()

    def put(self, request_id: str, path: Path, state: Mapping[str, Any], *, identity: str) -> None:
        """Write `state` to `path`; a StateSaved is reported once it is on disk or has failed."""
        self._jobs.put(_Job(request_id, path, state, identity))

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
