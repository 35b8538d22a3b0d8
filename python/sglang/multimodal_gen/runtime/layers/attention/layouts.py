"""Sequence layouts: who holds which tokens, and how they are exchanged around the attention kernel.

Shapes: B batch, S tokens of the whole sequence, L keys, H heads, E head_dim, P ranks that share the sequence, of them
U in a Ulysses group and R in a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.collectives import AllToAll, Exchange, all_gather
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext, ProcessAxis
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel, LseKernel, MaskedKernel
from sglang.multimodal_gen.runtime.layers.token_sharding import TokenSharding


class HeadExchange:
    """A tensor on its way from "some tokens, all heads" to "all tokens of the group, some heads"."""

    def __init__(self, tensor: Tensor, axis: ProcessAxis) -> None:
        """[B, s, H, E] on each of U ranks."""
        parts = tensor.unflatten(2, (axis.size, -1)).transpose(1, 2).contiguous()  # [B, U, s, H/U, E]
        self._exchange = AllToAll(parts, axis)

    def result(self) -> Tensor:
        """[B, U·s, H/U, E]."""
        return self._exchange.wait().flatten(1, 2)


class PackedExchange:
    """Queries, keys and values on that way together."""

    def __init__(self, packed: Tensor, axis: ProcessAxis) -> None:
        """[B, s, 3, H, E] on each of U ranks."""
        parts = packed.unflatten(3, (axis.size, -1)).permute(0, 3, 1, 2, 4, 5).contiguous()  # [B, U, s, 3, H/U, E]
        self._exchange = AllToAll(parts, axis)
        self._received: Tensor | None = None

    def received(self, part: int) -> Tensor:
        """[B, U·s, H/U, E], a view; 0 are the queries, 1 the keys, 2 the values."""
        if self._received is None:
            self._received = self._exchange.wait().flatten(1, 2)
        return self._received[:, :, part]


@dataclass(frozen=True)
class PackedPart:
    """One of the three."""

    exchange: PackedExchange
    part: int

    def result(self) -> Tensor:
        """[B, U·s, H/U, E]."""
        return self.exchange.received(self.part)


class TokenExchange:
    """What attention gives, on its way from "all tokens of the group, some heads" to "some tokens, all heads"."""

    def __init__(self, tensor: Tensor, axis: ProcessAxis) -> None:
        """[B, U·s, H/U, E] on each of U ranks."""
        self._exchange = AllToAll(tensor.contiguous().unflatten(1, (axis.size, -1)), axis)  # [B, U, s, H/U, E]

    def result(self) -> Tensor:
        """[B, s, H, E]."""
        return self._exchange.wait().transpose(1, 2).flatten(2, 3)


Sent = Tensor | HeadExchange | PackedPart
"""What attention is given: a tensor, or one that is under way."""


class SequenceLayout(Protocol):
    """Computes attention with a kernel of one device, wherever the tokens are."""

    @property
    def needs_lse(self) -> bool:
        """Whether calls without a mask want a kernel that gives the log-sum-exp."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether `send` begins something that takes its time."""
        ...

    def send(self, tensor: Tensor) -> Sent:
        """Begin to bring queries, keys or values [B, S/P, H, E] to where they are needed, while others are computed."""
        ...

    def send_packed(self, packed: Tensor) -> tuple[Sent, Sent, Sent]:
        """The same for queries, keys and values [B, S/P, 3, H, E] at once, of a layout that `overlaps`."""
        ...

    def attend(
        self, kernel: AttentionKernel, query: Sent, key: Sent, value: Sent, mask: Tensor | None, *, scale: float
    ) -> Tensor | TokenExchange:
        """[B, S/P, H, E], [B, L/P, H, E] twice, each as it was sent -> [B, S/P, H, E], maybe still under way. The mask
        [B or 1, 1, 1, L] is of all keys, in the order of the whole sequence."""
        ...


class LocalSequence:
    """This rank holds every token: nothing to exchange."""

    needs_lse = False
    overlaps = False

    def send(self, tensor: Tensor) -> Sent:
        return tensor

    def send_packed(self, packed: Tensor) -> tuple[Sent, Sent, Sent]:
        raise AssertionError("what stays here is not packed")

    def attend(
        self, kernel: AttentionKernel, query: Sent, key: Sent, value: Sent, mask: Tensor | None, *, scale: float
    ) -> Tensor:
        return _local(kernel, arrived(query), arrived(key), arrived(value), mask, scale)


class ShardedSequence:
    """Ulysses within a group: tokens are traded for heads, so that a rank has all tokens of the group and some heads.
    Between groups a ring: keys and values go round, and each part's result is merged by its log-sum-exp.

    Source: arXiv:2309.14509 (Ulysses), arXiv:2310.01889 (ring), arXiv:2405.07719 (both together).
    """

    def __init__(self, sharding: TokenSharding, parallel: ParallelContext) -> None:
        self.sharding = sharding
        self.ulysses, self.ring = parallel.ulysses, parallel.ring
        self.needs_lse = self.ring.size > 1
        self.overlaps = self.ulysses.size > 1

    def send(self, tensor: Tensor) -> Sent:
        return tensor if self.ulysses.size == 1 else HeadExchange(tensor, self.ulysses)

    def send_packed(self, packed: Tensor) -> tuple[Sent, Sent, Sent]:
        exchange = PackedExchange(packed, self.ulysses)
        return PackedPart(exchange, 0), PackedPart(exchange, 1), PackedPart(exchange, 2)

    def attend(
        self, kernel: AttentionKernel, query: Sent, key: Sent, value: Sent, mask: Tensor | None, *, scale: float
    ) -> Tensor | TokenExchange:
        query, key, value = arrived(query), arrived(key), arrived(value)
        num_held = key.shape[1] // self.ulysses.size
        if self.ring.size == 1:
            attended = self._with_keys(kernel, query, key, value, mask, scale, num_held)
        elif mask is not None:
            # Parts of a mask would leave queries without a key, whose log-sum-exp is none.
            key, value = (all_gather(part, self.ring, dim=1) for part in (key, value))
            attended = self._with_keys(kernel, query, key, value, mask, scale, num_held)
        else:
            attended = self._around_the_ring(cast(LseKernel, kernel), query, key, value, scale, num_held)
        return attended if self.ulysses.size == 1 else TokenExchange(attended, self.ulysses)

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
        ring, held = self.ring, (key.contiguous(), value.contiguous())
        merged: tuple[Tensor, Tensor] | None = None
        for step in range(ring.size):
            coming = _passed_on(held, ring) if step + 1 < ring.size else None
            source = (ring.rank - step) % ring.size
            ranks = range(source * self.ulysses.size, (source + 1) * self.ulysses.size)
            places, tokens = self.sharding.order(ranks, query.device, num_held=num_held)
            if len(tokens):
                part = kernel.with_lse(query, *(_picked(each, places, tokens) for each in held), scale=scale)
                merged = part if merged is None else _merged(*merged, *part)
            if coming is not None:
                exchange, held = coming
                exchange.wait()
        assert merged is not None, "a sequence has a token"
        return merged[0].to(query.dtype)


def _passed_on(held: tuple[Tensor, Tensor], axis: ProcessAxis) -> tuple[Exchange, tuple[Tensor, Tensor]]:
    """Send to the next rank of the ring what this one holds, and begin to receive what the one before holds."""
    coming, exchange = (torch.empty_like(held[0]), torch.empty_like(held[1])), Exchange(axis)
    for ours, theirs in zip(held, coming, strict=True):
        exchange.send(ours, (axis.rank + 1) % axis.size)
        exchange.receive(theirs, (axis.rank - 1) % axis.size)
    exchange.start()
    return exchange, coming


def _local(
    kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    if mask is None:
        return kernel(query, key, value, scale=scale)
    return cast(MaskedKernel, kernel)(query, key, value, scale=scale, mask=mask)


def _picked(tensor: Tensor, places: Tensor | None, tokens: Tensor) -> Tensor:
    """The tokens of [B, L, H, E] without the padding between or behind them."""
    return tensor[:, : len(tokens)] if places is None else tensor.index_select(1, places)


def arrived(sent: Sent | TokenExchange) -> Tensor:
    """What was under way."""
    return sent if isinstance(sent, Tensor) else sent.result()


def _merged(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys as one to both: results [B, S, H, E], log-sum-exps [B, H, S] in fp32.

    Weights and sums are fp32, as are the results from here on; half-precision results are read as they are.
    """
    weight = torch.sigmoid(second_lse - first_lse).transpose(1, 2).unsqueeze(-1)
    return torch.addcmul(first * (1 - weight), second, weight), torch.logaddexp(first_lse, second_lse)
