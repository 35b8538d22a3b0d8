"""`RequestInputs`: the pictures, masks and clips of a request, decoded and checked before they reach a worker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RequestInputs:
    """NumPy uint8 arrays: `images` and `last_image` [H, W, 3] RGB, `mask` [H, W] with 255 where the picture is to be
    made anew, `video` [T, H, W, 3]."""

    images: tuple[np.ndarray, ...] = ()
    mask: np.ndarray | None = None
    last_image: np.ndarray | None = None
    video: np.ndarray | None = None
    video_fps: float | None = None

    def digest(self) -> str:
        """Equal for equal content."""
        state = hashlib.sha256()
        for name, array in self._arrays():
            state.update(f"{name} {array.shape}".encode())
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from ((f"image {index}", image) for index, image in enumerate(self.images))
        for name in ("mask", "last_image", "video"):
            if (array := getattr(self, name)) is not None:
                yield name, array


EMPTY = RequestInputs()
