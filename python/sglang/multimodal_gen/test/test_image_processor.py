"""Pictures for image encoders, against transformers' image processors on Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.runtime.loader.image_processor import ImageProcessor, load_image_processor


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Random colours; the same for the same size."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(50, 31), (20, 47), (32, 32), (9, 200)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 33}, "crop_size": {"height": 30, "width": 24}, "resample": 2},
        {"size": {"height": 18, "width": 26}, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 24, "width": 24}, "do_normalize": False},
    ],
    ids=["clip", "sides", "stretched", "padded"],
)
def test_pixels_equal_those_of_transformers(tmp_path: Path, options: dict[str, Any], size: tuple[int, int]) -> None:
    reference = CLIPImageProcessorPil(**options)
    reference.save_pretrained(tmp_path)
    expected = reference(images=picture(*size), return_tensors="pt").pixel_values
    assert torch.equal(load_image_processor(tmp_path)([picture(*size)]), expected)


def test_pictures_of_several_sizes_and_modes_make_one_batch() -> None:
    processor = ImageProcessor.from_dict(CLIPImageProcessorPil().to_dict())
    images = [picture(40, 60), picture(70, 30, "L"), picture(30, 30, "RGBA")]
    batch = processor(images)
    assert batch.shape == (3, 3, 224, 224)
    for row, image in zip(batch, images, strict=True):
        assert torch.equal(row, processor([image])[0])


def test_old_files_name_the_shorter_edge_alone() -> None:
    values = CLIPImageProcessorPil().to_dict()
    assert ImageProcessor.from_dict(values | {"size": 224, "crop_size": 224}) == ImageProcessor.from_dict(values)


@pytest.mark.parametrize("size", [None, {}, {"height": 4}, "224"])
def test_a_size_that_says_nothing_is_refused(size: Any) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"preprocessor_config.json says size: .*accepted are shortest_edge"):
        ImageProcessor.from_dict(CLIPImageProcessorPil().to_dict() | {"size": size})
