"""Sequence layouts: who holds which tokens, and how they are exchanged around the attention kernel.

Shapes: B batch, S tokens of the whole sequence, L keys, H heads, E head_dim, P ranks that share the sequence, of them
U in a Ulysses group and R in a ring.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.collectives import RingExchange, all_gather, all_to_all
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext, ProcessAxis
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel, LseKernel, MaskedKernel
from sglang.multimodal_gen.runtime.layers.token_sharding import TokenSharding


class SequenceLayout(Protocol):
    """Computes attention with a kernel of one device, wherever the tokens are."""

    @property
    def needs_lse(self) -> bool:
        """Whether calls without a mask want a kernel that gives the log-sum-exp."""
        ...

    def attend(
        self, kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
    ) -> Tensor:
        """[B, S/P, H, E], [B, L/P, H, E] twice -> [B, S/P, H, E]. The mask [B or 1, 1, 1, L] is of all keys, in the
        order of the whole sequence."""
        ...


class LocalSequence:
    """This rank holds every token: nothing to exchange."""

    needs_lse = False

    def attend(
        self, kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
    ) -> Tensor:
        return _local(kernel, query, key, value, mask, scale)


class ShardedSequence:
    """Ulysses within a group: tokens are traded for heads, so that a rank has all tokens of the group and some heads.
    Between groups a ring: keys and values go round, and each part's result is merged by its log-sum-exp.

    Source: arXiv:2309.14509 (Ulysses), arXiv:2310.01889 (ring), arXiv:2405.07719 (both together).
    """

    def __init__(self, sharding: TokenSharding, parallel: ParallelContext) -> None:
        self.sharding = sharding
        self.ulysses, self.ring = parallel.ulysses, parallel.ring
        self.needs_lse = self.ring.size > 1

    def attend(
        self, kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float
    ) -> Tensor:
        num_held = key.shape[1]
        query, key, value = _scatter_heads((query, key, value), self.ulysses)
        if self.ring.size == 1:
            attended = self._with_keys(kernel, query, key, value, mask, scale, num_held)
        elif mask is not None:
            # Parts of a mask would leave queries without a key, whose log-sum-exp is none.
            key, value = (all_gather(part, self.ring, dim=1) for part in (key, value))
            attended = self._with_keys(kernel, query, key, value, mask, scale, num_held)
        else:
            attended = self._around_the_ring(cast(LseKernel, kernel), query, key, value, scale, num_held)
        return _gather_heads(attended, self.ulysses)

    def _with_keys(
        self,
        kernel: AttentionKernel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        num_held: int,
    ) -> Tensor:
        """Attention to the keys of all ranks, which are here: padding is left out, the mask put in their order."""
        places, tokens = self.sharding.order(range(self.sharding.axis.size), key.device, num_held=num_held)
        key, value = _picked(key, places, tokens), _picked(value, places, tokens)
        return _local(kernel, query, key, value, None if mask is None else mask[..., tokens], scale)

    def _around_the_ring(
        self, kernel: LseKernel, query: Tensor, key: Tensor, value: Tensor, scale: float, num_held: int
    ) -> Tensor:
        ring, block = self.ring, torch.stack((key, value))
        merged: tuple[Tensor, Tensor] | None = None
        for step in range(ring.size):
            coming = RingExchange(block, ring) if step + 1 < ring.size else None
            source = (ring.rank - step) % ring.size
            ranks = range(source * self.ulysses.size, (source + 1) * self.ulysses.size)
            places, tokens = self.sharding.order(ranks, block.device, num_held=num_held)
            if len(tokens):
                key, value = (_picked(part, places, tokens) for part in block)
                part = kernel.with_lse(query, key, value, scale=scale)
                merged = part if merged is None else _merged(*merged, *part)
            if coming is not None:
                block = coming.wait()
        assert merged is not None, "a sequence has a token"
        return merged[0].to(query.dtype)


def _local(
    kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    if mask is None:
        return kernel(query, key, value, scale=scale)
    return cast(MaskedKernel, kernel)(query, key, value, scale=scale, mask=mask)


def _picked(tensor: Tensor, places: Tensor | None, tokens: Tensor) -> Tensor:
    """The tokens of [B, L, H, E] without the padding between or behind them."""
    return tensor[:, : len(tokens)] if places is None else tensor.index_select(1, places)


def _scatter_heads(tensors: tuple[Tensor, ...], axis: ProcessAxis) -> tuple[Tensor, ...]:
    """Several times [B, s, H, E] on each of U ranks -> [B, U·s, H/U, E], in one exchange."""
    if axis.size == 1:
        return tensors
    # [n, B, s, U, H/U, E] -> [U, n, B, s, H/U, E]: a part for each rank, and then from each rank
    parts = torch.stack(tensors).unflatten(3, (axis.size, -1)).permute(3, 0, 1, 2, 4, 5)
    received = all_to_all(parts, axis)
    return received.permute(1, 2, 0, 3, 4, 5).flatten(2, 3).unbind(0)


def _gather_heads(tensor: Tensor, axis: ProcessAxis) -> Tensor:
    """[B, U·s, H/U, E] on each of U ranks -> [B, s, H, E]."""
    if axis.size == 1:
        return tensor
    received = all_to_all(tensor.unflatten(1, (axis.size, -1)).transpose(0, 1), axis)  # [U, B, s, H/U, E]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _merged(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys as one to both: results [B, S, H, E], log-sum-exps [B, H, S]; fp32."""
    lse = torch.logaddexp(first_lse, second_lse)
    weight, other = ((part - lse).exp().transpose(1, 2).unsqueeze(-1) for part in (first_lse, second_lse))
    return first.float() * weight + second.float() * other, lse
