"""Rotary position embedding: tables of rotations and how they are applied. Source: arXiv:2104.09864.

A table holds cosine and sine of each rotation in fp32, [1, S, 1, E/2, 2] for S tokens and head_dim E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.table_cache import table_cache


def rotary_angles(dim: int, num_positions: int, theta: float = 10000.0) -> Tensor:
    """Angles of `dim`/2 rotations at positions 0 … num_positions-1: [num_positions, dim/2], fp64 on the CPU."""
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    return torch.outer(torch.arange(num_positions, dtype=torch.float64, device="cpu"), frequencies)


# A 720p clip of 81 frames at head_dim 128 takes 39 MB; a handful of shapes is alive at a time.
@table_cache(8)
def rotary_table_3d(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Table for tokens on a (frames, height, width) grid, in raster order: [1, F·H·W, 1, head_dim/2, 2].

    Height and width get 2·(head_dim // 6) channels each, time the rest. Source: arXiv:2503.20314.
    """
    side = 2 * (head_dim // 6)
    # A table made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        axes = [rotary_angles(dim, size) for dim, size in zip((head_dim - 2 * side, side, side), grid, strict=True)]
        frames, height, width = grid
        angles = torch.cat(
            (
                axes[0].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                axes[1].view(1, height, 1, -1).expand(frames, height, width, -1),
                axes[2].view(1, 1, width, -1).expand(frames, height, width, -1),
            ),
            dim=-1,
        ).reshape(1, frames * height * width, 1, -1)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)


def rotary_table(
    positions: Tensor,
    axes_dim: Sequence[int],
    *,
    theta: float = 10000.0,
    precision: torch.dtype = torch.float64,
    rounded_to: torch.dtype | None = None,
) -> Tensor:
    """Table for tokens at any positions [S, A] or [B, S, A], one for each of A axes -> [1 or B, S, 1, E/2, 2], fp32.

    `axes_dim` are the channels of each axis, together head_dim E. `precision` is that of the angles, which may be
    `rounded_to` another once computed: models were trained with rounded ones, and equality wants the same rounding.
    """
    if positions.ndim == 2:
        positions = positions.unsqueeze(0)
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=precision, device=positions.device) / dim
        angles.append(positions[..., axis, None].to(precision) * (1.0 / theta**exponents))
    joined = torch.cat(angles, dim=-1).unsqueeze(2).to(rounded_to or precision)
    return torch.stack((joined.cos(), joined.sin()), dim=-1).float()


def fractional_rotary_table(positions: Tensor, hidden_size: int, num_heads: int, *, theta: float = 10000.0) -> Tensor:
    """Table over all heads' channels for fp32 positions [S, A] or [B, S, A] -> [1 or B, S, N, E/2, 2], fp32.

    The A positions of a token are fractions of some largest one. Frequencies grow from π/2 to theta · π/2 over the
    whole width and alternate between the axes; channels that are left over stand in front and are not rotated. Angles
    are rounded to fp32, as models of this kind were trained. Source: https://github.com/Lightricks/LTX-Video
    """
    if positions.ndim == 2:
        positions = positions.unsqueeze(0)
    num_frequencies = hidden_size // (2 * positions.shape[-1])
    exponents = torch.linspace(0.0, 1.0, num_frequencies, dtype=torch.float32, device=positions.device)
    frequencies = theta**exponents * math.pi / 2
    angles = (frequencies * (positions.unsqueeze(-1) * 2 - 1)).transpose(-1, -2).flatten(2)
    angles = F.pad(angles, (hidden_size // 2 - angles.shape[-1], 0))
    return torch.stack((angles.cos(), angles.sin()), dim=-1).unflatten(2, (num_heads, -1))


def grid_positions(*sizes: int, device: torch.device | None = None) -> Tensor:
    """Positions of the cells of a grid in raster order: [product of sizes, number of axes], int64."""
    axes = [torch.arange(size, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def apply_rotary_emb(hidden_states: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring channels of [B, S, H, E] by the table [1 or B, S, 1, E/2, 2], in fp32."""
    pairs = hidden_states.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler fuses real arithmetic but not complex numbers.
        real, imag = pairs.unbind(-1)
        cos, sin = freqs_cis.unbind(-1)
        rotated = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    else:
        # One complex product: 0.09 ms against 0.98 ms for the real form on [2, 576, 4, 64] with two cores.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(freqs_cis))
    return rotated.flatten(-2).to(hidden_states.dtype)
