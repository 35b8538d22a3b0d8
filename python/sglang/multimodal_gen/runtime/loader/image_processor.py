"""Pictures to what an image encoder takes, as the checkpoint's `preprocessor_config.json` says.

Pillow alone does what transformers' image processors do with it, so that their import is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.registry import read_json_object

FILE = "preprocessor_config.json"
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Resizing, a crop from the middle, scaling and normalisation, each left out where None.

    `size` and `crop_size` are (height, width); a `size` that is a number is the shorter edge's, aspect kept.
    """

    size: Size | int | None
    resample: Image.Resampling
    crop_size: Size | None
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageProcessor:
        """Read a parsed `preprocessor_config.json`. Raises CorruptCheckpoint for sizes that say nothing."""
        normalises = data.get("do_normalize", True)
        crop_size = _size(data, "crop_size") if data.get("do_center_crop") else None
        return cls(
            size=_size(data, "size") if data.get("do_resize", True) else None,
            resample=Image.Resampling(data.get("resample", Image.Resampling.BICUBIC)),
            crop_size=(crop_size, crop_size) if isinstance(crop_size, int) else crop_size,
            scale=data.get("rescale_factor", 1 / 255) if data.get("do_rescale", True) else None,
            mean=tuple(data["image_mean"]) if normalises else None,
            std=tuple(data["image_std"]) if normalises else None,
        )

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any sizes -> [N, 3, H, W] fp32."""
        return torch.stack([torch.from_numpy(self._pixels(image.convert("RGB"))) for image in images])

    def _pixels(self, image: Image.Image) -> np.ndarray:
        if self.size is not None:
            height, width = _fitted(image, self.size) if isinstance(self.size, int) else self.size
            image = image.resize((width, height), self.resample)
        if self.crop_size is not None:
            # Beyond the edges of a small picture the crop is black.
            top, left = (
                (side - crop) // 2 for side, crop in zip((image.height, image.width), self.crop_size, strict=True)
            )
            image = image.crop((left, top, left + self.crop_size[1], top + self.crop_size[0]))
        pixels = np.asarray(image, dtype=np.float64)
        if self.scale is not None:
            pixels = pixels * self.scale
        pixels = pixels.astype(np.float32)
        if self.mean is not None and self.std is not None:
            pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def load_image_processor(directory: Path) -> ImageProcessor:
    """The image processor in a checkpoint's directory. Raises CorruptCheckpoint when there is none."""
    return ImageProcessor.from_dict(read_json_object(directory / FILE))


def _fitted(image: Image.Image, shorter_edge: int) -> Size:
    """Height and width with the shorter edge as asked; the longer one is rounded down."""
    if image.height < image.width:
        return shorter_edge, int(shorter_edge * image.width / image.height)
    return int(shorter_edge * image.height / image.width), shorter_edge


def _size(data: Mapping[str, Any], name: str) -> Size | int:
    """`{"shortest_edge": 224}`, `{"height": 224, "width": 224}`, or in old files 224, the shorter edge."""
    value = data.get(name)
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        if isinstance(edge := value.get("shortest_edge"), int):
            return edge
        if isinstance(height := value.get("height"), int) and isinstance(width := value.get("width"), int):
            return height, width
    raise CorruptCheckpoint(
        f"{FILE} says {name}: {value!r}; accepted are shortest_edge, or height and width, in pixels"
    )
