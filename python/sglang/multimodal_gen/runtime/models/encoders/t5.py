"""T5's text encoder. Source: arXiv:1910.10683, https://github.com/google-research/t5x

Ours rather than transformers', whose import alone takes longer than a small model's whole generation. Parameter names
are those of published checkpoints. On the ranks of a replica attention heads, feed-forward features and vocabulary
are dealt.

Shapes: B batch, L text tokens, D d_model, H heads, E head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.encoders import T5EncoderConfig
from sglang.multimodal_gen.runtime.layers.context import EncoderAxes, LayerContext
from sglang.multimodal_gen.runtime.layers.embedding_shards import ColumnParallelEmbedding, VocabParallelEmbedding
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True, kw_only=True)
class SeenKeys:
    """Of each query: distance buckets of all keys, [L, L], and the keys to leave out, [B, 1, 1, L], if any."""

    buckets: Tensor
    hidden: Tensor | None

    def hide(self, bias: Tensor) -> Tensor:
        """[1, H, L, L] -> [1 or B, H, L, L], with the least number for keys to leave out."""
        return bias if self.hidden is None else bias.masked_fill(self.hidden, torch.finfo(bias.dtype).min)


class T5LayerNorm(nn.Module):
    """Root-mean-square norm in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(self.weight.dtype)


class T5Attention(nn.Module):
    """Attention without scaling; with `has_bias`, the model's learned bias for each range of distances lies here."""

    def __init__(self, config: T5EncoderConfig, axes: EncoderAxes, *, has_bias: bool) -> None:
        super().__init__()
        inner, axis = config.num_heads * config.d_kv, axes.heads
        self.num_heads = axis.share(config.num_heads, "attention heads")
        self.q = ColumnParallelLinear(config.d_model, inner, bias=False, axis=axis)
        self.k = ColumnParallelLinear(config.d_model, inner, bias=False, axis=axis)
        self.v = ColumnParallelLinear(config.d_model, inner, bias=False, axis=axis)
        self.o = RowParallelLinear(inner, config.d_model, bias=False, axis=axis)
        self.relative_attention_bias: ColumnParallelEmbedding | None = None
        if has_bias:
            self.relative_attention_bias = ColumnParallelEmbedding(
                config.relative_attention_num_buckets, config.num_heads, axis=axis
            )

    def forward(self, hidden_states: Tensor, keys: SeenKeys, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, L, D], the bias of the layer before -> [B, L, D] and the bias that was added, [1 or B, H, L, L]."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        if self.relative_attention_bias is not None:
            bias = keys.hide(self.relative_attention_bias(keys.buckets).permute(2, 0, 1).unsqueeze(0)).to(query.dtype)
        assert bias is not None, "the first layer has one"
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2)), bias


class T5SelfAttentionLayer(nn.Module):
    """Norm, attention, residual."""

    def __init__(self, config: T5EncoderConfig, axes: EncoderAxes, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, axes, has_bias=has_bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor, keys: SeenKeys, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        attended, bias = self.SelfAttention(self.layer_norm(hidden_states), keys, bias)
        return hidden_states + attended, bias


class T5MLP(nn.Module):
    """One projection in, ReLU, one out: version 1.0."""

    def __init__(self, config: T5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.wi = ColumnParallelLinear(config.d_model, config.d_ff, bias=False, axis=axes.features)
        self.wo = RowParallelLinear(config.d_ff, config.d_model, bias=False, axis=axes.features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.wo(F.relu(self.wi(hidden_states)).to(self.wo.weight.dtype))


class T5GatedMLP(nn.Module):
    """Two projections in, one gating the other, one out: from version 1.1 on. Source: arXiv:2002.05202."""

    def __init__(self, config: T5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.wi_0 = ColumnParallelLinear(config.d_model, config.d_ff, bias=False, axis=axes.features)
        self.wi_1 = ColumnParallelLinear(config.d_model, config.d_ff, bias=False, axis=axes.features)
        self.wo = RowParallelLinear(config.d_ff, config.d_model, bias=False, axis=axes.features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = F.gelu(self.wi_0(hidden_states), approximate="tanh") * self.wi_1(hidden_states)
        return self.wo(gated.to(self.wo.weight.dtype))


class T5FeedForwardLayer(nn.Module):
    """Norm, MLP, residual."""

    def __init__(self, config: T5EncoderConfig, axes: EncoderAxes) -> None:
        super().__init__()
        self.DenseReluDense = (T5GatedMLP if config.is_gated else T5MLP)(config, axes)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.DenseReluDense(self.layer_norm(hidden_states)).to(hidden_states.dtype)


class T5Block(nn.Module):
    """Attention, then MLP. The bias goes from block to block, as weights of one may be on the host meanwhile."""

    def __init__(self, config: T5EncoderConfig, axes: EncoderAxes, *, has_bias: bool) -> None:
        super().__init__()
        attention = T5SelfAttentionLayer(config, axes, has_bias=has_bias)
        self.layer = nn.ModuleList([attention, T5FeedForwardLayer(config, axes)])

    def forward(self, hidden_states: Tensor, keys: SeenKeys, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        hidden_states, bias = attention(hidden_states, keys, bias)
        return bounded(feed_forward(bounded(hidden_states))), bias


class T5Stack(nn.Module):
    """All blocks and the final norm."""

    def __init__(self, config: T5EncoderConfig, axes: EncoderAxes, *, bias_in_every_block: bool) -> None:
        super().__init__()
        blocks = (T5Block(config, axes, has_bias=bias_in_every_block or not i) for i in range(config.num_layers))
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor, keys: SeenKeys) -> Tensor:
        bias: Tensor | None = None
        for block in self.block:
            hidden_states, bias = block(hidden_states, keys, bias)
        return self.final_layer_norm(hidden_states)


class T5EncoderModel(nn.Module):
    """Token ids to hidden states."""

    key_aliases: ClassVar[Mapping[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    unread_keys: ClassVar[tuple[str, ...]] = ("decoder.", "lm_head.")
    keep_in_fp32_with_fp16: ClassVar[tuple[str, ...]] = ("wo",)
    """Its output leaves the range of fp16."""
    bias_in_every_block: ClassVar[bool] = False
    """Whether each block has a bias by distance of its own; else all add the first one's."""

    def __init__(self, config: T5EncoderConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        self.config = config
        axes = EncoderAxes() if context is None else context.encoder
        self.shared = VocabParallelEmbedding(config.vocab_size, config.d_model, axis=axes.vocabulary)
        self.encoder = T5Stack(config, axes, bias_in_every_block=self.bias_in_every_block)

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Ids [B, L] -> hidden states [B, L, D]. No token attends to what is behind the first `lengths` [B] of its row;
        None: all tokens count."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        buckets = distance_buckets(
            positions[None, :] - positions[:, None],
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        hidden = None if lengths is None else (positions[None, :] >= lengths[:, None])[:, None, None, :]
        return self.encoder(self.shared(input_ids), SeenKeys(buckets=buckets, hidden=hidden))


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
