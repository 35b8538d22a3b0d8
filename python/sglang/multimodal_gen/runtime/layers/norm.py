"""Normalisation layers. They compute in fp32 and return the dtype that came in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.fused import gated_sum, sum_norm
from sglang.multimodal_gen.runtime.layers.shards import Shard


class FP32LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, in fp32 whatever the dtype of input and weights."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, *, elementwise_affine: bool = True) -> None:
        super().__init__(hidden_size, eps, elementwise_affine)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.ndim == 3:
            return sum_norm(hidden_states, scale=self.weight, shift=self.bias, one_plus=False, eps=self.eps)[1]
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        normed = F.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(hidden_states.dtype)

    def of_sum(self, residual: Tensor, update: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """residual + gate · update, [B, S, D] each, and the norm of that."""
        return sum_norm(residual, update, gate, scale=self.weight, shift=self.bias, one_plus=False, eps=self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a weight; the mean runs over all ranks of the axis."""

    def __init__(self, hidden_size: int, eps: float, *, axis: ProcessAxis = ALONE) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(axis.share(hidden_size, "normalised features")))

    def shards(self) -> dict[str, Shard]:
        """See Sharded."""
        return {"weight": Shard(dim=0, blocks=(self.hidden_size,), axis=self.axis)}

    def forward(self, hidden_states: Tensor, factor: Tensor | None = None) -> Tensor:
        """[..., D/P] -> [..., D/P] on each of P ranks. A `factor` stands in place of the weight: what modulation makes
        of it, [B, 1, D/P] for one per sample."""
        if self.axis.size > 1:
            wide = hidden_states.float()
            square_sum = all_reduce(wide.square().sum(-1, keepdim=True), self.axis)
            normed = wide * torch.rsqrt(square_sum / self.hidden_size + self.eps)
            return (normed * self._factor(factor)).to(hidden_states.dtype)
        if factor is None:
            # The fused kernel accumulates in fp32 for half-precision input.
            weight = self.weight.to(hidden_states.dtype)
            return F.rms_norm(hidden_states, weight.shape, weight, self.eps).to(hidden_states.dtype)
        return sum_norm(hidden_states, scale=factor, one_plus=False, rms=True, eps=self.eps)[1]

    def add_normed(self, residual: Tensor, update: Tensor, factor: Tensor | None = None) -> Tensor:
        """residual + norm(update), [B, S, D] each; the factor as in `forward`."""
        assert self.axis.size == 1, "the residual stream is whole on every rank"
        return gated_sum(residual, update, self._factor(factor), norm_update=True, eps=self.eps)

    def add_normed_and_norm(
        self, residual: Tensor, update: Tensor, factor: Tensor | None, then: RMSNorm, then_factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`add_normed`, and the norm of that by another norm of this eps, with a factor of its own."""
        assert self.axis.size == 1 and then.eps == self.eps, "the residual stream is whole on every rank"
        return sum_norm(
            residual,
            update,
            self._factor(factor),
            scale=then._factor(then_factor),
            one_plus=False,
            rms=True,
            norm_update=True,
            eps=self.eps,
        )

    def _factor(self, factor: Tensor | None) -> Tensor:
        return self.weight if factor is None else factor
