"""One request of a load test as it was in the end."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.runtime.bench.load.observation import Observation
from sglang.multimodal_gen.runtime.bench.load.plan import PlannedRequest

OK, INTERRUPTED = "ok", "interrupted"


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`due_s`, `sent_s` and `end_s` count from the first moment of the run, `latency_s` from sending to the last byte
    of the result. `outcome` is `ok`, `interrupted`, or what the failure is counted under, with the server's words in
    `detail`. None is what nobody told. `prompt` is the place in the list of prompts.
    """

    number: int
    prompt: int
    size: str | None
    due_s: float | None
    sent_s: float
    end_s: float
    outcome: str
    detail: str
    latency_s: float | None
    queue_s: float | None
    execution_s: float | None
    download_s: float | None
    first_preview_s: float | None
    bytes_received: int
    num_outputs: int
    pixels: int | None

    @property
    def is_ok(self) -> bool:
        """Whether there was a result."""
        return self.outcome == OK


def sample_of(
    planned: PlannedRequest, seen: Observation, *, begin: float, ended: float, outcome: str, detail: str = ""
) -> Sample:
    """What was seen, as seconds since `begin`; a request without a result has no latency."""
    is_ok = outcome == OK
    completed, preview = seen.completed, seen.first_preview
    return Sample(
        number=planned.number,
        prompt=planned.prompt,
        size=seen.size,
        due_s=planned.due_s,
        sent_s=seen.sent - begin,
        end_s=ended - begin,
        outcome=outcome,
        detail=detail,
        latency_s=ended - seen.sent if is_ok else None,
        queue_s=seen.queue_seconds() if is_ok else None,
        execution_s=seen.execution_seconds() if is_ok else None,
        download_s=ended - completed if is_ok and completed is not None else None,
        first_preview_s=None if preview is None else preview - seen.sent,
        bytes_received=seen.bytes_received,
        num_outputs=seen.num_outputs if is_ok else 0,
        pixels=seen.pixels() if is_ok else None,
    )
