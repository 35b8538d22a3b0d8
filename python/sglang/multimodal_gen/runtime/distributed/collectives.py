"""Collectives over one axis of the replica; each is the identity on an axis of one rank."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis


def all_reduce(tensor: Tensor, axis: ProcessAxis) -> Tensor:
    """Sum over the axis, in place and returned; the shape stays."""
    if axis.size > 1:
        dist.all_reduce(tensor, group=axis.group)
    return tensor
