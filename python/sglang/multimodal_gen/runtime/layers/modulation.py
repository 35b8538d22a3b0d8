"""AdaLN-zero: shift, scale and gate that the timestep embedding gives to each sub-layer. Source: arXiv:2212.09748."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Modulation(NamedTuple):
    """Three fp32 tensors [B, 1 or S, D]: one value per sample, or one per token."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, normed: Tensor) -> Tensor:
        """Scale and shift [B, S, D], in fp32."""
        return modulate(normed, self.shift, self.scale)

    def add_gated(self, residual: Tensor, update: Tensor) -> Tensor:
        """residual + gate · update, [B, S, D] each, summed in fp32 and returned in the residual's dtype."""
        return torch.addcmul(residual.float(), update.float(), self.gate).to(residual.dtype)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed · (1 + scale) + shift; [B, S, D] with shift and scale [B, 1 or S, D]."""
    return torch.addcmul(shift, normed.float(), 1 + scale)


def split_modulations(table: Tensor, temb: Tensor) -> tuple[Modulation, ...]:
    """The learnt table [1, 3·N, D] plus the embedding [B, 1 or S, 3·N, D] -> N modulations, in fp32."""
    parts = (table.float() + temb.float()).unbind(2)
    return tuple(Modulation(*parts[first : first + 3]) for first in range(0, len(parts), 3))
