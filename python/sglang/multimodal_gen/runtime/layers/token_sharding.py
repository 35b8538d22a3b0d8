"""Tokens dealt to the ranks of a replica: who holds which, in what order attention sees them, and back.

A sequence is made of segments, such as text and image; each is cut into equal shares, with padding behind the last
token. A rank holds its share of each segment, one behind the other. Around attention the shares of several ranks stand
side by side, so the tokens are in another order than in the whole sequence, and padding is between them: keys and
values leave it out.

Shapes: B batch, S tokens of a segment, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.collectives import all_gather
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache


class TokenSharding:
    """How the present forward's tokens are dealt. Models say of which segments their sequence is made (`begin`), and
    deal and gather; attention layers read it. On an axis of one rank nothing happens."""

    def __init__(self, axis: ProcessAxis = ALONE) -> None:
        self.axis = axis
        self.lengths: tuple[int, ...] = ()

    def begin(self, *lengths: int) -> None:
        """From here on attention is over segments of these lengths, in this order."""
        self.lengths = lengths

    def share(self, length: int) -> int:
        """Tokens of such a segment that each rank holds, padding included."""
        return -(-length // self.axis.size)

    def deal(self, tokens: Tensor, *, dim: int = 1) -> Tensor:
        """This rank's share of one segment along `dim`: [B, S, ...] -> [B, S/P, ...], zeros where there is no token."""
        if self.axis.size == 1:
            return tokens
        length = tokens.shape[dim]
        share = self.share(length)
        start = min(self.axis.rank * share, length)
        held = tokens.narrow(dim, start, min(share, length - start))
        missing = share - held.shape[dim]
        if not missing:
            return held.contiguous()
        return F.pad(held, [0, 0] * (tokens.ndim - 1 - dim % tokens.ndim) + [0, missing])

    def deal_joined(self, values: Tensor) -> Tensor:
        """What belongs to the tokens of all segments, [B, sum of lengths, ...], such as a rotary table."""
        if self.axis.size == 1:
            return values
        return torch.cat([self.deal(part) for part in values.split(self.lengths, dim=1)], dim=1)

    def deal_groups(self, values: Tensor, length: int) -> Tensor:
        """One value for each of G equal runs of a segment's tokens, [B, G] -> one for each token of this rank, where
        the runs would be torn; one for all of them stays."""
        if self.axis.size == 1 or values.shape[1] == 1:
            return values
        return self.deal(values.repeat_interleave(length // values.shape[1], dim=1))

    def num_held(self, count: int, length: int) -> int:
        """How many of the first `count` tokens of a segment lie in this rank's share."""
        share = self.share(length)
        return min(max(count - self.axis.rank * share, 0), share)

    def gather(self, tokens: Tensor, length: int) -> Tensor:
        """The first `length` tokens of a segment on every rank: [B, S/P, ...] -> [B, length, ...]."""
        return all_gather(tokens, self.axis, dim=1)[:, :length]

    def order(self, ranks: Sequence[int], device: torch.device, *, num_held: int) -> tuple[Tensor | None, Tensor]:
        """Of the shares of these ranks side by side: where tokens stand, None where they stand in front without a gap;
        and which tokens of the whole sequence they are. Both [tokens], int64.

        `num_held` tokens of each rank take part: those of all segments, or of the first ones alone.
        """
        lengths = next(
            (
                self.lengths[:count]
                for count in range(len(self.lengths), 0, -1)
                if sum(map(self.share, self.lengths[:count])) == num_held
            ),
            None,
        )
        assert lengths is not None, f"{num_held} tokens are no share of segments of {self.lengths}"
        return _order(lengths, self.axis.size, tuple(ranks), device)


@table_cache(256)
def _order(
    lengths: tuple[int, ...], num_ranks: int, ranks: tuple[int, ...], device: torch.device
) -> tuple[Tensor | None, Tensor]:
    places: list[int] = []
    tokens: list[int] = []
    place = 0
    for rank in ranks:
        first = 0
        for length in lengths:
            share = -(-length // num_ranks)
            start = min(rank * share, length)
            held = min(share, length - start)
            places.extend(range(place, place + held))
            tokens.extend(range(first + start, first + start + held))
            place, first = place + share, first + length
    with torch.inference_mode(False):
        found = torch.tensor(tokens, dtype=torch.int64, device=device)
        if places == list(range(len(places))):
            return None, found
        return torch.tensor(places, dtype=torch.int64, device=device), found
