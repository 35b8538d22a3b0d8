"""Collectives over one axis of the replica; each is the identity on an axis of one rank.

Tensors only, never objects: those would be pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis


def all_reduce(tensor: Tensor, axis: ProcessAxis) -> Tensor:
    """Sum over the axis, in place and returned; the shape stays."""
    if axis.size > 1:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


class Sum:
    """The sum over the axis, on its way into the tensor's own place, which nobody touches meanwhile."""

    def __init__(self, tensor: Tensor, axis: ProcessAxis) -> None:
        self._work = dist.all_reduce(tensor, group=axis.group, async_op=True) if axis.size > 1 else None

    def wait(self) -> None:
        """Until it is there; on a GPU, for what is computed next."""
        if self._work is not None:
            self._work.wait()


def least(value: int, axis: ProcessAxis) -> int:
    """The smallest of the ranks' numbers, on every rank."""
    if axis.size == 1:
        return value
    held = torch.tensor([value], dtype=torch.int64, device="cpu")
    dist.all_reduce(held, op=dist.ReduceOp.MIN, group=axis.group)
    return int(held)


def handed_on(data: bytes, axis: ProcessAxis) -> bytes:
    """What the axis' first rank has, on every rank; what the others give is not read. A rank that joined nobody, whose
    axis only says where it would be, keeps its own."""
    if axis.size == 1 or axis.group is None:
        return data
    length = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
    dist.broadcast(length, group_src=0, group=axis.group)
    if axis.rank:
        data = bytes(int(length))
    if not data:
        return data
    held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(held, group_src=0, group=axis.group)
    return held.numpy().tobytes()


def all_gather(tensor: Tensor, axis: ProcessAxis, *, dim: int) -> Tensor:
    """Equal shares side by side along `dim`, in the order of the ranks."""
    if axis.size == 1:
        return tensor
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(gathered, tensor, group=axis.group)
    return torch.cat(gathered, dim=dim)


def all_gather_uneven(tensor: Tensor, sizes: Sequence[int], axis: ProcessAxis, *, dim: int) -> Tensor:
    """Shares of these sizes side by side along `dim`, in the order of the ranks; in all else they agree."""
    if len(set(sizes)) == 1:
        return all_gather(tensor, axis, dim=dim)
    # Not every backend gathers unequal shapes, so what travels is as long as the largest share.
    shape = list(tensor.shape)
    shape[dim] = max(sizes)
    sent = tensor.new_empty(shape)
    sent.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    gathered = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(gathered, sent, group=axis.group)
    return torch.cat([share.narrow(dim, 0, size) for share, size in zip(gathered, sizes, strict=True)], dim=dim)


class AllToAll:
    """Part u of each row [B, U, ...] on its way to rank u of U; row by row, so that what comes has no gaps."""

    def __init__(self, parts: Tensor, axis: ProcessAxis) -> None:
        self._parts, self._received = parts, torch.empty_like(parts)
        self._work = [
            dist.all_to_all_single(received, sent, group=axis.group, async_op=True)
            for received, sent in zip(self._received, parts, strict=True)
        ]

    def wait(self) -> Tensor:
        """[B, U, ...]: the parts that came, by sender."""
        for work in self._work:
            if work is not None:
                work.wait()
        return self._received


class Exchange:
    """Tensors to and from other ranks of an axis, all under way at once; they stay as they are until `wait`.

    Both sides add the tensors between them in the same order. Each is contiguous.
    """

    def __init__(self, axis: ProcessAxis) -> None:
        assert axis.group is not None, "an exchange has several ranks"
        self._group = axis.group
        self._operations: list[dist.P2POp] = []
        self._work: Sequence[dist.Work] = ()

    def send(self, tensor: Tensor, rank: int) -> None:
        """To this rank of the axis."""
        self._add(dist.isend, tensor, rank)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """In place, from this rank of the axis."""
        self._add(dist.irecv, tensor, rank)

    def _add(self, operation: Callable[..., Any], tensor: Tensor, rank: int) -> None:
        peer = dist.get_global_rank(self._group, rank)
        self._operations.append(dist.P2POp(operation, tensor, peer, group=self._group))

    def start(self) -> None:
        """Begin with all of them."""
        self._work = dist.batch_isend_irecv(self._operations)

    def wait(self) -> None:
        """Until what was received is there; on a GPU, for what is computed next."""
        for work in self._work:
            work.wait()
        self._operations, self._work = [], ()
