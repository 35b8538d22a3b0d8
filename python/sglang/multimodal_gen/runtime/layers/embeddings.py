"""Embeddings of timesteps and text. Parameter names are those of published diffusers checkpoints."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear


def sinusoidal_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0, *, scale: float = 1.0) -> Tensor:
    """Timesteps of any shape [...] -> [..., dim], cosines before sines of the angles times `scale`, in fp32."""
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = scale * (timesteps.float().unsqueeze(-1) * torch.exp(exponent))
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers around SiLU: [..., F] -> [..., D]. Also embeds guidance scales and pooled texts."""

    def __init__(self, frequency_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(frequency_dim, hidden_size)
        self.linear_2 = ReplicatedLinear(hidden_size, hidden_size)

    def forward(self, frequencies: Tensor) -> Tensor:
        """Computes in the dtype of its own weights, which loaders may keep in fp32."""
        return self.linear_2(F.silu(self.linear_1(frequencies.to(self.linear_1.weight.dtype))))


class TextProjection(nn.Module):
    """Two linear layers around tanh-GELU, from the text encoder's width to the transformer's."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(text_dim, hidden_size)
        self.linear_2 = ReplicatedLinear(hidden_size, hidden_size)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        """[B, L, text_dim] -> [B, L, D]."""
        return self.linear_2(F.gelu(self.linear_1(prompt_embeds), approximate="tanh"))


class TimestepTextEmbedding(nn.Module):
    """Timestep, pooled text and, in guidance-distilled models, the guidance scale, summed to one vector.

    Keys: `timestep_embedder`, `text_embedder`, `guidance_embedder`. Source: https://github.com/black-forest-labs/flux
    """

    def __init__(self, hidden_size: int, *, pooled_dim: int, frequency_dim: int = 256, guidance: bool = False) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.timestep_embedder = TimestepEmbedding(frequency_dim, hidden_size)
        self.guidance_embedder = TimestepEmbedding(frequency_dim, hidden_size) if guidance else None
        self.text_embedder = TimestepEmbedding(pooled_dim, hidden_size)

    def forward(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Timesteps [B] and guidance scales [B], both in 0 … 1000 of their unit, pooled text [B, P] -> [B, D]."""
        temb = self.timestep_embedder(sinusoidal_embedding(timestep, self.frequency_dim).to(pooled.dtype))
        if self.guidance_embedder is not None:
            assert guidance is not None, "a guidance-distilled model is told the scale"
            temb = temb + self.guidance_embedder(sinusoidal_embedding(guidance, self.frequency_dim).to(pooled.dtype))
        return temb + self.text_embedder(pooled)
