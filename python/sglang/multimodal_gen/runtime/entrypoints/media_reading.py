"""From inputs as they were given to pixels: all headers first, then all pixels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sglang.multimodal_gen.configs.declare import coerce, parameters
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import FieldError, InvalidRequest, shown
from sglang.multimodal_gen.errors_media import InvalidImage, InvalidMask, InvalidVideo
from sglang.multimodal_gen.runtime.entrypoints.media_decoding import (
    OpenedImage,
    Origin,
    PixelBudget,
    accept_image,
    as_clip,
    decode_video,
    open_image,
)
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import (
    MAX_MASK_BYTES,
    NO_INPUTS,
    Clip,
    DecodedInputs,
    MediaSources,
    split_media,
)


def read_sources(sources: MediaSources) -> DecodedInputs:
    """Decode everything, once all headers of images are found acceptable.

    Raises:
        InvalidRequest: InvalidImage, TooManyPixels, InvalidMask, InvalidVideo and their like.
    """
    if not sources:
        return NO_INPUTS
    budget, names = PixelBudget(), sources.names
    with contextlib.ExitStack() as files:

        def opened(source: Any, name: str, index: int = 0) -> OpenedImage:
            return _open(source, _origin(source, name, index, len(sources.images)), budget, files)

        images = [opened(source, names.images, index) for index, source in enumerate(sources.images)]
        last = None if sources.last_image is None else opened(sources.last_image, names.last_image)
        mask = None if sources.mask is None else _open_mask(sources, budget, files)
        video = None if sources.video is None else _read_video(sources.video, _origin(sources.video, names.video))
        decoded = DecodedInputs(
            images=tuple(image.rgb() for image in images),
            mask=None if mask is None else _decode_mask(mask, is_transparency=sources.mask_is_transparency),
            last_image=None if last is None else last.rgb(),
            video=video,
            names=names,
        )
    _check_mask_size(decoded)
    return decoded


def read_locally(values: Mapping[str, Any]) -> dict[str, Any]:
    """SamplingParams fields with files replaced by what is in them, so that a wrong path shows before an engine starts.

    Raises: InvalidRequest as `read_sources`.
    """
    rest, sources = split_media(values)
    decoded = read_sources(sources)
    found: dict[str, Any] = {
        "image_path": list(decoded.images) or None,
        "mask_path": decoded.mask,
        "last_image_path": decoded.last_image,
        "video_path": decoded.video,
    }
    return rest | {name: value for name, value in found.items() if value is not None}


# --- masks ---


def _open_mask(sources: MediaSources, budget: PixelBudget, files: contextlib.ExitStack) -> OpenedImage:
    mask, origin = sources.mask, _origin(sources.mask, sources.names.mask)
    if sources.mask_is_transparency and mask.seek(0, os.SEEK_END) > MAX_MASK_BYTES:
        raise InvalidMask(
            f"{origin.where}: larger than the {MAX_MASK_BYTES} bytes that are accepted", param=origin.param
        )
    with _as_mask_errors():
        return _open(mask, origin, budget, files)


def _decode_mask(mask: OpenedImage, *, is_transparency: bool) -> np.ndarray:
    with _as_mask_errors():
        if not is_transparency:
            return mask.grey()
        found = mask.transparency() if mask.image.format == "PNG" else None
    if found is None:
        raise InvalidMask(
            f"{mask.origin.where}: has no transparency, accepted is a PNG that is transparent where the image is made "
            "anew",
            param=mask.origin.param,
        )
    return found


@contextlib.contextmanager
def _as_mask_errors() -> Iterator[None]:
    """What is wrong with a mask's file is the mask's fault."""
    try:
        yield
    except InvalidImage as error:
        raise InvalidMask(error.message, param=error.param) from None


def _check_mask_size(decoded: DecodedInputs) -> None:
    names, mask = decoded.names, decoded.mask
    if mask is None:
        return
    if decoded.images:
        shape, what = decoded.images[0].shape[:2], names.images
    elif decoded.video is not None:
        shape, what = decoded.video.frames.shape[1:3], names.video
    else:
        return
    if mask.shape != shape:
        raise InvalidMask(
            f"{names.mask}: has {mask.shape[1]}x{mask.shape[0]} pixels, accepted are the {shape[1]}x{shape[0]} of "
            f"{what}",
            param=names.mask,
        )


# --- sources ---


def _origin(source: Any, name: str, index: int = 0, count: int = 1) -> Origin:
    """A path is named as it was typed; what came otherwise only by its number."""
    where = name if count == 1 else f"{name} {index + 1}"
    return Origin(param=name, where=f"{where}: {shown(str(source))}" if isinstance(source, str | Path) else where)


def _open(source: Any, origin: Origin, budget: PixelBudget, files: contextlib.ExitStack) -> OpenedImage:
    if isinstance(source, Image.Image):
        return accept_image(source, origin, budget)
    if isinstance(source, np.ndarray):
        return accept_image(Image.fromarray(_checked_array(source, origin)), origin, budget)
    return open_image(_file(source, origin, files, InvalidImage), origin, budget)


def _checked_array(array: np.ndarray, origin: Origin) -> np.ndarray:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise InvalidImage(
            f"{origin.where}: got an array {list(array.shape)} of {array.dtype}, accepted is uint8 [H, W, 3]",
            param=origin.param,
        )
    return np.ascontiguousarray(array)


def _file(source: Any, origin: Origin, files: contextlib.ExitStack, refusal: Callable[..., InvalidRequest]) -> BinaryIO:
    """`source` when it is a file already, or the file at this path."""
    if hasattr(source, "read"):
        file: BinaryIO = source
        return file
    try:
        path = coerce(parameters(SamplingParams)["video_path"], source)
        return files.enter_context(Path(path).open("rb"))
    except OSError as error:
        raise refusal(f"{origin.where}: cannot be read: {error.strerror}", param=origin.param) from None
    except FieldError as error:
        accepted = "a path, a PIL image or a uint8 array"
        raise type(error)(origin.param, error.value, accepted, code=error.code) from None


def _read_video(source: Any, origin: Origin) -> Clip:
    if isinstance(source, Clip):
        return source
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    elif isinstance(source, np.ndarray):
        raise InvalidVideo(
            f"{origin.where}: got an array {list(source.shape)}, accepted is uint8 [T, H, W, 3]", param=origin.param
        )
    with contextlib.ExitStack() as files:
        if not isinstance(source, list | tuple):
            return decode_video(_file(source, origin, files, InvalidVideo), origin)
        try:
            return as_clip([_open(frame, origin, PixelBudget(), files).rgb() for frame in source], origin)
        except InvalidImage as error:
            raise InvalidVideo(error.message, param=error.param) from None
