"""Attention kernels: how one device computes softmax(QKᵀ)V. Who holds which tokens is the layout's business.

Shapes: B batch, S query tokens, L key tokens, H heads, E head_dim. A mask is [B or 1, H or 1, S or 1, L]: bool, True
where a query attends, or floats that are added to the logits. Each query must attend to at least one key.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sglang.multimodal_gen.runtime.layers.attention.traits import KernelTraits


class AttentionKernel(Protocol):
    """Attention of one device."""

    @property
    def name(self) -> str: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """[B, S, H, E], [B, L, H, E], [B, L, H, E] -> [B, S, H, E]. Leaves its inputs as they are."""
        ...


class MaskedKernel(AttentionKernel, Protocol):
    """A kernel whose traits say `takes_mask`."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Tensor: ...


class LseKernel(AttentionKernel, Protocol):
    """A kernel whose traits say `gives_lse`: results over parts of the keys can be merged."""

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """The result [B, S, H, E] and the logarithm of the softmax's denominator [B, H, S] in fp32."""
        ...


class TorchSDPA:
    """`scaled_dot_product_attention` of torch, which picks its own flash, memory-efficient or plain kernel."""

    name: str = "torch_sdpa"
    package: ClassVar[str] = "torch"
    traits: ClassVar[KernelTraits] = KernelTraits(takes_mask=True, gives_lse=True)
    _HEAD_MULTIPLE = 8  # of the kernels on GPUs that give the log-sum-exp

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """See `LseKernel`."""
        aten, num_queries, width = torch.ops.aten, query.shape[1], query.shape[-1]
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if query.device.type == "cpu":
            attended, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
            return attended.transpose(1, 2), lse
        if missing := -width % self._HEAD_MULTIPLE:  # zeros change no product
            query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
        if query.dtype == torch.float32:
            attended, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
        else:
            attended, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return attended[..., :width].transpose(1, 2), lse[..., :num_queries].float()


class TorchCudnnSDPA:
    """cuDNN's attention through torch, and nothing else: torch would fall back to other kernels without a word.

    cuDNN plans each new shape once, which takes some tenths of a second.
    """

    name: str = "torch_cudnn_sdpa"
    package: ClassVar[str] = "torch"
    traits: ClassVar[KernelTraits] = KernelTraits(
        precisions=("bf16", "fp16"),
        device_types=("cuda",),
        min_capability=(8, 0),
        head_multiple=8,
        max_head_size=128,
    )
    _MIN_CUDNN = 90_000

    def __init__(self) -> None:
        """Raises ImportError when this torch has no cuDNN of release 9 or later."""
        if not torch.backends.cudnn.is_available() or (torch.backends.cudnn.version() or 0) < self._MIN_CUDNN:
            raise ImportError("needs cuDNN 9 or newer, which this torch lacks")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        if key.shape[1] == 1:
            # cuDNN refuses a single key, and all that a query can attend to is its value.
            return value.expand(-1, query.shape[1], -1, -1)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


class TorchReference:
    """Softmax in fp32, written out; the other kernels are tested against it. Memory grows with S·L."""

    name: str = "torch_reference"
    package: ClassVar[str] = "torch"
    traits: ClassVar[KernelTraits] = KernelTraits(takes_mask=True, gives_lse=True)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        return self._attend(self._logits(query, key, scale, mask).softmax(dim=-1), value)

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """See `LseKernel`."""
        logits = self._logits(query, key, scale, None)
        return self._attend(logits.softmax(dim=-1), value), logits.logsumexp(dim=-1)

    def _logits(self, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        logits = query.transpose(1, 2).float() @ key.permute(0, 2, 3, 1).float() * scale
        if mask is None:
            return logits
        return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()

    def _attend(self, weights: Tensor, value: Tensor) -> Tensor:
        return (weights @ value.transpose(1, 2).float()).to(value.dtype).transpose(1, 2)
