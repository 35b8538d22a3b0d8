"""What the scheduler tells of itself: to entry points that ask, and to the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sized

from sglang.multimodal_gen.runtime.managers.dispatcher import Dispatcher
from sglang.multimodal_gen.runtime.managers.messages import EngineState, Status
from sglang.multimodal_gen.runtime.managers.output_link import Ledger
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.observability.metrics import MODEL_FACTS, EngineSnapshot


def status_of(
    query_id: str,
    *,
    state: EngineState,
    requests: Mapping[str, RequestRecord],
    waiting: Sized,
    dispatcher: Dispatcher,
    ledger: Ledger,
    num_restarts: int,
) -> Status:
    """The answer to a StatusRequest."""
    files, size = ledger.settle()
    workers = dispatcher.workers
    return Status(
        query_id=query_id,
        state=state,
        num_queued=len(waiting),
        num_running=len(requests) - len(waiting),
        num_workers=len(workers.ranks),
        worker_pids=tuple(rank.pid for rank in workers.ranks),
        num_worker_restarts=num_restarts,
        budget_bytes=workers.budget_bytes,
        reserved_bytes=dispatcher.budget().reserved_bytes(dispatcher.holders(requests)),
        allocated_bytes=workers.allocated_bytes,
        ledger_files=files,
        ledger_bytes=size,
        ticks=dispatcher.num_ticks,
        mean_batch_size=dispatcher.mean_batch_size,
    )


def snapshot_of(
    name: str,
    *,
    state: EngineState,
    requests: Mapping[str, RequestRecord],
    waiting: Sized,
    dispatcher: Dispatcher,
    num_restarts: int,
) -> EngineSnapshot:
    """The same for the metrics, under the served model's `name`."""
    workers, model = dispatcher.workers, state.model
    return EngineSnapshot(
        ready=state.state == "ready",
        num_queued=len(waiting),
        num_running=len(requests) - len(waiting),
        num_workers=len(workers.ranks),
        num_worker_restarts=num_restarts,
        budget_bytes=workers.budget_bytes,
        reserved_bytes=dispatcher.budget().reserved_bytes(dispatcher.holders(requests)),
        allocated_bytes=workers.allocated_bytes,
        model={} if model is None else {"model": name, **{fact: getattr(model, fact) for fact in MODEL_FACTS}},
    )
