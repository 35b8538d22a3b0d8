"""The kernel of layers for which nobody asked for one: by shape from the table of choices, else the usual one.

Shapes: B batch, S query tokens, L key tokens, H heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor

from sglang.multimodal_gen.runtime.layers.attention.choice_table import AttentionShape, ChoiceTable
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel, LseKernel, MaskedKernel
from sglang.multimodal_gen.runtime.layers.attention.registry import load_kernel
from sglang.multimodal_gen.runtime.layers.attention.traits import LayerNeeds


class SeenShape(NamedTuple):
    """A call that the table does not know: batch, tokens as they were, and what the layer needs."""

    shape: AttentionShape
    batch_size: int
    num_queries: int
    num_keys: int
    needs: LayerNeeds
    usual: str


class ChoiceMemory:
    """The table of a worker, and with `notes_shapes` the calls of which it knows nothing, in order."""

    def __init__(self, table: ChoiceTable, *, notes_shapes: bool = False) -> None:
        self.table = table
        self.notes_shapes = notes_shapes
        self.seen: dict[tuple[AttentionShape, LayerNeeds], SeenShape] = {}

    def is_of_use(self, needs: LayerNeeds) -> bool:
        """Whether such a layer should ask it."""
        return self.notes_shapes or self.table.knows(needs.precision, needs.head_dim)


class TabledKernel:
    """A kernel that is another one for each shape. `admissible` says whether a kernel can serve the layer."""

    def __init__(
        self, usual: AttentionKernel, memory: ChoiceMemory, needs: LayerNeeds, admissible: Callable[[str], bool]
    ) -> None:
        self.usual = usual
        self.name = f"{usual.name}*"  # not a kernel's own, so that nobody who asked for that one shares a forward
        self._memory, self._needs, self._admissible = memory, needs, admissible
        self._chosen: dict[tuple[object, ...], AttentionKernel] = {}
        self._generation = memory.table.generation

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        """See `AttentionKernel`, and `MaskedKernel` for layers that need masks."""
        kernel = self.kernel_for(query, key, masked=mask is not None)
        if mask is None:
            return kernel(query, key, value, scale=scale)
        return cast(MaskedKernel, kernel)(query, key, value, scale=scale, mask=mask)

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """See `LseKernel`."""
        kernel = cast(LseKernel, self.kernel_for(query, key, masked=False))
        return kernel.with_lse(query, key, value, scale=scale)

    def kernel_for(self, query: Tensor, key: Tensor, *, masked: bool) -> AttentionKernel:
        """The one for [B, S, H, E] and [B, L, H, E]."""
        if self._generation != self._memory.table.generation:
            self._chosen.clear()
            self._generation = self._memory.table.generation
        place = (query.shape[1:], key.shape[1], query.dtype, masked)
        if place not in self._chosen:
            self._chosen[place] = self._choose(query, key, masked)
        return self._chosen[place]

    def _choose(self, query: Tensor, key: Tensor, masked: bool) -> AttentionKernel:
        shape = AttentionShape.of(query, key, masked=masked)
        names = self._memory.table.kernels_for(shape)
        if not names and self._memory.notes_shapes:
            seen = SeenShape(shape, query.shape[0], query.shape[1], key.shape[1], self._needs, self.usual.name)
            self._memory.seen.setdefault((shape, self._needs), seen)
        name = next((name for name in names if self._admissible(name)), None)
        return self.usual if name is None else load_kernel(name)
