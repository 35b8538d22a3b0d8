"""The LTX-Video transformer as the denoising stage calls it, and where its tokens lie in space and time.

Source: arXiv:2501.00103, https://github.com/Lightricks/LTX-Video
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.rotary import fractional_rotary_table, grid_positions
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache
from sglang.multimodal_gen.runtime.models.dits.ltx import LTXVideoTransformer3DModel
from sglang.multimodal_gen.runtime.pipelines.ltx_conditioning import (
    add_noise_to_given_frames,
    given_frames,
    given_timestep,
    leading_frames,
)
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, Row, pack, unpack
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

# What frame, row and column numbers are fractions of: 20 seconds, 2048 pixels.
_POSITION_BASES = (20, 2048, 2048)

Positions = list[Tensor]
"""Seconds, rows in pixels and columns in pixels of all tokens, each [S] fp32."""


class LTXDenoiser(Denoiser):
    """The velocity of video latents, one token for each latent cell; given frames are told to be clean."""

    transformer: LTXVideoTransformer3DModel
    counts_causally: ClassVar[bool] = False
    """Whether positions are those of the first pixel frames: the first latent frame holds one, each other several."""

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        latents = self.stacked_latents(rows)
        text, lengths = self.stacked_text(rows)
        grid = (latents.shape[2], latents.shape[3], latents.shape[4])
        table = self.rotary_table(rows[0].req, grid)
        timesteps = self.frame_timesteps(rows, grid[0])
        tokens = self.transformer(pack(latents, 1), timesteps, text, table, lengths, self.embedded(rows))
        return list(unpack(tokens, grid, 1))

    def embed_text(self, row: Row) -> Tensor:
        """See Denoiser: the keys and values of all blocks."""
        return self.transformer.embed_text(*self.stacked_text([row]))[0]

    def batch_key(self, req: Req) -> str:
        """The frame rate is where frames stand in time; texts may differ in length."""
        return f"fps{req.params.fps}:leading{leading_frames(req)}"

    def num_tokens(self, req: Req) -> int:
        """See Denoiser; leading frames have tokens of their own."""
        assert req.latent_shape is not None, "planned by the stages before"
        return super().num_tokens(req) + len(leading_frames(req)) * math.prod(req.latent_shape[2:])

    def frame_timesteps(self, rows: Sequence[Row], num_frames: int) -> Tensor:
        """[B] where all frames are noise, else [B, T] with 0, or what `strength` leaves, for given frames."""
        if not any(given_frames(row.req) for row in rows):
            return self.timesteps(rows)
        values = []
        for row in rows:
            frames = [row.timestep] * num_frames
            for frame in given_frames(row.req):
                frames[frame] = given_timestep(row.req, row.timestep)
            values.append(frames)
        return self.numbers(values)

    def rotary_table(self, req: Req, grid: tuple[int, int, int]) -> Tensor:
        """The table of a clip with the request's frame rate."""
        assert req.params.fps is not None, "the family has a default"
        config, geometry = self.transformer.config, self.geometry
        strides = (geometry.temporal_ratio, geometry.spatial_ratio, geometry.spatial_ratio)
        positions = causal_positions if self.counts_causally else latent_positions
        clip = ClipGrid(grid, strides, req.params.fps, tuple(leading_frames(req)))
        return clip_rotary_table(positions, clip, config.hidden_size, config.num_attention_heads, self.device)


class LTXConditionDenoiser(LTXDenoiser):
    """Given frames get fresh noise before each step."""

    counts_causally = True

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """See Denoiser."""
        for row in rows:
            add_noise_to_given_frames(row.req)
        return super().predict(rows)


class ClipGrid(NamedTuple):
    """Latent cells along time, height and width, how many frames and pixels one has on each axis, and the frame rate.

    `leading`: of the latent frames, the first ones are these frames of the clip; the others count from 0.
    """

    grid: tuple[int, int, int]
    strides: tuple[int, int, int]
    fps: int
    leading: tuple[int, ...] = ()


def latent_positions(clip: ClipGrid) -> Positions:
    """Those of latent cells, where all frames are equally far apart."""
    assert not clip.leading, "such models take no picture but the first"
    scales = (clip.strides[0] / clip.fps, *clip.strides[1:])
    return [axis.float() * scale for axis, scale in zip(grid_positions(*clip.grid).unbind(-1), scales, strict=True)]


def causal_positions(clip: ClipGrid) -> Positions:
    """The same, where the first latent frame holds one frame only and so comes right before the second's first."""
    cells, rows, columns = grid_positions(*clip.grid).unbind(-1)
    own = torch.arange(clip.grid[0] - len(clip.leading))
    first_frames = (own * clip.strides[0] + 1 - clip.strides[0]).clamp(min=0)
    frames = torch.cat((torch.tensor(clip.leading, dtype=own.dtype), first_frames))[cells]
    return [frames.float() * (1.0 / clip.fps), (rows * clip.strides[1]).float(), (columns * clip.strides[2]).float()]


# A clip of 121 frames at 704x1216 takes 219 MB with the 13B model's width; two shapes are alive at a time.
@table_cache(2)
def clip_rotary_table(
    positions: Callable[[ClipGrid], Positions], clip: ClipGrid, hidden_size: int, num_heads: int, device: torch.device
) -> Tensor:
    """Table [1, S, N, E/2, 2] of a clip, made on the CPU."""
    # A table made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        return table_of(positions(clip), hidden_size, num_heads).to(device)


def table_of(positions: Positions, hidden_size: int, num_heads: int) -> Tensor:
    """Table [1, S, N, E/2, 2] of tokens at these positions."""
    fractions = [axis / base for axis, base in zip(positions, _POSITION_BASES, strict=True)]
    return fractional_rotary_table(torch.stack(fractions, dim=-1), hidden_size, num_heads)
