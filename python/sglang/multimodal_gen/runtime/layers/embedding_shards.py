"""Tables of which each rank holds a part. Parameter names are those of `nn.Embedding`.

Shapes: `...` any, V rows of the whole table, D its width, P ranks on the axis.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.shards import Shard


class VocabParallelEmbedding(nn.Embedding):
    """Each rank holds V/P rows: ids [...] -> [..., D] on every rank, with the bits of the whole table."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, axis: ProcessAxis = ALONE) -> None:
        super().__init__(axis.share(num_embeddings, "words"), embedding_dim)
        self.axis = axis

    def shards(self) -> dict[str, Shard]:
        """See Sharded."""
        return {"weight": Shard(dim=0, blocks=(self.num_embeddings * self.axis.size,), axis=self.axis)}

    def forward(self, input: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.embedding(input, self.weight)
        rows = input - self.axis.rank * self.num_embeddings
        elsewhere = (rows < 0) | (rows >= self.num_embeddings)
        found = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        # One rank's row and zeros: their sum rounds nothing.
        return all_reduce(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.axis)


class ColumnParallelEmbedding(nn.Embedding):
    """Each rank looks up its own columns, such as one for each attention head: ids [...] -> [..., D/P]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, axis: ProcessAxis = ALONE) -> None:
        super().__init__(num_embeddings, axis.share(embedding_dim, "columns"))
        self.axis = axis

    def shards(self) -> dict[str, Shard]:
        """See Sharded."""
        return {"weight": Shard(dim=1, blocks=(self.embedding_dim * self.axis.size,), axis=self.axis)}
