"""Text tokens refined by a small transformer under the timestep, before they join the image or video tokens.

Parameter names are those of published diffusers checkpoints. Source: arXiv:2412.03603.

Shapes: B batch, L text tokens, D hidden_size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embeddings import TimestepTextEmbedding
from sglang.multimodal_gen.runtime.layers.joint_attention import SelfAttention
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.mlp import FeedForward
from sglang.multimodal_gen.runtime.layers.norm import FP32LayerNorm

_MLP_RATIO = 4
_EPS = 1e-6


class GateProjection(nn.Module):
    """The gates of attention and MLP, made of the embedding: [B, D] -> twice [B, 1, D]. Key: `linear`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(hidden_size, 2 * hidden_size)

    def forward(self, temb: Tensor) -> tuple[Tensor, Tensor]:
        attn_gate, mlp_gate = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return attn_gate, mlp_gate


class RefinerBlock(nn.Module):
    """Self-attention and MLP after layer norms; the embedding gates both."""

    def __init__(self, num_heads: int, head_dim: int, context: LayerContext) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.norm1 = FP32LayerNorm(dim, _EPS)
        self.attn = SelfAttention(dim, num_heads, head_dim, context, qk_norm=False, mask=True)
        self.norm2 = FP32LayerNorm(dim, _EPS)
        self.ff = FeedForward(dim, _MLP_RATIO * dim, dim, activation="silu", axis=context.parallel.tp)
        self.norm_out = GateProjection(dim)

    def forward(self, hidden_states: Tensor, temb: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, D], [B, D], a mask [B, 1, 1, L] or None -> [B, L, D]."""
        attn_gate, mlp_gate = self.norm_out(temb)
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), None, mask) * attn_gate
        return hidden_states + self.ff(self.norm2(hidden_states)) * mlp_gate


class RefinerStack(nn.Module):
    """The blocks under the name that checkpoints have for them: `refiner_blocks`."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, context: LayerContext) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList([RefinerBlock(num_heads, head_dim, context) for _ in range(num_layers)])


class TokenRefiner(nn.Module):
    """Text encoder's states to the transformer's width, by way of `num_layers` blocks."""

    def __init__(self, text_dim: int, num_heads: int, head_dim: int, context: LayerContext, *, num_layers: int) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.time_text_embed = TimestepTextEmbedding(dim, pooled_dim=text_dim)
        self.proj_in = ReplicatedLinear(text_dim, dim)
        self.token_refiner = RefinerStack(num_layers, num_heads, head_dim, context)

    def forward(self, text: Tensor, timestep: Tensor, mask: Tensor | None, projected: Tensor | None = None) -> Tensor:
        """[B, L, text_dim], timesteps [B], a mask [B, 1, 1, L], True at tokens that count -> [B, L, D].

        `projected` [B, L, D] is what `proj_in` made of the text, where that is known.
        """
        temb = self.time_text_embed(timestep, _mean_of(text, mask))
        hidden_states = self.proj_in(text) if projected is None else projected
        for block in self.token_refiner.refiner_blocks:
            hidden_states = block(hidden_states, temb, mask)
        return hidden_states


def _mean_of(text: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count, in fp32: [B, L, D] -> [B, D]."""
    if mask is None:
        return text.float().mean(1).to(text.dtype)
    counted = mask.flatten(1).unsqueeze(-1)
    return (text.float() * counted).sum(1).div(counted.sum(1)).to(text.dtype)
