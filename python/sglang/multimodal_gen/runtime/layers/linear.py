"""Linear layers that know which slice of the weight this tensor-parallel rank holds.

Parameter names are those of `nn.Linear`, so a checkpoint's keys fit unchanged. Shapes: `...` any, I in_features,
O out_features, P ranks on the axis.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.fused import linear_gelu
from sglang.multimodal_gen.runtime.layers.lora import SlotTable
from sglang.multimodal_gen.runtime.layers.shards import Shard


class AdaptableLinear(nn.Linear):
    """A linear layer to which adapters may add; `adapters` is None as long as none does: [B, ..., I] -> [B, ..., O]."""

    adapters: SlotTable | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.adapted(F.linear(hidden_states, self.weight, self.bias), hidden_states)

    def adapted(self, outputs: Tensor, hidden_states: Tensor) -> Tensor:
        """The outputs for these inputs with what the rows' adapters add, in place."""
        return outputs if self.adapters is None else self.adapters.add(outputs, hidden_states)

    def gelu(self, hidden_states: Tensor) -> Tensor:
        """Tanh-GELU of the outputs; in the product's epilogue where nothing has to be added before it."""
        if self.adapters is not None and self.adapters.rows.uses is not None:
            return F.gelu(self(hidden_states), approximate="tanh")
        return linear_gelu(hidden_states, self.weight, self.bias)


class ReplicatedLinear(AdaptableLinear):
    """The whole weight on every rank: [..., I] -> [..., O]."""


class ColumnParallelLinear(AdaptableLinear):
    """Each rank computes its own output features: [..., I] -> [..., O/P]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, axis: ProcessAxis = ALONE) -> None:
        super().__init__(in_features, axis.share(out_features, "output features"), bias=bias)
        self.axis = axis

    def shards(self) -> dict[str, Shard]:
        """See Sharded."""
        shard = Shard(dim=0, blocks=(self.out_features * self.axis.size,), axis=self.axis)
        return {"weight": shard} if self.bias is None else {"weight": shard, "bias": shard}


class RowParallelLinear(AdaptableLinear):
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
            return super().forward(hidden_states)
        partial = all_reduce(self.adapted(F.linear(hidden_states, self.weight), hidden_states), self.axis)
        return partial if self.bias is None else partial + self.bias
