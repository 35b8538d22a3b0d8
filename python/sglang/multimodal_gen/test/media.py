"""Pictures, clips and masks that tests draw."""

from __future__ import annotations

import numpy as np


def picture(width: int, height: int, seed: int = 3) -> np.ndarray:
    """Colours that change slowly, and some noise: [height, width, 3] uint8."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([128 + 100 * np.sin(rows / 9 + seed), 255 * columns / width, 128 + 90 * np.cos(columns / 5)], -1)
    return np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def clip(num_frames: int, width: int, height: int, seed: int = 3) -> np.ndarray:
    """A picture that moves to the right: [num_frames, height, width, 3] uint8."""
    wide = picture(width + 2 * num_frames, height, seed)
    return np.stack([wide[:, 2 * frame : 2 * frame + width] for frame in range(num_frames)])


def disc(width: int, height: int) -> np.ndarray:
    """A mask [height, width]: white in a disc."""
    rows, columns = np.mgrid[0:height, 0:width]
    inside = (rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (height / 3) ** 2
    return np.where(inside, 255, 0).astype(np.uint8)
