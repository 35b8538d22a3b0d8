"""`RequestInputs`: what a request starts from besides its prompt, as the stages see it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from sglang.multimodal_gen.configs.model_info import GivenInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestInputs:
    """Decoded pixels, uint8 RGB on the CPU: `images` and `last_image` [H, W, 3], `video` [T, H, W, 3]; `mask` [H, W] is
    255 where the first image is made anew."""

    images: tuple[np.ndarray, ...] = ()
    mask: np.ndarray | None = None
    last_image: np.ndarray | None = None
    video: np.ndarray | None = None
    video_fps: float | None = None

    @property
    def given(self) -> GivenInputs:
        """Which there are, for `InputLimits.check`. The door checks the strength."""
        return GivenInputs(
            num_images=len(self.images),
            mask=self.mask is not None,
            last_image=self.last_image is not None,
            video=self.video is not None,
        )

    def digest(self) -> str:
        """SHA-256 over the content, equal for equal inputs; computed once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        found = hashlib.sha256(str(self.video_fps).encode())
        roles = [("mask", self.mask), ("last_image", self.last_image), ("video", self.video)]
        for role, array in [*(("image", image) for image in self.images), *roles]:
            if array is not None:
                found.update(f"{role}{array.shape}".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


EMPTY = RequestInputs()
