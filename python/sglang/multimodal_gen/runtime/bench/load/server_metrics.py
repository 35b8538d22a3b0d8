"""What our own server's /metrics say of a load test: the rise of its counters between two scrapes."""

from __future__ import annotations

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sglang.multimodal_gen.runtime.observability.metrics import PREFIX

_BATCH, _QUEUE = f"{PREFIX}_generation_batch_size", f"{PREFIX}_queue_time_seconds"
_DENOISING = "denoise"

Counts = dict[tuple[str, str, str], float]
"""Values by metric, lane and upper bound of a bucket, over all other labels; "" where the metric has none."""


class ServerSide(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that the server did meanwhile, for whomever. `requests_per_forward` is by lane; `steps_by_batch_size`
    counts denoising forwards by the least bucket that holds their size; `mean_queue_s` is until the first worker.
    """

    requests_per_forward: dict[str, float]
    steps_by_batch_size: dict[str, int]
    mean_queue_s: float | None


def server_side(before: str | None, after: str | None) -> ServerSide | None:
    """None when a scrape is missing, is not of our server, or nothing ran between the two."""
    old, new = _counts(before), _counts(after)
    rise = {key: value - old.get(key, 0.0) for key, value in new.items()}
    if any(value < 0 for value in rise.values()):  # the scheduler was replaced, and counts anew
        return None
    lanes = sorted({lane for name, lane, _ in rise if name == f"{_BATCH}_count"})
    per_forward = {
        lane: rise[f"{_BATCH}_sum", lane, ""] / count for lane in lanes if (count := rise[f"{_BATCH}_count", lane, ""])
    }
    started = rise.get((f"{_QUEUE}_count", "", ""), 0.0)
    if not per_forward:
        return None
    return ServerSide(
        requests_per_forward=per_forward,
        steps_by_batch_size=_by_bucket(rise),
        mean_queue_s=rise[f"{_QUEUE}_sum", "", ""] / started if started else None,
    )


def _counts(text: str | None) -> Counts:
    found: Counts = {}
    try:
        for family in text_string_to_metric_families(text or ""):
            if family.name in (_BATCH, _QUEUE):
                for sample in family.samples:
                    key = sample.name, sample.labels.get("lane", ""), sample.labels.get("le", "")
                    found[key] = found.get(key, 0.0) + sample.value
    except ValueError:  # something else is called /metrics there
        return {}
    return found


def _by_bucket(rise: Counts) -> dict[str, int]:
    """Buckets count all that is smaller as well."""
    wanted = f"{_BATCH}_bucket", _DENOISING
    buckets = sorted((float(bound), value) for (name, lane, bound), value in rise.items() if (name, lane) == wanted)
    found, below = {}, 0.0
    for bound, value in buckets:
        if value > below:
            found[f"up to {bound:g}"] = round(value - below)
        below = value
    return found
