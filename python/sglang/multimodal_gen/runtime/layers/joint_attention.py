"""Attention of one token stream to itself, and of two streams, image and text, to both of them together.

Parameter names are those of published diffusers checkpoints. Source: arXiv:2403.03206 (joint attention).

Shapes: B batch, S tokens, L text tokens, D hidden_size, N heads of this rank, E head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.attention.layouts import Sent
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.multimodal_gen.runtime.layers.norm import RMSNorm
from sglang.multimodal_gen.runtime.layers.rotary import apply_rotary_emb


class SelfAttention(nn.Module):
    """Every token attends to every other; queries and keys are normed by head (`qk_norm`) and rotated.

    With `projects_out=False` there is no output projection, for blocks that have one of their own: they `project` and
    `attend`. With `mask=True` calls may have a mask; those without one are served by kernels that could not take it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        context: LayerContext,
        *,
        eps: float = 1e-6,
        bias: bool = True,
        qk_norm: bool = True,
        projects_out: bool = True,
        mask: bool = False,
    ) -> None:
        super().__init__()
        axis = context.parallel.tp
        inner = num_heads * head_dim
        self.num_heads = axis.share(num_heads, "attention heads")
        self.to_q = ColumnParallelLinear(hidden_size, inner, bias=bias, axis=axis)
        self.to_k = ColumnParallelLinear(hidden_size, inner, bias=bias, axis=axis)
        self.to_v = ColumnParallelLinear(hidden_size, inner, bias=bias, axis=axis)
        self.norm_q = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        if projects_out:
            self.to_out = nn.ModuleList([RowParallelLinear(inner, hidden_size, bias=bias, axis=axis)])
        self.attention = context.self_attention.build(head_dim)
        self.masked_attention = context.self_attention.build(head_dim, mask=True) if mask else None

    def split_heads(self, hidden_states: Tensor) -> Tensor:
        """[B, S, N·E] -> [B, S, N, E]."""
        return hidden_states.unflatten(-1, (self.num_heads, -1))

    def attend(self, query: Sent, key: Sent, value: Sent, mask: Tensor | None) -> Tensor:
        """Three times [B, S, N, E] as it was sent, a mask [B, 1, 1, S] -> [B, S, N·E]."""
        if mask is None:
            return self.attention(query, key, value).flatten(2)
        assert self.masked_attention is not None, "a layer that is given masks is built with mask=True"
        return self.masked_attention(query, key, value, mask).flatten(2)

    def send_rotated(self, tensor: Tensor, freqs_cis: Tensor | None) -> Sent:
        """Queries or keys [B, S, N, E] with the table of all S tokens, on their way."""
        return self.attention.send(tensor if freqs_cis is None else apply_rotary_emb(tensor, freqs_cis))

    def project(self, hidden_states: Tensor, freqs_cis: Tensor | None) -> tuple[Sent, Sent, Sent]:
        """[B, S, D] -> queries, keys and values for `attend`; what is computed before that overlaps with their way."""
        value = self.attention.send(self.split_heads(self.to_v(hidden_states)))
        query = self.send_rotated(self.norm_q(self.split_heads(self.to_q(hidden_states))), freqs_cis)
        key = self.send_rotated(self.norm_k(self.split_heads(self.to_k(hidden_states))), freqs_cis)
        return query, key, value

    def forward(self, hidden_states: Tensor, freqs_cis: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.to_out[0](self.attend(*self.project(hidden_states, freqs_cis), mask))


class JointAttention(SelfAttention):
    """Image and text tokens attend to the sequence of both; each stream has its own projections and norms.

    `text_first` says which stream stands first in that sequence, and so in `freqs_cis` and the mask. With
    `text_out=False` the text's update is not projected: no one reads it behind the last block.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        context: LayerContext,
        *,
        eps: float = 1e-6,
        qk_norm: bool = True,
        text_first: bool = True,
        text_out: bool = True,
        mask: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, context, eps=eps, qk_norm=qk_norm, mask=mask)
        axis = context.parallel.tp
        inner = num_heads * head_dim
        self.text_first = text_first
        self.add_q_proj = ColumnParallelLinear(hidden_size, inner, axis=axis)
        self.add_k_proj = ColumnParallelLinear(hidden_size, inner, axis=axis)
        self.add_v_proj = ColumnParallelLinear(hidden_size, inner, axis=axis)
        self.norm_added_q = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.norm_added_k = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.to_add_out = RowParallelLinear(inner, hidden_size, axis=axis) if text_out else nn.Identity()

    def joint_forward(
        self, hidden_states: Tensor, text: Tensor, freqs_cis: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, L, D], the table of S + L tokens, a mask [B, 1, 1, S + L] -> [B, S, D], [B, L, D]."""
        value = self._joined(self.split_heads(self.add_v_proj(text)), self.split_heads(self.to_v(hidden_states)))
        value_sent = self.attention.send(value)
        query = self._joined(
            self.norm_added_q(self.split_heads(self.add_q_proj(text))),
            self.norm_q(self.split_heads(self.to_q(hidden_states))),
        )
        query_sent = self.send_rotated(query, freqs_cis)
        key = self._joined(
            self.norm_added_k(self.split_heads(self.add_k_proj(text))),
            self.norm_k(self.split_heads(self.to_k(hidden_states))),
        )
        attended = self.attend(query_sent, self.send_rotated(key, freqs_cis), value_sent, mask)
        sizes = (text.shape[1], hidden_states.shape[1])
        if self.text_first:
            of_text, of_image = attended.split(sizes, dim=1)
        else:
            of_image, of_text = attended.split(sizes[::-1], dim=1)
        return self.to_out[0](of_image), self.to_add_out(of_text)

    def _joined(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat((text, image) if self.text_first else (image, text), dim=1)
