"""UMT5 text encoder. Source: arXiv:2304.09151, https://github.com/google-research/t5x

Ours rather than transformers', whose import alone takes longer than a small model's whole generation. Parameter names
are those of published checkpoints. On the ranks of a replica attention heads, feed-forward features and vocabulary
are dealt.

Shapes: B batch, L text tokens, D d_model, H heads, E head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.encoders import UMT5EncoderConfig
from sglang.multimodal_gen.runtime.layers.context import EncoderAxes, LayerContext
from sglang.multimodal_gen.runtime.layers.embedding_shards import ColumnParallelEmbedding, VocabParallelEmbedding
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear


class UMT5LayerNorm(nn.Module):
    """Root-mean-square norm in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(self.weight.dtype)


class UMT5Attention(nn.Module):
    """Attention without scaling, with a learned bias for each range of distances."""

    def __init__(self, config: UMT5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        inner, axis = config.num_heads * config.d_kv, axes.heads
        self.num_heads = axis.share(config.num_heads, "attention heads")
        self.q = ColumnParallelLinear(config.d_model, inner, bias=False, axis=axis)
        self.k = ColumnParallelLinear(config.d_model, inner, bias=False, axis=axis)
        self.v = ColumnParallelLinear(config.d_model, inner, bias=False, axis=axis)
        self.o = RowParallelLinear(inner, config.d_model, bias=False, axis=axis)
        self.relative_attention_bias = ColumnParallelEmbedding(
            config.relative_attention_num_buckets, config.num_heads, axis=axis
        )

    def forward(self, hidden_states: Tensor, buckets: Tensor, hidden_keys: Tensor) -> Tensor:
        """[B, L, D], distance buckets [L, L], keys to leave out [B, 1, 1, L] -> [B, L, D]."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)
        bias = bias.masked_fill(hidden_keys, torch.finfo(bias.dtype).min)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2))


class UMT5SelfAttentionLayer(nn.Module):
    """Norm, attention, residual."""

    def __init__(self, config: UMT5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.SelfAttention = UMT5Attention(config, axes)
        self.layer_norm = UMT5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor, buckets: Tensor, hidden_keys: Tensor) -> Tensor:
        return hidden_states + self.SelfAttention(self.layer_norm(hidden_states), buckets, hidden_keys)


class UMT5GatedMLP(nn.Module):
    """Two projections in, one gating the other, one out."""

    def __init__(self, config: UMT5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.wi_0 = ColumnParallelLinear(config.d_model, config.d_ff, bias=False, axis=axes.features)
        self.wi_1 = ColumnParallelLinear(config.d_model, config.d_ff, bias=False, axis=axes.features)
        self.wo = RowParallelLinear(config.d_ff, config.d_model, bias=False, axis=axes.features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = F.gelu(self.wi_0(hidden_states), approximate="tanh") * self.wi_1(hidden_states)
        return self.wo(gated.to(self.wo.weight.dtype))


class UMT5FeedForwardLayer(nn.Module):
    """Norm, MLP, residual."""

    def __init__(self, config: UMT5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.DenseReluDense = UMT5GatedMLP(config, axes)
        self.layer_norm = UMT5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.DenseReluDense(self.layer_norm(hidden_states)).to(hidden_states.dtype)


class UMT5Block(nn.Module):
    """Attention, then MLP."""

    def __init__(self, config: UMT5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.layer = nn.ModuleList([UMT5SelfAttentionLayer(config, axes), UMT5FeedForwardLayer(config, axes)])

    def forward(self, hidden_states: Tensor, buckets: Tensor, hidden_keys: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return bounded(feed_forward(bounded(attention(hidden_states, buckets, hidden_keys))))


class UMT5Stack(nn.Module):
    """All blocks and the final norm."""

    def __init__(self, config: UMT5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.block = nn.ModuleList([UMT5Block(config, axes) for _ in range(config.num_layers)])
        self.final_layer_norm = UMT5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor, buckets: Tensor, hidden_keys: Tensor) -> Tensor:
        for block in self.block:
            hidden_states = block(hidden_states, buckets, hidden_keys)
        return self.final_layer_norm(hidden_states)


class UMT5EncoderModel(nn.Module):
    """Token ids to hidden states."""

    key_aliases: ClassVar[Mapping[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    keep_in_fp32_with_fp16: ClassVar[tuple[str, ...]] = ("wo",)
    """Its output leaves the range of fp16."""

    def __init__(self, config: UMT5EncoderConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        self.config = config
        axes = EncoderAxes() if context is None else context.encoder
        self.shared = VocabParallelEmbedding(config.vocab_size, config.d_model, axis=axes.vocabulary)
        self.encoder = UMT5Stack(config, axes)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Ids [B, L] of which the first `lengths` [B] count -> hidden states [B, L, D]; rows beyond are undefined."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        buckets = distance_buckets(
            positions[None, :] - positions[:, None],
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        hidden_keys = (positions[None, :] >= lengths[:, None])[:, None, None, :]
        return self.encoder(self.shared(input_ids), buckets, hidden_keys)


def distance_buckets(distances: Tensor, *, num_buckets: int, max_distance: int) -> Tensor:
    """Signed distances -> bucket numbers: half for each direction, exact when near, logarithmic up to the maximum.

    Source: arXiv:1910.10683, section 2.1.
    """
    per_direction = num_buckets // 2
    num_exact = per_direction // 2
    length = distances.abs()
    # In fp32, as the weights were trained: a rounding may move a distance into the next bucket.
    scale = torch.log(length.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (scale * (per_direction - num_exact)).long()).clamp(max=per_direction - 1)
    return torch.where(length < num_exact, length, far) + (distances > 0) * per_direction


def bounded(hidden_states: Tensor) -> Tensor:
    """fp16 overflows here with published weights; other dtypes pass."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    limit = torch.finfo(torch.float16).max - 1000
    return hidden_states.clamp(-limit, limit)
