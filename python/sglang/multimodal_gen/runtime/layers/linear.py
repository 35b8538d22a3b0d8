"""Linear layers that know which slice of the weight this tensor-parallel rank holds.

Parameter names are those of `nn.Linear`, so a checkpoint's keys fit unchanged. Shapes: `...` any, I in_features,
O out_features, P ranks on the axis.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.shards import Shard


class ReplicatedLinear(nn.Linear):
    """The whole weight on every rank: [..., I] -> [..., O]."""


class ColumnParallelLinear(nn.Linear):
    """Each rank computes its own output features: [..., I] -> [..., O/P]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, axis: ProcessAxis = ALONE) -> None:
        super().__init__(in_features, axis.share(out_features, "output features"), bias=bias)
        self.axis = axis

    def shards(self) -> dict[str, Shard]:
        """See Sharded."""
        shard = Shard(dim=0, blocks=(self.out_features * self.axis.size,), axis=self.axis)
        return {"weight": shard} if self.bias is None else {"weight": shard, "bias": shard}


class RowParallelLinear(nn.Linear):
    """Each rank holds its own input features and the sum is reduced: [..., I/P] -> [..., O]. The bias is whole.

    `blocks`: the input is several parts side by side, of these widths, each of them split over the ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        axis: ProcessAxis = ALONE,
        blocks: tuple[int, ...] | None = None,
    ) -> None:
        self.blocks = (in_features,) if blocks is None else blocks
        assert sum(self.blocks) == in_features, "the blocks are the input"
        share = sum(axis.share(width, "input features") for width in self.blocks)
        super().__init__(share, out_features, bias=bias)
        self.axis = axis

    def shards(self) -> dict[str, Shard]:
        """See Sharded."""
        return {"weight": Shard(dim=1, blocks=self.blocks, axis=self.axis)}

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.linear(hidden_states, self.weight, self.bias)
        partial = all_reduce(F.linear(hidden_states, self.weight), self.axis)
        return partial if self.bias is None else partial + self.bias
