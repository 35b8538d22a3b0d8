"""Clips to encode, and what came of them: shared by the tests of post-processing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from sglang.multimodal_gen.runtime.postprocess.saving import OutputWriter


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """A request's output fields, as saving reads them."""

    prompt: str = "a red circle moving right"
    seed: int = 7
    fps: int = 16
    output_file_name: str | None = None
    output_format: str | None = None
    output_quality: str = "default"
    output_compression: int | None = None
    x264_preset: str | None = None
    thumbnail: bool = False
    contact_sheet: bool = False


def clip(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A soft gradient with a red disc that moves right; uint8 [T, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    background = np.stack([60 + 64 * x / width, 90 + 48 * y / height, 180 - 64 * x / width], axis=-1)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for t in range(num_frames):
        centre = width * (0.25 + 0.5 * t / max(1, num_frames - 1))
        inside = 1 / (1 + np.exp(np.hypot(x - centre, y - height / 2) - height / 4))[..., None]
        frames[t] = background * (1 - inside) + np.array([200, 60, 70]) * inside
    return frames


def psnr(got: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((got.astype(np.float64) - expected) ** 2).mean()))


def save(
    frames: np.ndarray,
    directory: Path,
    *,
    chunk: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    **wishes: Any,
) -> Path:
    writer = OutputWriter(Wishes(**wishes), str(directory), num_frames=len(frames), metadata=metadata)
    for begin in range(0, len(frames), chunk or len(frames)):
        writer.write(frames[begin : begin + (chunk or len(frames))])
    return writer.close().output


def decode(path: Path) -> tuple[np.ndarray, Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
        return frames, {
            "fps": (len(decoded) - 1) / (decoded[-1].time - decoded[0].time),
            "codec": stream.codec_context.name,
            "pixels": stream.codec_context.pix_fmt,
            "matrix": stream.codec_context.colorspace,
        }
