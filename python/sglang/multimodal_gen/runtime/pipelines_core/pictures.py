"""Pictures, masks and clips of a request as tensors, resized as diffusers' image processor does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_OPAQUE = 0.5


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] or [H, W] -> the same at another size, with Lanczos' filter."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def clip_of(frames: Sequence[np.ndarray], height: int, width: int) -> Tensor:
    """Frames uint8 [H, W, 3] of any size -> fp32 [1, 3, T, height, width] in [-1, 1]."""
    stacked = np.stack([resized(frame, height, width) for frame in frames])
    # In this order of operations, so that the bits agree.
    return 2.0 * torch.from_numpy(stacked.astype(np.float32) / 255.0).permute(3, 0, 1, 2).unsqueeze(0) - 1.0


def mask_of(mask: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H, W] -> fp32 [1, 1, height, width]: 1 where the picture is made anew, else 0."""
    values = torch.from_numpy(resized(mask, height, width).astype(np.float32) / 255.0)
    return (values >= _OPAQUE).float()[None, None]


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """[1, 1, H, W] of pixels -> [1, 1, height, width] of latent cells: that of the pixel in each cell's corner."""
    return F.interpolate(mask, size=(height, width))
