"""Normalisation layers. They compute in fp32 and return the dtype that came in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.shards import Shard


class FP32LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, in fp32 whatever the dtype of input and weights."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, *, elementwise_affine: bool = True) -> None:
        super().__init__(hidden_size, eps, elementwise_affine)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        normed = F.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(hidden_states.dtype)


def rms_normed(hidden_states: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm without a weight: [..., D] -> [..., D] in fp32."""
    return F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=eps)


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

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., D/P] -> [..., D/P] on each of P ranks, times `scale` where given, [B, 1, D/P] for one per sample."""
        if self.axis.size > 1:
            wide = hidden_states.float()
            square_sum = all_reduce(wide.square().sum(-1, keepdim=True), self.axis)
            normed = wide * torch.rsqrt(square_sum / self.hidden_size + self.eps)
            return (normed * self._weight(scale)).to(hidden_states.dtype)
        if scale is None:
            # The fused kernel accumulates in fp32 for half-precision input.
            weight = self.weight.to(hidden_states.dtype)
            return F.rms_norm(hidden_states, weight.shape, weight, self.eps).to(hidden_states.dtype)
        normed = F.rms_norm(hidden_states, self.weight.shape, None, self.eps)
        return normed * self._weight(scale).to(normed.dtype)

    def add_normed(self, residual: Tensor, update: Tensor, gate: Tensor | None = None) -> Tensor:
        """residual + gate · norm(update), [B, S, D] each; the gate [B, 1, D] is one where there is none."""
        assert self.axis.size == 1, "the residual stream is whole on every rank"
        normed = F.rms_norm(update, self.weight.shape, None, self.eps)
        return torch.addcmul(residual, normed, self._weight(gate).to(residual.dtype))

    def _weight(self, scale: Tensor | None) -> Tensor:
        """Weight and scale as one factor, in the precision of the scale."""
        return self.weight if scale is None else self.weight * scale
