"""Splitting large frames and long clips into overlapping tiles and blending the results back together.

Cells are what the tiled network takes or gives: latents on one side, pixels (or patches of them) on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from sglang.multimodal_gen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile size and the distance between tiles, in pixels; neighbours overlap by the difference."""

    tile_height: int = 256
    tile_width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self) -> None:
        for side in ("height", "width"):
            tile, stride = getattr(self, f"tile_{side}"), getattr(self, f"stride_{side}")
            if not 0 < stride <= tile:
                raise InvalidRequest(
                    f"tile stride_{side} is {stride}; it must be from 1 to tile_{side} = {tile}", param=f"stride_{side}"
                )

    def halved(self) -> Tiling:
        """Tiles of half the size with the same share of overlap."""
        return self.scaled(2)

    def scaled(self, divisor: int) -> Tiling:
        """The same tiles counted in cells of `divisor` pixels."""
        return Tiling(
            tile_height=self.tile_height // divisor,
            tile_width=self.tile_width // divisor,
            stride_height=self.stride_height // divisor,
            stride_width=self.stride_width // divisor,
        )

    def split(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """Rows and columns of each tile of a [.., height, width] grid in cells, in reading order."""
        tops, lefts = self._starts(height, width)
        return [(slice(y, y + self.tile_height), slice(x, x + self.tile_width)) for y, x in product(tops, lefts)]

    def join(self, tiles: list[Tensor], height: int, width: int) -> Tensor:
        """Blend the tiles [B, C, T, tile, tile] of `split` into [B, C, T, height, width], in output cells."""
        if len(tiles) == 1:
            return tiles[0]
        num_columns = len(self._starts(height, width)[1])
        rows: list[list[Tensor]] = []
        for index, tile in enumerate(tiles):
            row, column = divmod(index, num_columns)
            if column == 0:
                rows.append([])
            if row > 0:
                tile = blend(rows[row - 1][column], tile, dim=-2, overlap=self.tile_height - self.stride_height)
            if column > 0:
                tile = blend(rows[row][column - 1], tile, dim=-1, overlap=self.tile_width - self.stride_width)
            rows[row].append(tile)
        bands = [torch.cat([tile[..., : self.stride_width] for tile in row], dim=-1) for row in rows]
        joined = torch.cat([band[..., : self.stride_height, :] for band in bands], dim=-2)
        return joined[..., :height, :width]

    def _starts(self, height: int, width: int) -> tuple[range, range]:
        """First row and first column of the tiles; a grid that fits into one tile is not cut."""
        if height <= self.tile_height and width <= self.tile_width:
            return range(1), range(1)
        return range(0, height, self.stride_height), range(0, width, self.stride_width)


@dataclass(frozen=True, kw_only=True)
class TemporalTiling:
    """Pieces of a clip that are decoded (or encoded) apart, for networks whose norms run over all frames they see.

    A piece takes `tile_frames` and one frame more, with which it meets the end of the piece before; that one is
    dropped again, except in the clip's first piece. `stride_frames` further on the next piece starts.
    """

    tile_frames: int = 16
    stride_frames: int = 12

    def scaled(self, divisor: int) -> TemporalTiling:
        """The same pieces counted in latent frames of `divisor` frames."""
        return TemporalTiling(tile_frames=self.tile_frames // divisor, stride_frames=self.stride_frames // divisor)

    def split(self, num_frames: int) -> list[slice]:
        """The frames of each piece; a clip of up to `tile_frames` is not cut."""
        if num_frames <= self.tile_frames:
            return [slice(0, num_frames)]
        # A piece that starts at the last frame would be dropped whole.
        return [slice(at, at + self.tile_frames + 1) for at in range(0, num_frames - 1, self.stride_frames)]

    def join_next(self, piece: Tensor, before: Tensor | None, *, last: bool) -> tuple[Tensor, Tensor]:
        """The next piece [B, C, T, H, W] -> the frames that it adds to the clip, and the end that the next one meets.

        `before` is what the piece before left; None for the clip's first.
        """
        kept = self.stride_frames + (before is None)
        if before is not None:
            piece = blend(before, piece[:, :, 1:], dim=-3, overlap=self.tile_frames - self.stride_frames)
        # A copy, because a view would keep the whole piece in memory.
        return (piece, piece[:, :, :0]) if last else (piece[:, :, :kept], piece[:, :, kept:].clone())


def blend(before: Tensor, tile: Tensor, *, dim: int, overlap: int) -> Tensor:
    """Fade from the end of the tile before into the start of this one, linearly over the overlap."""
    overlap = min(before.shape[dim], tile.shape[dim], overlap)
    if overlap == 0:
        return tile
    ramp = torch.arange(overlap, dtype=tile.dtype, device=tile.device) / overlap
    ramp = ramp.view(-1, *(1,) * (-1 - dim))
    ending = before.narrow(dim, before.shape[dim] - overlap, overlap)
    start = ending * (1 - ramp) + tile.narrow(dim, 0, overlap) * ramp
    return torch.cat((start, tile.narrow(dim, overlap, tile.shape[dim] - overlap)), dim=dim)


def over_tiles(
    network: Callable[[Tensor], Tensor], frames: Tensor, cut: Tiling | None, joined: Tiling | None
) -> Tensor:
    """The network over tiles of [B, C, T, H, W] that `cut` makes, put together as `joined` says; None: over it all."""
    if cut is None or joined is None:
        return network(frames)
    tiles = [network(frames[..., rows, columns]) for rows, columns in cut.split(*frames.shape[3:])]
    if len(tiles) == 1:
        return tiles[0]
    # Tile and stride are in the same relation on both sides; the size is what the network made of it.
    height, width = (size * joined.tile_height // cut.tile_height for size in frames.shape[3:])
    return joined.join(tiles, height, width)
