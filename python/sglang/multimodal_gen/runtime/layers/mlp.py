"""The feed-forward layer of a transformer block, split by hidden feature over the tensor-parallel axis."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers.fused import JoinedLinear, gated_silu
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear


class GELUProjection(nn.Module):
    """Linear, then GELU; a module of its own because checkpoints name the weight `proj`."""

    def __init__(self, in_features: int, out_features: int, approximate: str, axis: ProcessAxis) -> None:
        super().__init__()
        self.proj = ColumnParallelLinear(in_features, out_features, axis=axis)
        self.approximate = approximate

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.approximate == "tanh":
            return self.proj.gelu(hidden_states)
        return F.gelu(self.proj(hidden_states))


class SiLUProjection(nn.Module):
    """Linear, then SiLU. Key: `proj`."""

    def __init__(self, in_features: int, out_features: int, axis: ProcessAxis) -> None:
        super().__init__()
        self.proj = ColumnParallelLinear(in_features, out_features, axis=axis)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.silu(self.proj(hidden_states))


class FeedForward(nn.Module):
    """[..., I] -> [..., O] through `inner_dim` units. Keys: `net.0.proj`, `net.2` (1 was dropout in training)."""

    def __init__(
        self,
        in_features: int,
        inner_dim: int,
        out_features: int,
        *,
        activation: Literal["gelu", "silu"] = "gelu",
        approximate: Literal["tanh", "none"] = "tanh",
        axis: ProcessAxis = ALONE,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(in_features, inner_dim, approximate, axis)
            if activation == "gelu"
            else SiLUProjection(in_features, inner_dim, axis),
            nn.Identity(),
            RowParallelLinear(inner_dim, out_features, axis=axis),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        first, _, last = self.net
        assert isinstance(last, RowParallelLinear), "as it was made"
        if isinstance(first, GELUProjection) and first.approximate == "tanh" and last.fuses_gelu:
            return last.of_parts(first.proj(hidden_states), gelu_from=0)
        return self.net(hidden_states)


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) · w3 x), [..., D] -> [..., D], without biases. Source: arXiv:2002.05202."""

    def __init__(self, hidden_size: int, inner_dim: int, *, axis: ProcessAxis = ALONE) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(hidden_size, inner_dim, bias=False, axis=axis)
        self.w2 = RowParallelLinear(inner_dim, hidden_size, bias=False, axis=axis)
        self.w3 = ColumnParallelLinear(hidden_size, inner_dim, bias=False, axis=axis)
        self.joined: JoinedLinear | None = None

    def join_projections(self) -> None:
        """See `fused.join_projections`."""
        self.joined = JoinedLinear.of([self.w1, self.w3])

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.joined is None:
            return self.w2(gated_silu(self.w1(hidden_states), self.w3(hidden_states)))
        return self.w2(gated_silu(*self.joined(hidden_states)))
