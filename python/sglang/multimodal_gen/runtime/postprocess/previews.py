"""Previews: some frames of latents to a picture in a file's bytes. No torch."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sglang.multimodal_gen.runtime.postprocess.formats import OutputFormat

LONGEST_SIDE = 320
"""Pixels of a clip's preview."""
_CLIP_QUALITY = 60
_FASTEST = 0  # how much time WebP takes to compress, from 0 to 6
_PNG_LEVEL = 1


@dataclass(frozen=True, kw_only=True)
class EncodedPreview:
    """A picture as a file's bytes."""

    media_type: str
    image: bytes


def colours(latents: np.ndarray, weights: np.ndarray, *, patch: int) -> np.ndarray:
    """Frames [F, h·p, w·p, 3] uint8 of latents [C, F, h, w], the first of which is the first of its clip.

    `weights` [2, C + 1, 3·p·p]: of the first frame and of the others, see PreviewLatents.
    """
    channels, num_frames, height, width = latents.shape
    cells = latents.astype(np.float32).reshape(channels, num_frames, -1)
    frames = []
    for index in range(num_frames):
        weight = weights[min(index, 1)]
        pixels = (cells[:, index].T @ weight[:-1] + weight[-1]).reshape(height, width, 3, patch, patch)
        frames.append(pixels.transpose(0, 3, 1, 4, 2).reshape(height * patch, width * patch, 3))
    return ((np.stack(frames) + 1) * 127.5).clip(0, 255).round().astype(np.uint8)


def encode_still(frame: np.ndarray, *, width: int, height: int, chosen: OutputFormat, percent: int) -> EncodedPreview:
    """A picture [h, w, 3] uint8 at the size, in the format and of the quality that the result will have."""
    picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    # Previews are looked at and thrown away: time matters more than bytes.
    options = {"compress_level": _PNG_LEVEL} if chosen.name == "png" else {"quality": percent}
    return _saved([picture], chosen.name, **options)


def encode_clip(frames: np.ndarray, *, width: int, height: int, seconds: float) -> EncodedPreview:
    """Frames [F, h, w, 3] uint8 as a small WebP, animated if there are several, which takes as long as the clip."""
    scale = min(1.0, LONGEST_SIDE / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    options: dict[str, Any] = {"quality": _CLIP_QUALITY, "method": _FASTEST}
    if len(pictures) > 1:
        milliseconds = max(1, round(1000 * seconds / len(pictures)))
        options |= {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
    return _saved(pictures, "webp", **options)


def _saved(pictures: list[Image.Image], file_format: str, **options: Any) -> EncodedPreview:
    buffer = io.BytesIO()
    pictures[0].save(buffer, format=file_format, **options)
    return EncodedPreview(media_type=f"image/{file_format}", image=buffer.getvalue())
