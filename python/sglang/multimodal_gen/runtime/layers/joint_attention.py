"""Attention of one token stream to itself, and of two streams, image and text, to both of them together.

Parameter names are those of published diffusers checkpoints. Source: arXiv:2403.03206 (joint attention).

Shapes: B batch, S tokens, L text tokens, D hidden_size, N heads of this rank, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.attention.layouts import Sent, TokenExchange, arrived
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.fused import JoinedLinear, norm_rotate, norm_rotate_both
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.multimodal_gen.runtime.layers.norm import RMSNorm
from sglang.multimodal_gen.runtime.layers.side_stream import side_by_side


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
        self.joined: JoinedLinear | None = None
        if projects_out:
            self.to_out = nn.ModuleList([RowParallelLinear(inner, hidden_size, bias=bias, axis=axis)])
        self.attention = context.self_attention.build(head_dim)
        self.masked_attention = context.self_attention.build(head_dim, mask=True) if mask else None

    def split_heads(self, hidden_states: Tensor) -> Tensor:
        """[B, S, N·E] -> [B, S, N, E]."""
        return hidden_states.unflatten(-1, (self.num_heads, -1))

    def attend(self, query: Sent, key: Sent, value: Sent, mask: Tensor | None) -> Tensor:
        """Three times [B, S, N, E] as it was sent, a mask [B, 1, 1, S] -> [B, S, N·E]."""
        return arrived(self.begin_attending(query, key, value, mask)).flatten(2)

    def begin_attending(self, query: Sent, key: Sent, value: Sent, mask: Tensor | None) -> Tensor | TokenExchange:
        """The same as [B, S, N, E], maybe still under way, for who has something to compute meanwhile."""
        if mask is None:
            return self.attention.begin(query, key, value)
        assert self.masked_attention is not None, "a layer that is given masks is built with mask=True"
        return self.masked_attention.begin(query, key, value, mask)

    def join_projections(self) -> None:
        """See `fused.join_projections`."""
        self.joined = JoinedLinear.of([self.to_q, self.to_k, self.to_v])

    def projected(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """[B, S, D] -> queries, keys and values [B, S, N, E] as they come from one product."""
        layers = (self.to_q, self.to_k, self.to_v)
        parts = [layer(hidden_states) for layer in layers] if self.joined is None else self.joined(hidden_states)
        return tuple(self.split_heads(part) for part in parts)

    def project(self, hidden_states: Tensor, freqs_cis: Tensor | None) -> tuple[Sent, Sent, Sent]:
        """[B, S, D] -> queries, keys and values for `attend`; what is computed before that overlaps with their way."""
        send, packs = self.attention.send, self.attention.sends_packed(hidden_states)
        if self.attention.layout.overlaps and not packs:
            sent_value = send(self.split_heads(self.to_v(hidden_states)))
            sent_query = send(placed(self.split_heads(self.to_q(hidden_states)), self.norm_q, freqs_cis))
            sent_key = send(placed(self.split_heads(self.to_k(hidden_states)), self.norm_k, freqs_cis))
            return sent_query, sent_key, sent_value
        query, key, value = self.projected(hidden_states)
        norms = (self.norm_q, self.norm_k)
        if packs:
            return self.attention.send_packed(packed(query, key, value, norms, freqs_cis))
        query, key = both_placed(query, key, norms, freqs_cis)
        return send(query), send(key), send(value)

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
        self.joined_text: JoinedLinear | None = None
        self.to_add_out = RowParallelLinear(inner, hidden_size, axis=axis) if text_out else nn.Identity()

    def joint_forward(
        self, hidden_states: Tensor, text: Tensor, freqs_cis: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, L, D], the table of S + L tokens, a mask [B, 1, 1, S + L] -> [B, S, D], [B, L, D]."""
        of_image, of_text = self.joint_attend(hidden_states, text, freqs_cis, mask)
        return self.to_out[0](of_image), self.to_add_out(of_text)

    def joint_attend(
        self, hidden_states: Tensor, text: Tensor, freqs_cis: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, before the projections: [B, S, N·E], [B, L, N·E]."""
        attended = self.attend(*self._joint_project(hidden_states, text, freqs_cis), mask)
        sizes = (text.shape[1], hidden_states.shape[1])
        if self.text_first:
            of_text, of_image = attended.split(sizes, dim=1)
        else:
            of_image, of_text = attended.split(sizes[::-1], dim=1)
        return of_image, of_text

    def join_projections(self) -> None:
        """See `fused.join_projections`."""
        super().join_projections()
        self.joined_text = JoinedLinear.of([self.add_q_proj, self.add_k_proj, self.add_v_proj])

    def projected_text(self, text: Tensor) -> tuple[Tensor, ...]:
        """[B, L, D] -> queries, keys and values [B, L, N, E]."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        parts = [layer(text) for layer in layers] if self.joined_text is None else self.joined_text(text)
        return tuple(self.split_heads(part) for part in parts)

    def _joint_project(self, hidden_states: Tensor, text: Tensor, freqs_cis: Tensor | None) -> tuple[Sent, Sent, Sent]:
        """[B, S, D], [B, L, D] -> queries, keys and values of both streams for `attend`."""
        join, send = _Joint(text.shape[1], hidden_states.shape[1], text_first=self.text_first), self.attention.send
        packs, heads = self.attention.sends_packed(hidden_states), self.split_heads
        if self.attention.layout.overlaps and not packs:
            # One after the other: what comes first is on its way while the next is computed.
            value = send(join(heads(self.add_v_proj(text)), heads(self.to_v(hidden_states))))
            of_text, of_image = heads(self.add_q_proj(text)), heads(self.to_q(hidden_states))
            query = send(join(of_text, of_image, self.norm_added_q, self.norm_q, freqs_cis))
            of_text, of_image = heads(self.add_k_proj(text)), heads(self.to_k(hidden_states))
            return query, send(join(of_text, of_image, self.norm_added_k, self.norm_k, freqs_cis)), value
        # Queries, keys and values of both, each with room for the sequence.
        size = (join.num_text + join.num_image, self.num_heads, self.attention.head_dim)
        as_one = self._one_sequence_of(hidden_states)
        together = _pack_of(hidden_states, *size) if packs or as_one else None
        apart = () if together is not None else [hidden_states.new_empty(len(text), *size) for _ in range(3)]
        rooms = apart if together is None else together.unbind(2)
        text_norms, norms = (self.norm_added_q, self.norm_added_k), (self.norm_q, self.norm_k)
        if together is not None and as_one:
            by_image, by_text = as_one
            side_by_side(
                lambda: join.multiply(by_text, text, together, text_norms, freqs_cis, join.text_start),
                lambda: join.multiply(by_image, hidden_states, together, norms, freqs_cis, join.image_start),
            )
        else:
            side_by_side(
                lambda: join.fill(rooms, self.projected_text(text), text_norms, freqs_cis, join.text_start),
                lambda: join.fill(rooms, self.projected(hidden_states), norms, freqs_cis, join.image_start),
            )
        if packs and together is not None:
            return self.attention.send_packed(together)
        query_, key_, value_ = map(send, rooms)
        return query_, key_, value_

    def _one_sequence_of(self, hidden_states: Tensor) -> tuple[JoinedLinear, JoinedLinear] | None:
        """The products of image and text, where they can write where the sequence is: one row, whose tokens lie one
        behind the other there, without gradients, and nothing to be added."""
        if len(hidden_states) > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        of_image, of_text = self.joined, self.joined_text
        if of_image is None or of_text is None or not (of_image.is_plain and of_text.is_plain):
            return None
        return of_image, of_text


@dataclass(frozen=True)
class _Joint:
    """Puts heads of L text and S image tokens into one sequence, normed and rotated on the way."""

    num_text: int
    num_image: int
    text_first: bool

    def __call__(
        self,
        text: Tensor,
        image: Tensor,
        text_norm: nn.Module | None = None,
        image_norm: nn.Module | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """[B, L, N, E], [B, S, N, E], the table of all tokens -> [B, L + S, N, E]."""
        size = (image.shape[0], self.num_text + self.num_image, *image.shape[2:])
        joint = image.new_empty(size)
        for heads, norm, start in ((text, text_norm, self.text_start), (image, image_norm, self.image_start)):
            self._put(heads, norm, freqs_cis, joint, start)
        return joint

    @property
    def text_start(self) -> int:
        """Where the text stands in the sequence."""
        return 0 if self.text_first else self.num_image

    @property
    def image_start(self) -> int:
        """Where the image stands."""
        return self.num_text if self.text_first else 0

    def fill(
        self,
        rooms: Sequence[Tensor],
        projected: Sequence[Tensor],
        norms: tuple[nn.Module, nn.Module],
        freqs_cis: Tensor | None,
        start: int,
    ) -> None:
        """Put one stream's queries, keys and values into those of the sequence, each [B, L + S, N, E]."""
        query, key, value = projected
        part = slice(start, start + value.shape[1])
        to_query, to_key, to_value = (room[:, part] for room in rooms)
        both_placed(query, key, norms, _table_of(freqs_cis, part), out=(to_query, to_key))
        placed(value, None, None, out=to_value)

    def multiply(
        self,
        joined: JoinedLinear,
        tokens: Tensor,
        together: Tensor,
        norms: tuple[nn.Module, nn.Module],
        freqs_cis: Tensor | None,
        start: int,
    ) -> None:
        """Let one stream's product write its part of the sequence [1, L + S, 3, N, E], and norm and rotate there."""
        part = slice(start, start + tokens.shape[1])
        room = together[:, part]
        joined.into(tokens[0], room[0].flatten(1))
        query, key, _ = room.unbind(2)
        both_placed(query, key, norms, _table_of(freqs_cis, part), out=(query, key))

    def _put(self, heads: Tensor, norm: nn.Module | None, freqs_cis: Tensor | None, joint: Tensor, start: int) -> None:
        part = slice(start, start + heads.shape[1])
        placed(heads, norm, _table_of(freqs_cis, part), out=joint[:, part])


def _table_of(freqs_cis: Tensor | None, part: slice) -> Tensor | None:
    return None if freqs_cis is None else freqs_cis[:, part]


def placed(heads: Tensor, norm: nn.Module | None, freqs_cis: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """Queries or keys [B, S, N, E], normed and rotated where there is a norm and a table; in `out` where given."""
    weight, eps = (norm.weight, norm.eps) if isinstance(norm, RMSNorm) else (None, 0.0)
    if weight is None and freqs_cis is None and (out is None or out is heads):
        return heads
    return norm_rotate(heads, weight, freqs_cis, eps=eps, out=out)


def both_placed(
    query: Tensor,
    key: Tensor,
    norms: tuple[nn.Module, nn.Module],
    freqs_cis: Tensor | None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`placed` of queries and of keys, whose norms are of one kind; what they are read from may be `out`."""
    norm_q, norm_k = norms
    if not (isinstance(norm_q, RMSNorm) and isinstance(norm_k, RMSNorm)):
        to_query, to_key = (None, None) if out is None else out
        return placed(query, None, freqs_cis, out=to_query), placed(key, None, freqs_cis, out=to_key)
    weights = (norm_q.weight, norm_k.weight)
    assert norm_q.eps == norm_k.eps, "they are made alike"
    return norm_rotate_both(query, key, weights, freqs_cis, eps=norm_q.eps, out=out)


def packed(
    query: Tensor, key: Tensor, value: Tensor, norms: tuple[nn.Module, nn.Module], freqs_cis: Tensor | None
) -> Tensor:
    """Queries, keys and values [B, S, N, E], the first two normed and rotated, side by side: [B, S, 3, N, E]."""
    together = _pack_of(query, query.shape[1], *query.shape[2:])
    both_placed(query, key, norms, freqs_cis, out=(together[:, :, 0], together[:, :, 1]))
    placed(value, None, None, out=together[:, :, 2])
    return together


def _pack_of(like: Tensor, num_tokens: int, num_heads: int, head_dim: int) -> Tensor:
    return like.new_empty(like.shape[0], num_tokens, 3, num_heads, head_dim)
