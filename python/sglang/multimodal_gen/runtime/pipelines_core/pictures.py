"""Input pictures on their way to an encoder: resized, then pixels in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resized(picture: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [height, width, 3], by Lanczos's filter, whatever that does to the aspect ratio."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def as_video(frames: Sequence[np.ndarray]) -> Tensor:
    """T times uint8 [H, W, 3] -> [1, 3, T, H, W] fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(frames)).float() / 255
    return (2 * pixels - 1).permute(3, 0, 1, 2).unsqueeze(0)
