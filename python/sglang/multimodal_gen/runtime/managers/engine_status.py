"""What the scheduler tells of itself: to entry points that ask, and to the metrics."""

from __future__ import annotations

from collections.abc import Mapping

from sglang.multimodal_gen.runtime.managers.dispatcher import Dispatcher
from sglang.multimodal_gen.runtime.managers.messages import EngineState, Status
from sglang.multimodal_gen.runtime.managers.output_link import Ledger
from sglang.multimodal_gen.runtime.managers.request_record import RequestRecord
from sglang.multimodal_gen.runtime.managers.waiting_queue import WaitingQueue
from sglang.multimodal_gen.runtime.observability.metrics import MODEL_FACTS, EngineSnapshot


def status_of(
    query_id: str,
    *,
    state: EngineState,
    active: Mapping[str, RequestRecord],
    waiting: WaitingQueue,
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
        num_running=len(active),
        num_workers=len(workers.ranks),
        worker_pids=tuple(rank.pid for rank in workers.ranks),
        num_worker_restarts=num_restarts,
        budget_bytes=workers.budget_bytes,
        reserved_bytes=dispatcher.budget().reserved_bytes(dispatcher.holders(active)),
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
    active: Mapping[str, RequestRecord],
    waiting: WaitingQueue,
    dispatcher: Dispatcher,
    num_restarts: int,
) -> EngineSnapshot:
    """The same for the metrics, under the served model's `name`."""
    workers, model = dispatcher.workers, state.model
    return EngineSnapshot(
        ready=state.state == "ready",
        num_queued=len(waiting),
        queued_by_priority=waiting.counts_by_priority(),
        queued_cost=waiting.cost,
        num_running=len(active),
        num_workers=len(workers.ranks),
        num_worker_restarts=num_restarts,
        budget_bytes=workers.budget_bytes,
        reserved_bytes=dispatcher.budget().reserved_bytes(dispatcher.holders(active)),
        allocated_bytes=workers.allocated_bytes,
        model={} if model is None else {"model": name, **{fact: getattr(model, fact) for fact in MODEL_FACTS}},
    )
