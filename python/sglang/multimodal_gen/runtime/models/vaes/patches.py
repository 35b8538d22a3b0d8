"""Squares of pixels as channels of one cell, for autoencoders that begin and end with them.

Shapes: B batch, C channels, T frames, H, W height and width, p pixels along each side of a patch.
"""

from __future__ import annotations

from torch import Tensor


def patchify(video: Tensor, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C·p·p, T, H/p, W/p]."""
    if patch_size == 1:
        return video
    cells = video.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))  # [B, C, T, h, p, w, p]
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """[B, C·p·p, T, H/p, W/p] -> [B, C, T, H, W]."""
    if patch_size == 1:
        return patches
    cells = patches.unflatten(1, (-1, patch_size, patch_size))  # [B, C, p, p, T, h, w]
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
