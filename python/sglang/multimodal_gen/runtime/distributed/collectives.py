"""Collectives over one axis of the replica; each is the identity on an axis of one rank.

Tensors only, never objects: those would be pickled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis


def all_reduce(tensor: Tensor, axis: ProcessAxis) -> Tensor:
    """Sum over the axis, in place and returned; the shape stays."""
    if axis.size > 1:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def least(value: int, axis: ProcessAxis) -> int:
    """The smallest of the ranks' numbers, on every rank."""
    if axis.size == 1:
        return value
    held = torch.tensor([value], dtype=torch.int64, device="cpu")
    dist.all_reduce(held, op=dist.ReduceOp.MIN, group=axis.group)
    return int(held)


def all_gather(tensor: Tensor, axis: ProcessAxis, *, dim: int) -> Tensor:
    """Equal shares side by side along `dim`, in the order of the ranks."""
    if axis.size == 1:
        return tensor
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(gathered, tensor, group=axis.group)
    return torch.cat(gathered, dim=dim)


def all_to_all(parts: Tensor, axis: ProcessAxis) -> Tensor:
    """[P, ...] on each of P ranks: part i goes to rank i; returned are the parts that came, by sender."""
    if axis.size == 1:
        return parts
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=axis.group)
    return received


class RingExchange:
    """A tensor on its way to the next rank of a ring, while that of the rank before comes."""

    def __init__(self, tensor: Tensor, axis: ProcessAxis) -> None:
        assert axis.group is not None, "a ring has several ranks"
        self._sent = tensor.contiguous()
        self._received = torch.empty_like(self._sent)
        following, preceding = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        peers = [dist.get_global_rank(axis.group, peer) for peer in (following, preceding)]
        self._work: Sequence[dist.Work] = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, peers[0], group=axis.group),
                dist.P2POp(dist.irecv, self._received, peers[1], group=axis.group),
            ]
        )

    def wait(self) -> Tensor:
        """What the rank before sent."""
        for work in self._work:
            work.wait()
        return self._received
