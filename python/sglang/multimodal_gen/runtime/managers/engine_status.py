"""What the scheduler tells of itself: to entry points that ask, and to the metrics."""

from __future__ import annotations

from typing import Any

from sglang.multimodal_gen.runtime.managers.messages import EngineState, Status
from sglang.multimodal_gen.runtime.managers.output_link import Ledger
from sglang.multimodal_gen.runtime.managers.replica import Replicas
from sglang.multimodal_gen.runtime.managers.waiting_queue import WaitingQueue
from sglang.multimodal_gen.runtime.observability.metrics import MODEL_FACTS, EngineSnapshot


def status_of(
    query_id: str, *, state: EngineState, waiting: WaitingQueue, replicas: Replicas, ledger: Ledger, num_restarts: int
) -> Status:
    """The answer to a StatusRequest."""
    files, size = ledger.settle()
    dispatchers = [replica.dispatcher for replica in replicas]
    batches = sum(dispatcher.num_batches for dispatcher in dispatchers)
    units = sum(dispatcher.num_batched for dispatcher in dispatchers)
    pids = tuple(rank.pid for replica in replicas for rank in replica.workers.ranks)
    return Status(
        query_id=query_id,
        state=state,
        num_queued=len(waiting),
        num_running=len(replicas.active()),
        num_workers=len(pids),
        worker_pids=pids,
        num_worker_restarts=num_restarts,
        ledger_files=files,
        ledger_bytes=size,
        ticks=sum(dispatcher.num_ticks for dispatcher in dispatchers),
        mean_batch_size=units / batches if batches else 0.0,
        **_memory(replicas),
    )


def snapshot_of(
    name: str, *, state: EngineState, waiting: WaitingQueue, replicas: Replicas, num_restarts: int
) -> EngineSnapshot:
    """The same for the metrics, under the served model's `name`."""
    model = state.model
    return EngineSnapshot(
        ready=state.state == "ready",
        num_queued=len(waiting),
        queued_by_priority=waiting.counts_by_priority(),
        queued_cost=waiting.cost,
        num_running=len(replicas.active()),
        num_workers=sum(len(replica.workers.ranks) for replica in replicas),
        num_worker_restarts=num_restarts,
        model={} if model is None else {"model": name, **{fact: getattr(model, fact) for fact in MODEL_FACTS}},
        **_memory(replicas),
    )


def _memory(replicas: Replicas) -> dict[str, Any]:
    """Of all replicas together; what is allocated is unknown while a loaded one has not said it."""
    allocated = [replica.workers.allocated_bytes for replica in replicas.running]
    known = [number for number in allocated if number is not None]
    return {
        "budget_bytes": sum(replica.workers.budget_bytes for replica in replicas),
        "reserved_bytes": sum(
            replica.dispatcher.budget().reserved_bytes(replica.dispatcher.holders(replica.active))
            for replica in replicas
        ),
        "allocated_bytes": sum(known) if known else None,
    }
