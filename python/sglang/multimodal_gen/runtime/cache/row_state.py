"""What a step cache remembers of one row, a guidance branch of a request, from step to step.

Shapes: S image or video tokens of this rank, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowState:
    """After some steps: the watched signal, and of what the blocks add to the tokens the newest value and its
    differences from step to step, [S, D] each, so many as the order of the prediction.

    `computed_at` is the last step that was computed, `num_steps` counts the steps of this row, `num_skipped` those
    since the last one that was computed; `accumulated` is the change since then.
    """

    signal: Tensor
    factors: tuple[Tensor, ...]
    computed_at: int
    num_steps: int
    num_skipped: int = 0
    accumulated: float = 0.0

    def predicted(self, step: int) -> Tensor:
        """What the blocks would add at `step`, by Taylor's series over the differences. Source: arXiv:2503.06923."""
        ahead, first = step - self.computed_at, self.factors[0]
        if len(self.factors) == 1:
            return first
        total = first.float()
        for order, factor in enumerate(self.factors[1:], start=1):
            total = total + factor.float() * (ahead**order / math.factorial(order))
        return total.to(first.dtype)

    def state_dict(self) -> dict[str, Any]:
        """As a tree of tensors and numbers."""
        return {**vars(self), "factors": list(self.factors)}

    @classmethod
    def from_state_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `state_dict`."""
        return cls(**{**values, "factors": tuple(values["factors"])})


def differences(residual: Tensor, before: RowState | None, *, step: int, order: int) -> tuple[Tensor, ...]:
    """The factors after a computed step: its residual [S, D], and divided differences as far as there were any."""
    found = [residual]
    if before is not None:
        passed = step - before.computed_at
        for earlier in before.factors[:order]:
            found.append(((found[-1].float() - earlier.float()) / passed).to(residual.dtype))
    return tuple(found)


def num_bytes(state: RowState) -> int:
    """What it holds on the device."""
    tensors: list[torch.Tensor] = [state.signal, *state.factors]
    return sum(tensor.nbytes for tensor in tensors)
