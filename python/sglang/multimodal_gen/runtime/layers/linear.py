"""Linear layers that know which slice of the weight this tensor-parallel rank holds.

Parameter names are those of `nn.Linear`, so a checkpoint's keys fit unchanged. Shapes: `...` any, I in_features,
O out_features, P ranks on the axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import Sum, all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.fused import linear_gelu
from sglang.multimodal_gen.runtime.layers.lora import SlotTable
from sglang.multimodal_gen.runtime.layers.quantization.products import (
    SCALE_NAME,
    Matrix,
    Quantization,
    computing_dtype,
    multiply,
)
from sglang.multimodal_gen.runtime.layers.shards import Shard

CHUNK_TOKENS = 2_048
"""Sums of at least twice as many tokens go over the ranks in chunks of at least so many."""
_MOST_CHUNKS = 4


class AdaptableLinear(nn.Linear):
    """A linear layer to which adapters may add; `adapters` is None as long as none does: [B, ..., I] -> [B, ..., O].

    With `quantization` the weight is in eight bits, and there is a parameter `weight_scale`, [O, 1] or [1, 1].
    """

    adapters: SlotTable | None = None
    quantization: Quantization | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.adapted(multiply(hidden_states, self.matrix, self.bias), hidden_states)

    @property
    def matrix(self) -> Matrix:
        """The weight as products take it; all of them go through here."""
        if self.quantization is None:
            return self.weight
        return self.quantization.matrix(self.weight, self.get_parameter(SCALE_NAME))

    def quantize(self, values: Tensor, scales: Tensor, quantization: Quantization) -> None:
        """Hold these, values [O, I] and scales of this rank, in place of the weight."""
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_parameter(SCALE_NAME, nn.Parameter(scales, requires_grad=False))
        self.quantization = quantization

    def adapted(self, outputs: Tensor, hidden_states: Tensor) -> Tensor:
        """The outputs for these inputs with what the rows' adapters add, in place."""
        return outputs if self.adapters is None else self.adapters.add(outputs, hidden_states)

    @property
    def is_adapted(self) -> bool:
        """Whether rows of the present forward have adapters for it."""
        return self.adapters is not None and self.adapters.rows.uses is not None

    @property
    def fuses_gelu(self) -> bool:
        """Whether inputs are quantised one by one, which can take their GELU on the way."""
        return self.quantization is not None and self.quantization.scales_inputs and not self.is_adapted

    def gelu(self, hidden_states: Tensor) -> Tensor:
        """Tanh-GELU of the outputs; in the product's epilogue where nothing has to be added before it."""
        return next(self.output_parts(hidden_states, 1, gelu=True))

    def output_parts(self, hidden_states: Tensor, count: int, *, gelu: bool) -> Iterator[Tensor]:
        """The outputs, or their tanh-GELU, as at most so many tensors that would stand side by side, each computed when
        it is asked for; as one where rows have adapters."""
        if self.is_adapted:
            outputs = self(hidden_states)
            yield F.gelu(outputs, approximate="tanh") if gelu else outputs
            return
        biases = [None] * count if self.bias is None else self.bias.chunk(count)
        matrices: Sequence[Matrix] = self.matrix.chunk(count)
        for matrix, bias in zip(matrices, biases, strict=True):
            yield linear_gelu(hidden_states, matrix, bias) if gelu else multiply(hidden_states, matrix, bias)


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
        return self.of_parts(hidden_states)

    def of_parts(self, *parts: Tensor, gelu_from: int | None = None) -> Tensor:
        """The same, of an input that lies in several tensors which would stand side by side: [..., I_k/P] each.

        `gelu_from`: of the tanh-GELU of those from this one on, for a layer that `fuses_gelu`.
        """
        assert gelu_from is None or self.fuses_gelu, "the caller has asked"
        # The first rank adds the bias, so that the sum has it once.
        bias = self.bias if self.axis.rank == 0 else None
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in (self.weight, *parts))
        matrix = self.matrix
        if trains or (self.axis.size == 1 and len(parts) == 1 and isinstance(matrix, Tensor)):
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            return all_reduce(self.adapted(multiply(whole, matrix, bias), whole), self.axis)
        inputs = [part.flatten(0, -2) for part in parts]
        output = inputs[0].new_empty(inputs[0].shape[0], self.out_features, dtype=computing_dtype(self))
        adapters = self.adapters if self.is_adapted else None
        in_chunks = self.axis.size > 1 and adapters is None
        num_chunks = max(1, min(_MOST_CHUNKS, len(output) // CHUNK_TOKENS)) if in_chunks else 1
        sums = []
        for chunk, *rows in zip(output.chunk(num_chunks), *(part.chunk(num_chunks) for part in inputs), strict=True):
            if isinstance(matrix, Tensor):
                _multiply(rows, matrix, bias, out=chunk)
            else:
                matrix.linear(*rows, bias=bias, gelu_from=gelu_from, out=chunk)
            if adapters is None:
                # While the ranks' sums of these tokens are on their way, those of the next are computed.
                sums.append(Sum(chunk, self.axis))
        for each in sums:
            each.wait()
        shaped = output.view(*parts[0].shape[:-1], -1)
        return shaped if adapters is None else all_reduce(adapters.add(shaped, *parts), self.axis)


def _multiply(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """Sum over k of [N, I_k] times the columns of [O, I] for it, plus the bias [O], into [N, O]."""
    for number, (part, own) in enumerate(
        zip(parts, weight.split([part.shape[-1] for part in parts], dim=1), strict=True)
    ):
        if number:
            out.addmm_(part, own.t())
        elif bias is None:
            torch.mm(part, own.t(), out=out)
        else:
            torch.addmm(bias, part, own.t(), out=out)
