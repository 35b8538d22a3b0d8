"""One rank of the pool that parallel runs are tested with: `python -m sglang.multimodal_gen.test.parallel_rank RANK`.

Each line of stdin is a task, answered with one line: "ok", or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.memory_args import MemoryArgs
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.runtime.distributed.parallel_state import join_replica
from sglang.multimodal_gen.runtime.layers import linear
from sglang.multimodal_gen.runtime.layers.attention import attention
from sglang.multimodal_gen.runtime.layers.forward_graphs import forget_graphs
from sglang.multimodal_gen.runtime.loader.component_loader import weight_totals
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.lora_case import load_adapters
from sglang.multimodal_gen.test.parallel_case import made_of
from sglang.multimodal_gen.test.parallel_coding import Coding, coded

_CHUNK_TOKENS = linear.CHUNK_TOKENS
_MOST_PACKED_TOKENS = attention.MOST_PACKED_TOKENS


def run(rank: int, task: dict[str, Any]) -> None:
    """Generate the task's requests together, with text encoders dealt, or encode and decode; each rank saves all."""
    shape = ReplicaShape(**task["shape"])
    # Tiny sequences would always be sent at once; beside a ring they are sent as long ones are.
    attention.MOST_PACKED_TOKENS = 0 if shape.ring > 1 else _MOST_PACKED_TOKENS
    # Nor would their sums be cut into chunks.
    linear.CHUNK_TOKENS = _CHUNK_TOKENS if shape.ulysses > 1 else 8
    if rank >= shape.num_ranks:
        return
    pipeline = None
    try:
        pipeline = build_pipeline(
            task["directory"],
            ExecutionArgs(device=task["device"], precision="fp32", encoder_parallel="on", **task.get("execution", {})),
            memory=MemoryArgs(**task.get("memory", {})),
            local_rank=rank,
            num_gpus=shape.num_ranks,
            join=lambda device: join_replica(shape, rank, store=Path(task["store"]), device=device, timeout_s=60),
        )
        if task["codings"]:
            with torch.inference_mode():
                arrays = coded(pipeline, [Coding(**coding) for coding in task["codings"]])
        else:
            arrays = _generated(pipeline, task)
    finally:
        if pipeline is not None:
            forget_graphs(pipeline.modules.values())  # they hold on to connections, which could not be closed
        if dist.is_initialized():
            dist.destroy_process_group()
    np.savez(task["out"].format(rank=rank), allow_pickle=False, **arrays)


def _generated(pipeline: Any, task: dict[str, Any]) -> dict[str, Any]:
    load_adapters(pipeline, task["adapters"], task["merged"])
    arrays = made_of(pipeline, task["wishes"], num_pictures=task["num_pictures"])
    encoders = [module for name, module in pipeline.modules.items() if name.startswith("text_encoder")]
    num_parameters, encoder_bytes = weight_totals(encoders)
    return {**arrays, "num_parameters": num_parameters, "encoder_bytes": encoder_bytes}


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    # Comparisons in fp32 are of fp32: no rounding to TF32 on the way.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    envs.meet_on_loopback()
    for line in sys.stdin:
        try:
            run(rank, json.loads(line))
            answer = "ok"
        except Exception:
            answer = json.dumps(traceback.format_exc())
        print(answer, flush=True)


if __name__ == "__main__":
    main()
