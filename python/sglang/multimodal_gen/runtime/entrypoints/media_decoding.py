"""From files to pixels: images with Pillow, videos with PyAV. What a file is, its bytes say; names and types do not.

Headers are read first, and what they announce is refused before anything is decoded. Nothing of a decoder's own error
texts leaves this module: they hold paths and addresses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.errors_media import (
    ImageTooLarge,
    InvalidImage,
    InvalidVideo,
    TooManyPixels,
    VideoTooLarge,
    VideoTooLong,
)
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, Clip

MAX_IMAGE_PIXELS = 50_000_000
"""Of one image, all its frames counted: an animation gives its first frame, but costs what its header announces."""
MAX_TOTAL_PIXELS = 100_000_000
"""Of all images of a request together."""
MIN_SIDE, MAX_SIDE = 16, 16384
MAX_VIDEO_FRAMES = 2000
MAX_VIDEO_PIXELS = 250_000_000
"""Of all frames of a video together: three times as many bytes."""

_IMAGE_KINDS = "PNG, JPEG, WebP or BMP"
_VIDEO_KINDS = "MP4, WebM or GIF"
_SNIFFED_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an input came from: `param` is the parameter's name, `where` is how sentences begin."""

    param: str
    where: str


@dataclass
class PixelBudget:
    """What is left of MAX_TOTAL_PIXELS."""

    left: int = field(default=MAX_TOTAL_PIXELS)

    def take(self, pixels: int, origin: Origin) -> None:
        """Raises TooManyPixels when the images of the request have more together."""
        self.left -= pixels
        if self.left < 0:
            raise TooManyPixels(
                f"{origin.where}: with it the images have more than the {MAX_TOTAL_PIXELS} pixels that are accepted "
                "together",
                param=origin.param,
            )


# --- images ---


@contextlib.contextmanager
def _foreign_errors(refusal: ServingError) -> Iterator[None]:
    """Turn whatever a decoder raises into `refusal`.

    Broad, since decoders raise all kinds on broken files (OSError, SyntaxError, struct.error, IndexError, …).
    """
    try:
        yield
    except ServingError:
        raise
    except Exception:
        raise refusal from None


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header has been read and accepted. Its file must stay open until it is decoded."""

    image: Image.Image
    origin: Origin

    def rgb(self) -> np.ndarray:
        """[H, W, 3] uint8, upright. Alpha is dropped, grey is repeated, 16 bits lose their lower 8, CMYK and palettes
        are converted, an animation gives its first frame. Raises InvalidImage."""
        with self._decoding():
            return _as_rgb(self._upright())

    def grey(self) -> np.ndarray:
        """[H, W] uint8, upright. Raises InvalidImage."""
        with self._decoding():
            return np.array(Image.fromarray(_as_rgb(self._upright())).convert("L"))

    def transparency(self) -> np.ndarray | None:
        """[H, W] uint8, upright, 255 where the image is fully transparent; None for an image without alpha."""
        with self._decoding():
            image = self._upright()
            if "transparency" in image.info:
                image = image.convert("RGBA")
            if "A" not in image.getbands():
                return None
            return 255 - np.array(image.getchannel("A"))

    def _upright(self) -> Image.Image:
        self.image.load()
        return ImageOps.exif_transpose(self.image)

    def _decoding(self) -> contextlib.AbstractContextManager[None]:
        origin = self.origin
        return _foreign_errors(InvalidImage(f"{origin.where}: its data is damaged or cut short", param=origin.param))


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        high_byte = (np.asarray(image) >> 8).astype(np.uint8)  # Pillow would clip all above 255
        return np.repeat(high_byte[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def open_image(file: BinaryIO, origin: Origin, budget: PixelBudget) -> OpenedImage:
    """Read and check the header of an image file; nothing is decoded.

    Raises:
        InvalidImage: empty, of another format, or too small.
        ImageTooLarge: too many bytes.
        TooManyPixels: too many pixels in this image, or with the images before it.
    """
    if _num_bytes(file) > MAX_IMAGE_BYTES:
        raise ImageTooLarge(
            f"{origin.where}: larger than the {MAX_IMAGE_BYTES} bytes that are accepted", param=origin.param
        )
    head = _head(file)
    if not head:
        raise InvalidImage(f"{origin.where}: is empty, accepted is a {_IMAGE_KINDS} image", param=origin.param)
    refusal = InvalidImage(f"{origin.where}: not a {_IMAGE_KINDS} image that can be read", param=origin.param)
    with _foreign_errors(refusal):
        if _is_webp(head):
            # Opening one allocates for the size that the header announces.
            _check_pixels(*_webp_size(head), 1, origin, PixelBudget())
        image = _plugin(head, refusal)(file)
        width, height = image.size
        _check_pixels(width, height, getattr(image, "n_frames", 1), origin, budget)
    return OpenedImage(image, origin)


def accept_image(image: Image.Image, origin: Origin, budget: PixelBudget) -> OpenedImage:
    """A PIL image that the caller made. Raises InvalidImage or TooManyPixels for its size."""
    _check_pixels(*image.size, 1, origin, budget)
    return OpenedImage(image, origin)


def _plugin(head: bytes, refusal: InvalidImage) -> Any:
    """Pillow's own class for what the bytes begin with; its `open` would also try decoders that nobody needs."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if _is_webp(head):
        return WebPImageFile
    if head.startswith(b"BM"):
        return BmpImageFile
    raise refusal


def _check_pixels(width: int, height: int, num_frames: int, origin: Origin, budget: PixelBudget) -> None:
    pixels = width * height * num_frames
    if pixels > MAX_IMAGE_PIXELS or max(width, height) > MAX_SIDE:
        frames = f" in {num_frames} frames" if num_frames > 1 else ""
        raise TooManyPixels(
            f"{origin.where}: has {width}x{height} pixels{frames}, accepted are at most {MAX_IMAGE_PIXELS} in all and "
            f"{MAX_SIDE} a side",
            param=origin.param,
        )
    if min(width, height) < MIN_SIDE:
        raise InvalidImage(
            f"{origin.where}: has {width}x{height} pixels, accepted are at least {MIN_SIDE} a side", param=origin.param
        )
    budget.take(width * height, origin)


def _is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def _webp_size(head: bytes) -> tuple[int, int]:
    """(width, height) by the first chunk: VP8X (extended), VP8L (lossless) or VP8 (lossy)."""
    kind, body = head[12:16], head[20:]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    head = file.read(_SNIFFED_BYTES)
    file.seek(0)
    return head


def _num_bytes(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


# --- videos ---


def decode_video(file: BinaryIO, origin: Origin) -> Clip:
    """All frames of a video file's first video stream, counted and measured while they come.

    Raises:
        InvalidVideo: empty, of another format, damaged, without a frame, or with frames that are too small or change
            their size.
        VideoTooLarge: too many bytes.
        VideoTooLong: too many frames, or pixels in all of them.
    """
    if _num_bytes(file) > MAX_VIDEO_BYTES:
        raise VideoTooLarge(
            f"{origin.where}: larger than the {MAX_VIDEO_BYTES} bytes that are accepted", param=origin.param
        )
    refusal = InvalidVideo(f"{origin.where}: not a {_VIDEO_KINDS} video that can be read", param=origin.param)
    demuxer = _demuxer(_head(file))
    if demuxer is None:
        raise refusal
    with _foreign_errors(refusal), av.open(file, mode="r", format=demuxer) as container:
        stream = container.streams.video[0]
        if stream.codec_context.width:
            _check_frames(max(1, stream.frames), stream.codec_context.height, stream.codec_context.width, origin)
        frames: list[np.ndarray] = []
        for frame in container.decode(stream):
            _check_frames(len(frames) + 1, frame.height, frame.width, origin)
            upright = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)
            frames.append(upright)
        rate = stream.average_rate
        return as_clip(frames, origin, fps=None if not rate else float(rate))


def as_clip(frames: list[np.ndarray], origin: Origin, *, fps: float | None = None) -> Clip:
    """One array of the frames, each uint8 [H, W, 3]. Raises InvalidVideo or VideoTooLong."""
    if not frames:
        raise InvalidVideo(f"{origin.where}: has no frame, accepted is a video with at least one", param=origin.param)
    height, width = frames[0].shape[:2]
    _check_frames(len(frames), height, width, origin)
    if any(frame.shape != frames[0].shape for frame in frames):
        raise InvalidVideo(f"{origin.where}: its frames change their size, accepted is one size", param=origin.param)
    return Clip(frames=np.stack(frames), fps=fps)


def _demuxer(head: bytes) -> str | None:
    """FFmpeg's reader of the container. Left to guess, it would also take playlists, which name other files."""
    if head[4:8] == b"ftyp":
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    return "gif" if head[:6] in (b"GIF87a", b"GIF89a") else None


def _check_frames(num_frames: int, height: int, width: int, origin: Origin) -> None:
    if num_frames > MAX_VIDEO_FRAMES or num_frames * height * width > MAX_VIDEO_PIXELS:
        raise VideoTooLong(
            f"{origin.where}: has {num_frames} frames of {width}x{height} pixels or more, accepted are at most "
            f"{MAX_VIDEO_FRAMES} frames and {MAX_VIDEO_PIXELS} pixels in all of them",
            param=origin.param,
        )
    if min(height, width) < MIN_SIDE:
        raise InvalidVideo(
            f"{origin.where}: has {width}x{height} pixels, accepted are at least {MIN_SIDE} a side", param=origin.param
        )
