"""Normalisation layers. They compute in fp32 and return the dtype that came in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.collectives import all_reduce
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis


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

    shard_dim = 0

    def __init__(self, hidden_size: int, eps: float, *, axis: ProcessAxis = ALONE) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(axis.share(hidden_size, "normalised features")))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D/P] -> [..., D/P] on each of P ranks."""
        weight = self.weight.to(hidden_states.dtype)
        if self.axis.size == 1:
            # The fused kernel accumulates in fp32 for half-precision input.
            return F.rms_norm(hidden_states, weight.shape, weight, self.eps).to(hidden_states.dtype)
        wide = hidden_states.float()
        square_sum = all_reduce(wide.square().sum(-1, keepdim=True), self.axis)
        return (wide * torch.rsqrt(square_sum / self.hidden_size + self.eps) * weight).to(hidden_states.dtype)
