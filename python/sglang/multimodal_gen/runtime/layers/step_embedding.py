"""What a forward is told of its step, and what modulation layers make of that.

Those layers are a large part of some transformers' weights, and a single vector passes them: a GPU takes its time to
read them, not to multiply. What they give depends on the step alone, so it can be computed for many steps of a request
in the time of one, and be given to each forward.

Shapes: B rows, T steps, D hidden_size, V numbers of a step in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StepEmbedding(NamedTuple):
    """The timestep embedding [B, D], and what layers make of it [B, N] in fp32 where that was computed before.

    For a run of blocks `widths` says how many of the N numbers are each block's.
    """

    temb: Tensor
    values: Tensor | None = None
    widths: tuple[int, ...] = ()

    def of_layer(self, layer: int) -> StepEmbedding:
        """What one block of a run is given."""
        if self.values is None:
            return self
        start = sum(self.widths[:layer])
        return StepEmbedding(self.temb, self.values[:, start : start + self.widths[layer]])

    def at(self, rows: slice | Tensor) -> StepEmbedding:
        """That of some rows."""
        return StepEmbedding(self.temb[rows], None if self.values is None else self.values[rows], self.widths)

    def divided(self, *layers: nn.Linear) -> tuple[StepEmbedding, ...]:
        """What each of a block's modulation layers is given."""
        if self.values is None:
            return tuple(self for _ in layers)
        parts = self.values.split([layer.out_features for layer in layers], dim=1)
        return tuple(StepEmbedding(self.temb, part) for part in parts)

    def through(self, layer: nn.Linear) -> Tensor:
        """A modulation layer's output [B, O] for the embedding behind SiLU."""
        return layer(F.silu(self.temb)) if self.values is None else self.values


class Modulated(Protocol):
    """A module whose forward depends on the step."""

    @property
    def step_width(self) -> int:
        """The length of what it makes of a step."""
        ...

    def step_values(self, temb: Tensor) -> Tensor:
        """[T, D] -> [T, step_width]."""
        ...


class StepTable:
    """Where what a transformer's parts make of a step stands in a row of V numbers, behind the embedding itself.

    Parts come in runs: blocks that are called one after another, or a layer alone; each is a `Modulated`.
    """

    def __init__(self, hidden_size: int, *runs: Iterable[nn.Module]) -> None:
        self._runs = [[cast(Modulated, part) for part in run] for run in runs]
        self._widths = [tuple(part.step_width for part in run) for run in self._runs]
        self._hidden_size = hidden_size
        self.width = hidden_size + sum(map(sum, self._widths))
        """V."""

    def rows(self, temb: Tensor) -> Tensor:
        """Embeddings [T, D] -> [T, V], fp32."""
        values = (part.step_values(temb) for run in self._runs for part in run)
        return torch.cat((temb, *values), dim=1).float()

    def embeddings(
        self, embedded: Tensor | None, embed: Callable[[], Tensor], dtype: torch.dtype
    ) -> tuple[StepEmbedding, ...]:
        """For each run what its parts are given: of `rows` [B, V], or without them of what `embed` gives, [B, D]."""
        if embedded is None:
            temb = embed()
            return tuple(StepEmbedding(temb) for _ in self._runs)
        temb = embedded[:, : self._hidden_size].to(dtype)
        bounds = accumulate(map(sum, self._widths), initial=self._hidden_size)
        return tuple(
            StepEmbedding(temb, embedded[:, start:stop], widths)
            for (start, stop), widths in zip(pairwise(bounds), self._widths, strict=True)
        )
