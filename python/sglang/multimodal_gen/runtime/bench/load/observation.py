"""What is seen of one request from outside, while it runs, and what of a reply's JSON tells more."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

_SIZE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")
WAITING, RUNNING, COMPLETED = "queued", "in_progress", "completed"
"""A video's statuses in OpenAI's interface; every other one is an end without a result."""


class RequestFailure(Exception):
    """A request of the load came to nothing; such failures are counted by `key`. `status` is an HTTP reply's."""

    def __init__(self, key: str, detail: str, *, status: int | None = None) -> None:
        super().__init__(detail)
        self.key, self.detail, self.status = key, detail, status


@dataclass(kw_only=True)
class Observation:
    """Moments are of `time.perf_counter`, None until they are seen; sizes are as requested until a reply tells."""

    sent: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    running: float | None = None
    completed: float | None = None
    first_preview: float | None = None
    bytes_received: int = 0
    num_outputs: int = 0
    size: str | None = None
    num_frames: int | None = None
    job_id: str | None = None
    queue_s: float | None = None
    execution_s: float | None = None

    def says(self, found: Mapping[str, Any]) -> None:
        """Take from a request, an image's reply or a video's object what it says of size and times."""
        size, num_frames = found.get("size"), found.get("num_frames")
        if isinstance(size, str) and _SIZE.fullmatch(size):
            self.size = size
        if type(num_frames) is int:
            self.num_frames = num_frames
        self.queue_s = _number(found, "queue_time_s", self.queue_s)
        self.execution_s = _number(found, "inference_time_s", self.execution_s)

    def status(self, name: str) -> None:
        """A video's status, as it is now."""
        if name == RUNNING and self.running is None:
            self.running = time.perf_counter()
        elif name == COMPLETED and self.completed is None:
            self.completed = time.perf_counter()

    def preview(self) -> None:
        """A preview has come."""
        if self.first_preview is None:
            self.first_preview = time.perf_counter()

    def end(self) -> None:
        """The last byte of the result is here."""
        self.ended = time.perf_counter()

    def queue_seconds(self) -> float | None:
        """As the reply says, or from sending to the status that says it runs; None: nothing tells."""
        if self.queue_s is None and self.running is not None:
            return self.running - self.sent
        return self.queue_s

    def execution_seconds(self) -> float | None:
        """As the reply says, or between the statuses; None: nothing tells."""
        if self.execution_s is None and self.running is not None and self.completed is not None:
            return self.completed - self.running
        return self.execution_s

    def pixels(self) -> int | None:
        """Of all outputs and frames; None when nobody said how large they are."""
        match = _SIZE.fullmatch(self.size or "")
        if match is None or self.num_frames is None:
            return None
        return int(match[1]) * int(match[2]) * self.num_frames * self.num_outputs


def _number(found: Mapping[str, Any], name: str, otherwise: float | None) -> float | None:
    value = found.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def json_object(data: bytes | str) -> dict[str, Any]:
    """Raises RequestFailure for anything else."""
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise RequestFailure("invalid reply", "the reply is no JSON object")
    return found


def failure_of(status: int, data: bytes) -> RequestFailure:
    """What an HTTP error says, in OpenAI's form, in FastAPI's or in none."""
    try:
        found = json_object(data)
    except RequestFailure:
        found = {}
    code, message = error_facts(found)
    return RequestFailure(f"{status} {code}".rstrip(), message or f"status {status}", status=status)


def error_facts(found: Mapping[str, Any]) -> tuple[str, str]:
    """(code, message) of a reply's error, each empty when it has none."""
    error = found.get("error")
    if isinstance(error, Mapping):
        code, message = error.get("code") or error.get("type"), error.get("message")
    else:
        code, message = None, error or found.get("detail") or found.get("message")
    return (code if isinstance(code, str) else ""), ("" if message is None else " ".join(str(message).split()))
