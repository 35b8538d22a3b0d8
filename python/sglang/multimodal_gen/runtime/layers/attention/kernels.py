"""Attention kernels: how one device computes softmax(QKᵀ)V. Who holds which tokens is the layout's business.

Shapes: B batch, S query tokens, L key tokens, H heads, E head_dim.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor


class AttentionKernel(Protocol):
    """Unmasked attention of one device."""

    name: ClassVar[str]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """[B, S, H, E], [B, L, H, E], [B, L, H, E] -> [B, S, H, E]."""
        ...


class TorchSDPA:
    """`scaled_dot_product_attention` of torch, which picks its own flash, memory-efficient or plain kernel."""

    name: ClassVar[str] = "torch_sdpa"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


class TorchReference:
    """Softmax in fp32, written out; the other kernels are tested against it. Memory grows with S·L."""

    name: ClassVar[str] = "torch_reference"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        weights = (query.float() @ key.float().transpose(-1, -2) * scale).softmax(dim=-1)
        return (weights @ value.float()).to(query.dtype).transpose(1, 2)
