"""Sequence layouts: who holds which tokens, and how they are exchanged around the attention kernel.

Shapes: B batch, S tokens of the whole sequence, H heads, E head_dim, P ranks that share the sequence.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SequenceLayout(Protocol):
    """Trades tokens for heads before the kernel and back after it."""

    def scatter_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [B, S/P, H, E] -> three times [B, S, H/P, E]."""
        ...

    def gather_heads(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H/P, E] -> [B, S/P, H, E]."""
        ...


class LocalSequence:
    """This rank holds every token: nothing to exchange."""

    def scatter_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value

    def gather_heads(self, hidden_states: Tensor) -> Tensor:
        return hidden_states
