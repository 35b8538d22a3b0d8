"""CLIP's text encoder. Source: arXiv:2103.00020, https://github.com/openai/CLIP

Ours for the reason that T5 is. Parameter names are those of transformers' classes; most files put `text_model.` before
those of the one without a projection.

Shapes: B batch, L text tokens, D hidden_size, H heads, P projection_dim.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.encoders import CLIPTextConfig
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear

_HIGHEST_ID_ENDS = 2
"""The `eos_token_id` of configs from a time when it was not looked at."""


class CLIPReading(NamedTuple):
    """What is read from texts: `hidden_states`, [B, L, D] each, are those before the first layer and after each one,
    without the final norm; `pooled`, [B, D or P], is the state at each text's end, normed and, where there is a
    projection, projected."""

    hidden_states: tuple[Tensor, ...]
    pooled: Tensor


class CLIPTextEmbeddings(nn.Module):
    """Tokens and their positions, both learned."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class CLIPAttention(nn.Module):
    """Attention to the tokens before and the token itself."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.k_proj = ReplicatedLinear(config.hidden_size, config.hidden_size)
        self.v_proj = ReplicatedLinear(config.hidden_size, config.hidden_size)
        self.q_proj = ReplicatedLinear(config.hidden_size, config.hidden_size)
        self.out_proj = ReplicatedLinear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Out, activation, back in."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = quick_gelu if config.hidden_act == "quick_gelu" else F.gelu
        self.fc1 = ReplicatedLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = ReplicatedLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    """Attention, then MLP, each behind a norm and beside a residual."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class CLIPEncoder(nn.Module):
    """All layers."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """[B, L, D] -> the same and the states after each layer."""
        states = [hidden_states]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPTextModel(nn.Module):
    """Token ids to hidden states and the state at the end."""

    stored_prefixes: ClassVar[tuple[str, ...]] = ("text_model.",)
    unread_keys: ClassVar[tuple[str, ...]] = ("embeddings.position_ids",)

    def __init__(self, config: CLIPTextConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> CLIPReading:
        """Ids [B, L], each row with an end -> the states of all layers, and the normed one at the first end."""
        states = self.encoder(self.embeddings(input_ids))
        end = self.config.eos_token_id
        ranks = input_ids if end == _HIGHEST_ID_ENDS else (input_ids == end).int()
        rows = torch.arange(len(input_ids), device=input_ids.device)
        # Of the largest ones argmax takes the first, and padding may be the same token.
        return CLIPReading(states, self.final_layer_norm(states[-1])[rows, ranks.argmax(dim=-1)])


class CLIPTextModelWithProjection(nn.Module):
    """The same with the state at the end projected to where it is compared with pictures."""

    unread_keys: ClassVar[tuple[str, ...]] = (
        "text_model.embeddings.position_ids",
        "vision_model.",
        "visual_projection.",
        "logit_scale",
    )

    def __init__(self, config: CLIPTextConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextModel(config, context)
        self.text_projection = ReplicatedLinear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor) -> CLIPReading:
        """See CLIPTextModel."""
        states, pooled = self.text_model(input_ids)
        return CLIPReading(states, self.text_projection(pooled))


def quick_gelu(hidden_states: Tensor) -> Tensor:
    """An approximation of GELU by a sigmoid. Source: https://github.com/hendrycks/GELUs"""
    return hidden_states * torch.sigmoid(1.702 * hidden_states)
