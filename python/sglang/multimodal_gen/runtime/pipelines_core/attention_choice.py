"""A worker's table of attention kernels: read by the first rank and handed on, added to while no request runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import nn

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.runtime.distributed.collectives import handed_on
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext
from sglang.multimodal_gen.runtime.layers.attention.choice_table import (
    ChoiceTable,
    TableEntry,
    attention_file,
    identity_of,
    merge_into_table,
    read_table,
)
from sglang.multimodal_gen.runtime.layers.attention.registry import device_facts
from sglang.multimodal_gen.runtime.layers.attention.switch import choice_memory_of
from sglang.multimodal_gen.runtime.layers.attention.tabled import ChoiceMemory, SeenShape
from sglang.multimodal_gen.runtime.layers.attention.traits import DeviceFacts
from sglang.multimodal_gen.runtime.layers.attention.tuning import tuned_entry
from sglang.multimodal_gen.runtime.layers.forward_graphs import forget_graphs

logger = logging.getLogger(__name__)

Measure = Callable[[SeenShape, DeviceFacts, torch.device], TableEntry | None]


def read_choices(
    device: torch.device, parallel: ParallelContext, *, autotune: bool, report: Callable[[str], None]
) -> ChoiceMemory:
    """The first rank's table, on every rank, who all ask at once. What is wrong with it is reported."""
    entries: tuple[TableEntry, ...] = ()
    file = attention_file(envs.cache_root(), identity_of(device))
    if parallel.leads:
        entries, problem = read_table(file)
        if problem:
            report(problem)
    entries = _handed_on(entries, parallel)
    return ChoiceMemory(ChoiceTable(entries, origin=f"the table {file.path.name}"), notes_shapes=autotune)


def _handed_on(entries: Sequence[TableEntry], parallel: ParallelContext) -> tuple[TableEntry, ...]:
    data = handed_on(msgspec.msgpack.encode(tuple(entries)), parallel.world)
    return msgspec.msgpack.decode(data, type=tuple[TableEntry, ...])


class AttentionTuner:
    """Measures the shapes that warm-ups had, between requests.

    The first rank measures and writes the file; what it found every rank takes, at the same message. Shapes are its
    own: another rank's that differ keep their usual kernels.
    """

    def __init__(
        self, models: Sequence[nn.Module], device: torch.device, parallel: ParallelContext, *, measure: Measure
    ) -> None:
        self._memory = choice_memory_of(models)
        self._models, self._device, self._parallel, self._measure = models, device, parallel, measure
        self._is_due = False

    @classmethod
    def of(cls, models: Sequence[nn.Module], device: torch.device, parallel: ParallelContext) -> AttentionTuner:
        """One that measures on the device."""
        return cls(models, device, parallel, measure=tuned_entry)

    @property
    def is_on(self) -> bool:
        """Whether anybody asked for it, and a layer's kernel can be chosen."""
        return self._memory is not None and self._memory.notes_shapes

    def request_ended(self, *, was_warm_up: bool, others_run: bool) -> None:
        """Every rank calls this at the same messages. With others running, it waits until the last one ends."""
        self._is_due = self._is_due or was_warm_up
        if self.is_on and self._is_due and not others_run:
            self._is_due = False
            self._tune()

    def _tune(self) -> None:
        memory = self._memory
        assert memory is not None, "it is on"
        seen, memory.seen = list(memory.seen.values()), {}
        entries: list[TableEntry] = []
        if self._parallel.leads:
            facts = device_facts(self._device)
            found = {each.shape: self._measure(each, facts, self._device) for each in seen}
            entries = [entry for entry in found.values() if entry is not None]
            if entries:
                self._keep(entries)
        handed = _handed_on(entries, self._parallel)
        if handed:
            memory.table.add(handed, origin=memory.table.origin)
            forget_graphs(self._models)  # a graph has the kernels that it was captured with

    def _keep(self, entries: Sequence[TableEntry]) -> None:
        file = attention_file(envs.cache_root(), identity_of(self._device))
        for entry in entries:
            times = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in entry.seconds.items())
            logger.info("attention %s for %s: %s", entry.kernels[0], entry.shape, times)
        try:
            merge_into_table(file, entries)
        except OSError as error:
            logger.warning("the attention table %s cannot be written: %s", file.path.name, error.strerror)
