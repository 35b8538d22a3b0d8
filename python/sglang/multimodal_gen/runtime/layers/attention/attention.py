"""Attention = a kernel (how one device computes) inside a sequence layout (who holds which tokens)."""

from __future__ import annotations

from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel
from sglang.multimodal_gen.runtime.layers.attention.layouts import SequenceLayout


class Attention(nn.Module):
    """Scaled dot-product attention without parameters. Shapes: B batch, S tokens, P ranks, H heads, E head_dim."""

    def __init__(self, head_dim: int, *, kernel: AttentionKernel, layout: SequenceLayout) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.kernel = kernel
        self.layout = layout

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, S/P, H, E], [B, L/P, H, E], [B, L/P, H, E] on each of P ranks -> [B, S/P, H, E]."""
        query, key, value = self.layout.scatter_heads(query, key, value)
        return self.layout.gather_heads(self.kernel(query, key, value, scale=self.scale))
