"""When a request runs, which says nothing about its result: equal requests give equal bytes whatever stands here."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.declare import arg

MOST_PRIORITY = 2
MAX_DEADLINE_S = 604_800.0


@dataclass(frozen=True, kw_only=True)
class SchedulingParams:
    """Who comes before whom, and until when a result is wanted."""

    priority: int = arg(
        0,
        help="Higher ones come sooner: each step up doubles the share of the device where several kinds of requests "
        "want it. None waits for ever.",
        group="scheduling",
        minimum=-MOST_PRIORITY,
        maximum=MOST_PRIORITY,
    )
    deadline_s: float | None = arg(
        None,
        help="Seconds from the request's arrival until its result must be complete; then it ends with the code "
        "`deadline_exceeded`. Of requests of one priority and size whoever is due first starts first.",
        group="scheduling",
        unset="none; for pictures over HTTP as long as the client says that it waits",
        metavar="SECONDS",
        minimum=0.001,
        maximum=MAX_DEADLINE_S,
    )
