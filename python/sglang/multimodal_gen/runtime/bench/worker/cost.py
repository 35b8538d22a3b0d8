"""Counts what a request costs, in a process of its own.

`python -m sglang.multimodal_gen.runtime.bench.worker.cost FD`
"""

from __future__ import annotations

import torch

from sglang.multimodal_gen.runtime.bench.messages import CostResult, CostTask
from sglang.multimodal_gen.runtime.bench.worker.flops import matmul_rate
from sglang.multimodal_gen.runtime.bench.worker.model import find_model, work_size
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent, failures_told, take_task, watch_parent
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.pipelines_core.memory import free_bytes

_PHASES = {"denoise": "dit", "decode": "vae_decode"}


def count_cost(task: CostTask, parent: Parent) -> CostResult:
    """Of the transformer, and of the autoencoder where it is ours; encoding a prompt is little beside them."""
    parent.tell("counting FLOPs")
    model = find_model(task.engine.args.model, _PHASES["denoise"], parent)
    context = model.load_context(task.engine.args, lambda _: None)
    known = model.pipeline_class.workloads
    workloads = {phase: known[name] for phase, name in _PHASES.items() if name in known}
    dtypes = {phase: context.dtype_of(workload.component) for phase, workload in workloads.items()}
    size = work_size(task, model, dtype=dtypes.get("decode", context.dtype), free_bytes=free_bytes(context.device))
    flops = {phase: model.flops(workload, size) for phase, workload in workloads.items()}
    geometry = model.pipeline_class.geometry_of(model.configs, model.config)
    rates = {dtype: matmul_rate(context.device, dtype) for dtype in set(dtypes.values())}
    return CostResult(
        num_tokens=geometry.num_tokens(size.latent_shape),
        step_flops=flops["denoise"],
        decode_flops=flops.get("decode", 0),
        matmul_flops_per_second={phase: rates[dtype] for phase, dtype in dtypes.items()},
    )


def main() -> None:
    """Entry point of the process."""
    connection, task = take_task(CostTask)
    parent = watch_parent(connection)
    configure_logging(task.engine.args.logging)
    task.engine.apply()
    with failures_told(parent), torch.inference_mode():
        parent.send(count_cost(task, parent))


if __name__ == "__main__":
    main()
