"""Times attention kernels in a process of its own.

`python -m sglang.multimodal_gen.runtime.bench.worker.attention FD`
"""

from __future__ import annotations

import torch

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.bench.messages import (
    AttentionCase,
    AttentionCaseResult,
    AttentionResult,
    AttentionTask,
    AttentionTimes,
)
from sglang.multimodal_gen.runtime.bench.statistics import summarise
from sglang.multimodal_gen.runtime.bench.worker.flops import matmul_rate
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent, failures_told, take_task, watch_parent
from sglang.multimodal_gen.runtime.layers.attention.choice_table import (
    TableEntry,
    attention_file,
    identity_of,
    merge_into_table,
)
from sglang.multimodal_gen.runtime.layers.attention.dispatch import choose_kernel, obstacle
from sglang.multimodal_gen.runtime.layers.attention.registry import KERNELS, device_facts, load_kernel
from sglang.multimodal_gen.runtime.layers.attention.traits import LayerNeeds
from sglang.multimodal_gen.runtime.layers.attention.tuning import AttentionInputs, entry_of, timed_kernels
from sglang.multimodal_gen.runtime.observability.logging_setup import configure_logging
from sglang.multimodal_gen.runtime.pipelines_core.memory import is_out_of_memory
from sglang.multimodal_gen.runtime.pipelines_core.placement import place


class AttentionBench:
    """The kernels of one device, case after case."""

    def __init__(self, task: AttentionTask, parent: Parent) -> None:
        self.task, self.parent = task, parent
        placement = place(task.engine.args.execution)
        self.device, self.dtype, self.precision = placement.device, placement.dtype, placement.precision
        self.facts = device_facts(self.device)
        self.entries: list[TableEntry] = []
        self.left_out = 0

    def result(self) -> AttentionResult:
        """Measure everything, and write the table where that was asked for. Raises StorageError when it cannot be."""
        if self.task.save:
            self._save()  # a file that cannot be written should not wait for the end
        rate = self._matmul_rate()
        most = self.task.max_tokens if self.device.type == "cuda" else self.task.max_tokens_on_cpu
        cases = [case for case in self.task.cases if most is None or max(case.queries, case.keys) <= most]
        self.left_out = len(self.task.cases) - len(cases)
        results = tuple(self._case(case, rate) for case in cases)
        return AttentionResult(
            device=str(self.device),
            device_name=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "",
            precision=self.precision,
            matmul_flops_per_second=rate,
            cases=results,
            num_left_out=self.left_out,
            max_tokens=most,
            table=self._save() if self.task.save else "",
        )

    def _case(self, case: AttentionCase, rate: float) -> AttentionCaseResult:
        self.parent.tell(f"{case.heads} heads of {case.head_dim}, {case.queries} x {case.keys} tokens")
        needs = LayerNeeds(precision=self.precision, head_dim=case.head_dim, mask=case.masked)
        asked = self.task.kernels or tuple(KERNELS)
        problems = {name: problem for name in asked if (problem := obstacle(name, self.facts, needs)) is not None}
        inputs = AttentionInputs.drawn(
            self.precision,
            (case.batch_size, case.queries, case.heads, case.head_dim),
            num_keys=case.keys,
            masked=case.masked,
            device=self.device,
        )
        samples, failed = timed_kernels(
            inputs,
            [name for name in asked if name not in problems],
            device=self.device,
            warmup_runs=self.task.warmup_runs,
            repeats=self.task.repeats,
            min_seconds=self.task.min_seconds,
        )
        times = {}
        for name, own in samples.items():
            achieved = inputs.flops / (seconds := summarise(own)).median
            times[name] = AttentionTimes(
                seconds=seconds,
                flops_per_second=achieved,
                matmul_ratio=achieved / rate,
                error=self._error(inputs, name),
                lossy=KERNELS[name].traits.lossy,
            )
        entry = entry_of(inputs.shape, {name: each.seconds.median for name, each in times.items()}, self.facts)
        if entry is not None:
            self.entries.append(entry)
        return AttentionCaseResult(
            case=case,
            flops=inputs.flops,
            kernels=times,
            problems=problems | failed,
            usual=choose_kernel(needs, self.facts).name,
            chosen=entry.kernels[0] if entry is not None else "",
        )

    def _error(self, inputs: AttentionInputs, name: str) -> float | None:
        """None where the reference itself does not fit into memory."""
        try:
            return inputs.error_of(inputs.attended_by(load_kernel(name)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _save(self) -> str:
        file = attention_file(envs.cache_root(), identity_of(self.device))
        try:
            merge_into_table(file, self.entries)
        except OSError as error:
            raise StorageError(f"save: cannot write {file.path}: {error.strerror}", param="save") from error
        return str(file.path)

    def _matmul_rate(self) -> float:
        self.parent.tell("measuring how fast matrices multiply")
        return matmul_rate(self.device, self.dtype)


def main() -> None:
    """Entry point of the process."""
    connection, task = take_task(AttentionTask)
    parent = watch_parent(connection)
    configure_logging(task.engine.args.logging)
    task.engine.apply()
    with failures_told(parent), torch.inference_mode():
        parent.send(AttentionBench(task, parent).result())


if __name__ == "__main__":
    main()
