"""AdaLN-zero: shift, scale and gate that the timestep embedding gives to each sub-layer. Source: arXiv:2212.09748."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from sglang.multimodal_gen.runtime.layers.fused import gated_sum, sum_norm
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding


class Modulation(NamedTuple):
    """Three fp32 tensors [B, G, D]: one value for each of G groups of neighbouring tokens.

    One group is the whole sample, S groups are single tokens; what lies between is, say, the frames of a video.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def normed(self, hidden_states: Tensor, *, eps: float = 1e-6, rms: bool = False) -> Tensor:
        """Norm without weights, then scale and shift: [B, S, D] in the dtype that came in, computed in fp32."""
        return sum_norm(hidden_states, scale=self.scale, shift=self.shift, eps=eps, rms=rms)[1]

    def add_gated(self, residual: Tensor, update: Tensor) -> Tensor:
        """residual + gate · update, [B, S, D] each, summed in fp32 and returned in the residual's dtype."""
        return gated_sum(residual, update, self.gate)

    def add_gated_normed(self, residual: Tensor, update: Tensor, then: Modulation) -> tuple[Tensor, Tensor]:
        """`add_gated`, and the `normed` of another modulation of that."""
        return sum_norm(residual, update, self.gate, scale=then.scale, shift=then.shift)


class PartedEmbedding(NamedTuple):
    """An embedding [B, D] for the first `size` tokens and one for those behind them."""

    first: Tensor
    second: Tensor
    size: int


class PartedModulation(NamedTuple):
    """A modulation for the first `size` tokens and one for those behind them.

    Half the memory traffic of one value per token, which would be as large as the tokens themselves, in fp32.
    """

    first: Modulation
    second: Modulation
    size: int

    @classmethod
    def of_rows(cls, modulation: Modulation, size: int) -> PartedModulation:
        """Of values [2·B, 1, D]: B rows for the tokens in front, then B rows for the others."""
        first, second = zip(*(part.chunk(2) for part in modulation), strict=True)
        return cls(Modulation(*first), Modulation(*second), size)

    def normed(self, hidden_states: Tensor, *, eps: float = 1e-6) -> Tensor:
        """See Modulation."""
        parts = (
            self.first.normed(hidden_states[:, : self.size], eps=eps),
            self.second.normed(hidden_states[:, self.size :], eps=eps),
        )
        return torch.cat(parts, dim=1)

    def add_gated(self, residual: Tensor, update: Tensor) -> Tensor:
        """See Modulation."""
        parts = (
            self.first.add_gated(residual[:, : self.size], update[:, : self.size]),
            self.second.add_gated(residual[:, self.size :], update[:, self.size :]),
        )
        return torch.cat(parts, dim=1)

    def add_gated_normed(self, residual: Tensor, update: Tensor, then: PartedModulation) -> tuple[Tensor, Tensor]:
        """See Modulation."""
        summed = self.add_gated(residual, update)
        return summed, then.normed(summed)


def split_modulations(table: Tensor, temb: Tensor) -> tuple[Modulation, ...]:
    """The learnt table [3·N, D] plus the embedding [B, G, 3·N, D] -> N modulations, in fp32.

    Dimensions of one may stand before either's last two, and come back with the modulations.
    """
    parts = (table.float() + temb.float()).unbind(-2)
    return tuple(Modulation(*parts[first : first + 3]) for first in range(0, len(parts), 3))


class StepLinear(nn.Module):
    """A layer whose linear layer the timestep embedding passes, behind SiLU. Key: `linear`. See Modulated."""

    linear: ReplicatedLinear

    @property
    def step_width(self) -> int:
        """See Modulated."""
        return self.linear.out_features

    def step_values(self, temb: Tensor) -> Tensor:
        """See Modulated."""
        return self.linear(F.silu(temb))


class AdaLayerNormZero(StepLinear):
    """The modulations of a block's sub-layers, made of the timestep embedding. Source: arXiv:2212.09748."""

    def __init__(self, hidden_size: int, *, num_modulations: int) -> None:
        super().__init__()
        self.num_modulations = num_modulations
        self.linear = ReplicatedLinear(hidden_size, 3 * num_modulations * hidden_size)

    def forward(self, step: StepEmbedding | PartedEmbedding) -> tuple[Modulation | PartedModulation, ...]:
        """A step's embedding, or one for each of two parts -> a modulation per sub-layer, in fp32."""
        if isinstance(step, PartedEmbedding):
            pairs = zip(
                self._modulations(StepEmbedding(step.first)), self._modulations(StepEmbedding(step.second)), strict=True
            )
            return tuple(PartedModulation(*pair, step.size) for pair in pairs)
        return self._modulations(step)

    def _modulations(self, step: StepEmbedding) -> tuple[Modulation, ...]:
        return modulations_of(step.through(self.linear), self.num_modulations)


class AdaLayerNormSingle(nn.Module):
    """What the timestep embedding gives to all blocks alike; each adds its own table. Source: arXiv:2310.00426.

    Keys: `emb.timestep_embedder`, `linear`.
    """

    def __init__(self, hidden_size: int, *, num_values: int = 6, frequency_dim: int = 256) -> None:
        super().__init__()
        self.num_values = num_values
        self.frequency_dim = frequency_dim
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(frequency_dim, hidden_size)})
        self.linear = ReplicatedLinear(hidden_size, num_values * hidden_size)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timesteps [...] in 0 … 1000 -> N values [..., N, D] for the blocks, and the embedding itself [..., D]."""
        frequencies = sinusoidal_embedding(timestep, self.frequency_dim).to(dtype)
        temb = self.emb["timestep_embedder"](frequencies)
        return self.linear(F.silu(temb)).unflatten(-1, (self.num_values, -1)), temb


class AdaLayerNormContinuous(StepLinear):
    """The last norm before the output projection: scale, then shift, from the timestep embedding."""

    def __init__(self, hidden_size: int, conditioning_size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(conditioning_size, 2 * hidden_size)
        self.eps = eps

    def forward(self, hidden_states: Tensor, step: StepEmbedding) -> Tensor:
        """[B, S, D] and the step's embedding -> [B, S, D]."""
        scale, shift = step.through(self.linear).float().unsqueeze(1).chunk(2, dim=-1)
        return sum_norm(hidden_states, scale=scale, shift=shift, eps=self.eps)[1]


def modulations_of(values: Tensor, count: int) -> tuple[Modulation, ...]:
    """[B, 3·N·D] -> N modulations (shift, scale, gate), in fp32."""
    parts = values.float().unsqueeze(1).chunk(3 * count, dim=-1)
    return tuple(Modulation(*parts[first : first + 3]) for first in range(0, len(parts), 3))
