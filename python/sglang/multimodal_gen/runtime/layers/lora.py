"""Adapters beside unmerged weights: each row of a batch has its own, several or none, in one forward.

A layer that any adapter changes has a table of slots, as many for all layers; what adapter lies in a slot can change
without a new shape. Slot 0 is empty. Source: arXiv:2106.09685, arXiv:2311.03285 (rows with different adapters).

Shapes: B rows, S tokens, I in_features, O out_features, N slots, R rank of the table, K adapters of a row, the most of
any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.quantization.products import computing_dtype
from sglang.multimodal_gen.runtime.layers.shards import Shard, Sharded
from sglang.multimodal_gen.runtime.layers.table_cache import row_index, table_cache
from sglang.multimodal_gen.runtime.layers.uploads import uploaded

EMPTY_SLOT = 0
# Tables grow in steps, so that adapters of nearly the same rank do not each replace them.
_RANK_STEP = 8


class SlotUse(NamedTuple):
    """An adapter of a row: where it lies, and how much it counts."""

    slot: int
    scale: float


class RowUses(NamedTuple):
    """Slots and scales [B, K] on the device, the scales in fp32."""

    slots: Tensor
    scales: Tensor


@table_cache(64)
def _row_uses(rows: tuple[tuple[SlotUse, ...], ...], device: torch.device) -> RowUses:
    longest = max(map(len, rows))
    padded = [[*uses, *[SlotUse(EMPTY_SLOT, 0.0)] * (longest - len(uses))] for uses in rows]
    # Tensors made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        slots = uploaded([[use.slot for use in uses] for uses in padded], device, dtype=torch.long)
        return RowUses(slots, uploaded([[use.scale for use in uses] for uses in padded], device))


class AdapterRows:
    """Which adapters the rows of the present forward have; all layers of a replica's transformers look here."""

    def __init__(self) -> None:
        self.uses: RowUses | None = None

    @contextmanager
    def using(self, rows: Sequence[Sequence[SlotUse]], device: torch.device) -> Iterator[None]:
        """Run forwards of these rows inside the `with` block. Where no row has an adapter, nothing is added."""
        if not any(rows):
            yield
            return
        with self._having(_row_uses(tuple(map(tuple, rows)), device)):
            yield

    @contextmanager
    def only(self, rows: Sequence[int]) -> Iterator[None]:
        """Inside the `with` block the batch has these rows alone, in this order."""
        if self.uses is None:
            yield
            return
        index = row_index(rows, self.uses.slots.device)
        with self._having(RowUses(self.uses.slots[index], self.uses.scales[index])):
            yield

    @contextmanager
    def _having(self, uses: RowUses) -> Iterator[None]:
        before, self.uses = self.uses, uses
        try:
            yield
        finally:
            self.uses = before

    def of(self, num_rows: int) -> RowUses | None:
        """For a tensor of so many rows: those of the batch, or several times all of them, one after the other."""
        if self.uses is None:
            return None
        slots, scales = self.uses
        times, rest = divmod(num_rows, slots.shape[0])
        assert rest == 0, f"a layer got {num_rows} rows of a batch of {slots.shape[0]}"
        return self.uses if times == 1 else RowUses(slots.repeat(times, 1), scales.repeat(times, 1))


class LayerUpdate(NamedTuple):
    """What an adapter adds to one layer of this rank: down [R, I], up [R, O] (transposed), bias [O] or None."""

    down: Tensor
    up: Tensor
    bias: Tensor | None = None


class SlotTable:
    """The adapters of one layer: down [N, R, I], up [N, R, O], bias [N, O] where any has one."""

    def __init__(self, layer: nn.Linear, rows: AdapterRows, num_slots: int, *, device: torch.device) -> None:
        dtype = computing_dtype(layer)
        self.rows = rows
        self.down = torch.zeros(num_slots, 0, layer.in_features, dtype=dtype, device=device)
        self.up = torch.zeros(num_slots, 0, layer.out_features, dtype=dtype, device=device)
        self.bias: Tensor | None = None
        shard = _weight_shard(layer)
        # Of a layer whose ranks hold inputs, what each adds to the outputs is summed up.
        self._adds_bias = shard is None or shard.dim == 0 or shard.axis.rank == 0

    @property
    def nbytes(self) -> int:
        """Of the table on the device."""
        return self.down.nbytes + self.up.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def put(self, slot: int, update: LayerUpdate | None) -> None:
        """The slot holds this update from now on, or nothing."""
        assert slot != EMPTY_SLOT, "it stays empty"
        self._make_room(slot, 0 if update is None else update.down.shape[0])
        for table in (self.down, self.up, self.bias):
            if table is not None:
                table[slot].zero_()
        if update is None:
            return
        rank = update.down.shape[0]
        self.down[slot, :rank] = update.down
        self.up[slot, :rank] = update.up
        if update.bias is not None and self._adds_bias:
            if self.bias is None:
                self.bias = self.up.new_zeros(self.up.shape[0], self.up.shape[2])
            self.bias[slot] = update.bias

    def _make_room(self, slot: int, rank: int) -> None:
        num_slots, held = self.down.shape[:2]
        if slot >= num_slots or rank > held:
            size = (max(num_slots, slot + 1), max(held, -(-rank // _RANK_STEP) * _RANK_STEP))
            self.down, self.up = _grown(self.down, size), _grown(self.up, size)
            if self.bias is not None:
                self.bias = _grown(self.bias, size[:1])

    def add(self, outputs: Tensor, *inputs: Tensor) -> Tensor:
        """outputs [B, ..., O] of the layer for inputs [B, ..., I], and what each row's adapters add, in place. The
        inputs may lie in several tensors that would stand side by side."""
        uses = self.rows.of(outputs.shape[0])
        if uses is None:
            return outputs
        sums, *parts = (t.unsqueeze(1) if t.ndim == 2 else t.flatten(1, -2) for t in (outputs, *inputs))
        down, up = self.down[uses.slots].flatten(1, 2), self.up[uses.slots].flatten(1, 2)  # [B, K·R, I or O]
        counts = uses.scales.repeat_interleave(self.down.shape[1], dim=1).unsqueeze(1).to(sums.dtype)
        of_parts = down.split([part.shape[-1] for part in parts], dim=-1)
        inner = torch.bmm(parts[0], of_parts[0].transpose(1, 2))  # [B, ..., K·R]
        for part, own in zip(parts[1:], of_parts[1:], strict=True):
            inner.baddbmm_(part, own.transpose(1, 2))
        sums.baddbmm_(inner * counts, up)
        if self.bias is not None:
            added = (uses.scales.unsqueeze(-1) * self.bias[uses.slots]).sum(1)
            sums += added.unsqueeze(1).to(sums.dtype)
        return sums.view(outputs.shape)


def _grown(table: Tensor, size: tuple[int, ...]) -> Tensor:
    """With more slots, and ranks where it has them; what it held stays."""
    grown = table.new_zeros(*size, *table.shape[len(size) :])
    grown[tuple(slice(held) for held in table.shape[: len(size)])] = table
    return grown


def update_of(layer: nn.Linear, down: Tensor, up: Tensor, bias: Tensor | None) -> LayerUpdate:
    """A whole layer's update, down [R, I], up [O, R], bias [O], cut to what this rank's layer holds, in the weight's
    dtype. The bias is cut as the layer's own."""
    shard = _weight_shard(layer)
    if shard is not None and shard.dim == 0:
        up = shard.cut(up)
        bias = None if bias is None else shard.cut(bias)
    elif shard is not None:
        down = shard.cut(down)
    dtype = computing_dtype(layer)
    return LayerUpdate(
        down.to(dtype).contiguous(), up.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)
    )


def _weight_shard(layer: nn.Linear) -> Shard | None:
    shard = layer.shards().get("weight") if isinstance(layer, Sharded) else None
    return None if shard is None or shard.axis.size == 1 else shard
