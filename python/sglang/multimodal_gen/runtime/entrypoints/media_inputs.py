"""What clients give besides a prompt, from any way in: images, a mask, a last image, a video.

`MediaSources` are inputs as they were given, `DecodedInputs` what `media_reading` made of them: checked, and pixels.
Apart from that module, since most requests have no inputs and its decoders take long to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.configs.model_info import LOCAL_NAMES, GivenInputs, InputLimits, InputNames, SizeFromImage
from sglang.multimodal_gen.configs.sample.input_params import INPUT_FILES
from sglang.multimodal_gen.errors import InvalidType

if TYPE_CHECKING:
    import numpy as np

MAX_IMAGE_BYTES = 50_000_000
MAX_VIDEO_BYTES = 200_000_000
MAX_MASK_BYTES = 4_000_000
"""Of a mask whose transparency is read, which is OpenAI's form."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A decoded video: uint8 [T, H, W, 3] RGB, and frames a second where they are known."""

    frames: np.ndarray
    fps: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedInputs:
    """Pixels, uint8 RGB: `images` and `last_image` [H, W, 3]; `mask` [H, W], 255 where the first image is made anew."""

    images: tuple[np.ndarray, ...] = ()
    mask: np.ndarray | None = None
    last_image: np.ndarray | None = None
    video: Clip | None = None
    names: InputNames = LOCAL_NAMES

    def __bool__(self) -> bool:
        """Whether there are any."""
        return _any(self)

    @property
    def num_bytes(self) -> int:
        """Of all pixels."""
        arrays = (*self.images, self.mask, self.last_image, None if self.video is None else self.video.frames)
        return sum(array.nbytes for array in arrays if array is not None)

    def check(self, limits: InputLimits, *, strength: bool) -> None:
        """Refuse what the model does not take. Raises InvalidRequest."""
        limits.check(_given(self, strength=strength), self.names)

    def size_for(self, rule: SizeFromImage | None, *, max_area: int | None) -> tuple[int, int] | None:
        """(width, height) of the result by the model's rule; None without a rule or an image."""
        if rule is None or not self.images:
            return None
        height, width = self.images[0 if rule.source == "first" else -1].shape[:2]
        return rule.size(width, height, area=max_area)


NO_INPUTS = DecodedInputs()


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaSources:
    """Inputs that nobody has decoded yet. Each is a path, an open file, or what a Python caller holds: a PIL image, a
    uint8 array, for `video` also a list of frames or a Clip.

    `mask_is_transparency`: the mask is a PNG file whose transparent pixels are made anew, as OpenAI has it; else it is
    an image that is white there.
    """

    images: tuple[Any, ...] = ()
    mask: Any = None
    last_image: Any = None
    video: Any = None
    names: InputNames = LOCAL_NAMES
    mask_is_transparency: bool = False

    def __bool__(self) -> bool:
        """Whether there are any."""
        return _any(self)

    def check(self, limits: InputLimits, *, strength: bool) -> None:
        """As of decoded inputs, before anything is decoded."""
        limits.check(_given(self, strength=strength), self.names)


def _any(inputs: DecodedInputs | MediaSources) -> bool:
    return bool(inputs.images) or any(each is not None for each in (inputs.mask, inputs.last_image, inputs.video))


def _given(inputs: DecodedInputs | MediaSources, *, strength: bool) -> GivenInputs:
    return GivenInputs(
        num_images=len(inputs.images),
        mask=inputs.mask is not None,
        last_image=inputs.last_image is not None,
        video=inputs.video is not None,
        strength=strength,
    )


def split_media(values: Mapping[str, Any]) -> tuple[dict[str, Any], MediaSources]:
    """SamplingParams fields without inputs, and the inputs.

    Raises: InvalidType for an empty list of images.
    """
    images = values.get("image_path")
    if isinstance(images, list | tuple):
        if not images:
            raise InvalidType("image_path", images, "an image or a list of images")
    else:
        images = () if images is None else (images,)
    sources = MediaSources(
        images=tuple(images),
        mask=values.get("mask_path"),
        last_image=values.get("last_image_path"),
        video=values.get("video_path"),
    )
    return {name: value for name, value in values.items() if name not in INPUT_FILES}, sources
