"""Attention whose query and key norms run over all heads together, not over each: to itself and to a text.

Parameter names are those of published diffusers checkpoints.

Shapes: B batch, S tokens, L text tokens, D hidden_size, T text width, N heads of this rank, E head_dim, Y layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan, LayerContext
from sglang.multimodal_gen.runtime.layers.fused import JoinedLinear, norm_rotate, norm_rotate_both
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.multimodal_gen.runtime.layers.norm import RMSNorm


class KeysValues(NamedTuple):
    """What a layer made of a text that tokens attend to: [B, L, N·E] each, the keys normed."""

    key: Tensor
    value: Tensor


class LayeredKeysValues(NamedTuple):
    """Those of all layers, which do not change from step to step: `stacked` [B, Y, 2, L, N·E]."""

    stacked: Tensor

    def of_layer(self, layer: int) -> KeysValues:
        """Those of one."""
        return KeysValues(*self.stacked[:, layer].unbind(1))


def stack_keys_values(layers: Iterable[KeysValues]) -> Tensor:
    """What layers made of one text, as LayeredKeysValues has it: [B, Y, 2, L, N·E]."""
    return torch.stack([torch.stack(each, dim=1) for each in layers], dim=1)


class WideNormAttention(nn.Module):
    """Projections and query/key norms that self- and cross-attention share."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        context: LayerContext,
        plan: AttentionPlan,
        *,
        eps: float,
        key_size: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        mask: bool = False,
    ) -> None:
        super().__init__()
        axis, key_size = context.parallel.tp, key_size or hidden_size
        self.num_heads = axis.share(num_heads, "attention heads")
        self.to_q = ColumnParallelLinear(hidden_size, hidden_size, bias=bias, axis=axis)
        self.to_k = ColumnParallelLinear(key_size, hidden_size, bias=bias, axis=axis)
        self.to_v = ColumnParallelLinear(key_size, hidden_size, bias=bias, axis=axis)
        self.to_out = nn.ModuleList([RowParallelLinear(hidden_size, hidden_size, bias=out_bias, axis=axis)])
        self.norm_q = RMSNorm(hidden_size, eps, axis=axis)
        self.norm_k = RMSNorm(hidden_size, eps, axis=axis)
        self.joined: JoinedLinear | None = None
        self.attention: Attention = plan.build(hidden_size // num_heads, mask=mask)

    def split_heads(self, hidden_states: Tensor) -> Tensor:
        """[B, S, N·E] -> [B, S, N, E]."""
        return hidden_states.unflatten(-1, (self.num_heads, -1))

    def keys_values(self, text: Tensor | KeysValues) -> KeysValues:
        """What tokens attend to of a text [B, L, T], unless it has been made of it already."""
        if isinstance(text, KeysValues):
            return text
        return KeysValues(self.norm_k(self.to_k(text)), self.to_v(text))


class WideNormSelfAttention(WideNormAttention):
    """Tokens attend to each other, with rotary positions."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        context: LayerContext,
        *,
        eps: float,
        bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__(hidden_size, num_heads, context, context.self_attention, eps=eps, bias=bias, out_bias=out_bias)

    def join_projections(self) -> None:
        """See `fused.join_projections`."""
        self.joined = JoinedLinear.of([self.to_q, self.to_k, self.to_v])

    def forward(self, hidden_states: Tensor, freqs_cis: Tensor) -> Tensor:
        """[B, S, D] and the rotary table [1 or B, S, 1 or N, E/2, 2] -> [B, S, D]."""
        send, heads = self.attention.send, self.split_heads
        if self.joined is None or self.attention.layout.overlaps:
            # One after the other: what comes first is on its way while the next is computed.
            sent_value = send(heads(self.to_v(hidden_states)))
            sent_query = send(self._rotated(heads(self.to_q(hidden_states)), self.norm_q, freqs_cis))
            sent_key = send(self._rotated(heads(self.to_k(hidden_states)), self.norm_k, freqs_cis))
        else:
            query, key, value = (heads(part) for part in self.joined(hidden_states))
            query, key = self._both_rotated(query, key, freqs_cis)
            sent_query, sent_key, sent_value = send(query), send(key), send(value)
        return self.to_out[0](self.attention(sent_query, sent_key, sent_value).flatten(2))

    def _both_rotated(self, query: Tensor, key: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        norm_q, norm_k = self.norm_q, self.norm_k
        if norm_q.axis.size > 1:
            return self._rotated(query, norm_q, freqs_cis), self._rotated(key, norm_k, freqs_cis)
        weights = (norm_q.weight, norm_k.weight)
        return norm_rotate_both(query, key, weights, freqs_cis, eps=norm_q.eps, wide=True)

    def _rotated(self, heads: Tensor, norm: RMSNorm, freqs_cis: Tensor) -> Tensor:
        """[B, S, N, E], normed over all heads together, those of other ranks included, and rotated."""
        if norm.axis.size > 1:
            return norm_rotate(self.split_heads(norm(heads.flatten(2))), None, freqs_cis)
        return norm_rotate(heads, norm.weight, freqs_cis, eps=norm.eps, wide=True)


class WideNormCrossAttention(WideNormAttention):
    """Tokens attend to a text; calls without a mask are served by kernels that could not take one."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        context: LayerContext,
        *,
        eps: float,
        key_size: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        plan = context.cross_attention
        super().__init__(
            hidden_size, num_heads, context, plan, eps=eps, key_size=key_size, bias=bias, out_bias=out_bias
        )
        self.masked_attention = plan.build(hidden_size // num_heads, mask=True)

    def forward(self, hidden_states: Tensor, text: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
        """[B, S, D], a text [B, L, T] or what `keys_values` made of it, a mask [B, 1, 1, L] or None -> [B, S, D]."""
        query = self.split_heads(self.norm_q(self.to_q(hidden_states)))
        key, value = map(self.split_heads, self.keys_values(text))
        if mask is None:
            return self.to_out[0](self.attention(query, key, value).flatten(2))
        return self.to_out[0](self.masked_attention(query, key, value, mask).flatten(2))
