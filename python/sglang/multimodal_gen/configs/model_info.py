"""What only a loaded checkpoint knows, as the workers tell it to every other process."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    FramesNotSupported,
    IncompatibleParameters,
    MissingParameter,
    RequestTooLarge,
    SizeNotDivisible,
    SizeTooLarge,
    UnsupportedParameter,
)
from sglang.multimodal_gen.errors_media import TooManyImages


@dataclass(frozen=True, kw_only=True)
class InputNames:
    """What a way in calls its inputs, for messages."""

    images: str = "image_path"
    mask: str = "mask_path"
    last_image: str = "last_image_path"
    video: str = "video_path"


LOCAL_NAMES = InputNames()


@dataclass(frozen=True, kw_only=True)
class GivenInputs:
    """Which inputs a request has."""

    num_images: int = 0
    mask: bool = False
    last_image: bool = False
    video: bool = False
    strength: bool = False


class InputLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which inputs besides the prompt the loaded model takes; by default none. A mask is for the first image, or for
    the video where there is no image."""

    min_images: int = 0
    max_images: int = 0
    takes_mask: bool = False
    requires_mask: bool = False
    takes_last_image: bool = False
    requires_last_image: bool = False
    takes_video: bool = False
    requires_video: bool = False
    takes_strength: bool = False

    def check(self, given: GivenInputs, names: InputNames = LOCAL_NAMES) -> None:
        """Raises UnsupportedParameter, MissingParameter, TooManyImages or IncompatibleParameters."""
        taken = {
            names.images: (given.num_images > 0, self.max_images > 0),
            names.mask: (given.mask, self.takes_mask),
            names.last_image: (given.last_image, self.takes_last_image or self.requires_last_image),
            names.video: (given.video, self.takes_video or self.requires_video),
            "strength": (given.strength, self.takes_strength),
        }
        for name, (is_given, is_taken) in taken.items():
            if is_given and not is_taken:
                raise UnsupportedParameter(name, f"the model works from {self.in_words()}")
        if given.num_images > self.max_images:
            raise TooManyImages(
                f"{names.images}: got {given.num_images} images, accepted is {self._images_in_words()}",
                param=names.images,
            )
        if given.num_images < self.min_images:
            got = f"only {given.num_images}" if given.num_images else "nothing"
            raise MissingParameter(
                f"{names.images}: got {got}, accepted is {self._images_in_words()}", param=names.images
            )
        if self.requires_last_image and not given.last_image:
            raise MissingParameter(f"{names.last_image}: got nothing, accepted is one image", param=names.last_image)
        if self.requires_video and not given.video:
            raise MissingParameter(f"{names.video}: got nothing, accepted is one video", param=names.video)
        if self.requires_mask and not given.mask:
            raise MissingParameter(f"{names.mask}: got nothing, accepted is a mask of the image", param=names.mask)
        if not given.num_images and not given.video:
            self._check_alone(given, names)

    def _check_alone(self, given: GivenInputs, names: InputNames) -> None:
        """Raises for what says something about an image or a video that is not there."""
        others = [names.images] * (self.max_images > 0) + [names.video] * (self.takes_video or self.requires_video)
        for name, is_given in ((names.mask, given.mask), ("strength", given.strength and not given.last_image)):
            if is_given:
                raise IncompatibleParameters(
                    f"{name}: says how to change what is not there, accepted is {name} with {' or '.join(others)}",
                    param=name,
                )

    def in_words(self) -> str:
        """What the model works from."""
        parts = ["text"]
        if self.max_images:
            parts.append(self._images_in_words())
        if self.takes_mask:
            parts.append("a mask")
        if self.takes_last_image or self.requires_last_image:
            parts.append("a last image")
        if self.takes_video or self.requires_video:
            parts.append("a video")
        if len(parts) == 1:
            return "text alone"
        return ", ".join(parts[:-1]) + " and " + parts[-1]

    def _images_in_words(self) -> str:
        low, high = self.min_images, self.max_images
        if high == 1:
            return "one image"
        if low == high:
            return f"{high} images"
        return f"{low} to {high} images" if low else f"up to {high} images"


STARTS_FROM_A_PICTURE = InputLimits(max_images=1, takes_mask=True, takes_strength=True)
"""Of models that are trained on text alone and make pictures: one to start from, and a mask of what is made anew."""
STARTS_FROM_A_CLIP = InputLimits(max_images=1, takes_mask=True, takes_video=True, takes_strength=True)
"""Of those that make clips: a clip, or a picture for a single frame."""


class SizeFromImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a result's size follows from an input image when none is asked for: the image's aspect ratio, about `area`
    pixels, both sides multiples of `multiple`. `source`: which of several images."""

    area: int
    multiple: int
    source: Literal["first", "last"]

    def size(self, width: int, height: int, *, area: int | None = None) -> tuple[int, int]:
        """(width, height) of the result for an image of this size; `area` is used instead of the model's own."""
        ratio = width / height
        exact_width = math.sqrt((area or self.area) * ratio)
        sides = (exact_width, exact_width / ratio)
        found = [max(self.multiple, round(side / self.multiple) * self.multiple) for side in sides]
        return found[0], found[1]


class AreaRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For models that make pictures of one area: what is asked for says the aspect ratio, `area` how many pixels,
    unless the request has a `max_area`. Both sides are rounded down to multiples of `multiple`."""

    area: int
    multiple: int

    def size(self, width: int, height: int, max_area: int | None) -> tuple[int, int]:
        """(width, height) of what is made."""
        ratio, area = width / height, max_area or self.area
        sides = (round((area * ratio) ** 0.5), round((area / ratio) ** 0.5))
        found = [max(self.multiple, side // self.multiple * self.multiple) for side in sides]
        return found[0], found[1]


class TaskLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What sizes the loaded model can do, and what it takes besides a text; checked at the door so that no bad request
    reaches a worker. `max_cost` is the server's: pixels x frames x steps x outputs of one request."""

    size_multiple: int
    max_pixels: int
    frame_stride: int
    max_frames: int
    max_sequence_length: int
    max_side: int | None = None
    inputs: InputLimits = InputLimits()
    size_from_image: SizeFromImage | None = None
    area_rule: AreaRule | None = None
    takes_length_from_video: bool = False
    max_cost: int | None = None

    def sized(self, params: SamplingParams) -> SamplingParams:
        """Complete parameters with the size that is made; the same again for what it returned."""
        if self.area_rule is None or params.width is None or params.height is None:
            return params
        width, height = self.area_rule.size(params.width, params.height, params.max_area)
        return dataclasses.replace(params, width=width, height=height, max_area=width * height)

    def check(self, params: SamplingParams) -> None:
        """Raises SizeTooLarge, SizeNotDivisible, FramesNotSupported or RequestTooLarge for complete parameters out of
        these limits."""
        width, height, num_frames = params.width, params.height, params.num_frames
        assert width is not None and height is not None and num_frames is not None, "defaults are merged in"
        if width * height > self.max_pixels:
            raise SizeTooLarge(
                f"size: got {width}x{height}, which is {width * height} pixels, accepted are at most "
                f"{self.max_pixels} pixels",
                param="size",
            )
        if self.max_side is not None and max(width, height) > self.max_side:
            raise SizeTooLarge(
                f"size: got {width}x{height}, accepted are at most {self.max_side} pixels along each side", param="size"
            )
        if width % self.size_multiple or height % self.size_multiple:
            raise SizeNotDivisible(width=width, height=height, multiple=self.size_multiple)
        if num_frames > self.max_frames or (num_frames - 1) % self.frame_stride:
            raise FramesNotSupported(num_frames, stride=self.frame_stride, maximum=self.max_frames)
        if self.max_cost is not None and params.cost > self.max_cost:
            raise RequestTooLarge(
                width=width,
                height=height,
                num_frames=num_frames,
                steps=params.num_inference_steps or 1,
                outputs=params.num_outputs,
                limit=self.max_cost,
            )


class ComponentRead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What reading a component's weights took the first rank: bytes as they are stored, all of them even where ranks
    share them. On a CPU they are mapped, and read when they are used first."""

    component: str
    num_bytes: int
    seconds: float


class QuantizedWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a model's weights this rank holds in eight bits: how many linear layers, how many are left as they were,
    how many of the quantised ones compute in fp8, and the bytes of their values and scales."""

    method: str
    granularity: str
    num_layers: int
    num_kept: int
    num_fp8_products: int
    weight_bytes: int

    def __str__(self) -> str:
        total, gib = self.num_layers + self.num_kept, self.weight_bytes / 2**30
        products = "products of dequantised weights"
        if self.num_fp8_products == self.num_layers:
            products = "products in fp8"
        elif self.num_fp8_products:
            products = f"products of {self.num_fp8_products} in fp8, of the others of dequantised weights"
        return (
            f"{self.method}, a scale for each {self.granularity}: {self.num_layers} of {total} linear layers in "
            f"{gib:.2f} GiB, {products}"
        )


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What only the checkpoint knows, told by a worker once it has loaded. `defaults` fill unset SamplingParams."""

    name: str
    family: str = ""
    licence: str = ""
    pipeline_class: str
    tasks: tuple[str, ...]
    precision: str
    device: str
    num_parameters: int
    weight_bytes: int
    load_seconds: float
    limits: TaskLimits
    defaults: SamplingParams
    gives_previews: bool = True
    reads: tuple[ComponentRead, ...] = ()
    quantization: QuantizedWeights | None = None

    def check_previews(self, number: int, *, param: str) -> None:
        """Raises UnsupportedParameter when previews are asked for, under the name `param`, that cannot be had."""
        if number > 0 and not self.gives_previews:
            raise UnsupportedParameter(param, f"{self.name} keeps what it has so far in a form of its own")
