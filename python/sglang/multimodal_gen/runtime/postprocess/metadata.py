"""What made a file, inside the file: written in each format's own way, read back from any of them.

Where the parameters are, as JSON, and the prompt in plain text for other programs to show:

    PNG         text chunk `parameters` (iTXt)      text chunk `Description`; also `Software`
    JPEG, WebP  EXIF UserComment                    EXIF ImageDescription; also Software
    MP4, WebM   tag `comment`                       tag `description`
    GIF         a comment block before the frames
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue

Metadata = Mapping[str, Any]
_DISTRIBUTION = "sglang-diffusion"
_PNG_KEYWORD = "parameters"
_ASCII = b"ASCII\0\0\0"  # the first eight bytes of a UserComment name its encoding
_MAX_SEGMENT_BYTES = 65_533  # of JPEG; the length field has 16 bits and counts itself
_GIF_BLOCK_BYTES = 255
_GIF_COMMENT = b"\x21\xfe"
_GIF_LOOP = b"\x21\xff\x0bNETSCAPE2.0"
_GIF_LOOP_BYTES = 19


def file_metadata(recorded: Metadata, *, model: str) -> dict[str, Any]:
    """What a file is to say: the parameters, then the model's name and this software with its version."""
    return {**recorded, "model": model, "software": _software()}


@functools.cache
def _software() -> str:
    try:
        return f"{_DISTRIBUTION} {version(_DISTRIBUTION)}"
    except PackageNotFoundError:  # run from a checkout that was never installed
        return _DISTRIBUTION


def png_chunks(metadata: Metadata) -> PngInfo:
    """The text chunks, as Pillow makes them."""
    chunks = PngInfo()
    chunks.add_itxt(_PNG_KEYWORD, json.dumps(metadata, ensure_ascii=False))
    chunks.add_itxt("Description", metadata["prompt"])
    chunks.add_text("Software", metadata["software"])
    return chunks


def exif_block(metadata: Metadata, *, fits_segment: bool) -> bytes:
    """For Pillow's `exif`. The JSON is ASCII, since programs disagree about the byte order of Unicode comments.

    With `fits_segment` it fits JPEG's one segment of 64 KiB; the description is left out where both do not.

    Raises: InvalidRequest when the JSON alone is longer.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = metadata["prompt"].encode("utf-8")
    exif[ExifTags.Base.Software] = metadata["software"]
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: _ASCII + json.dumps(metadata).encode("ascii")}
    if fits_segment and len(exif.tobytes()) > _MAX_SEGMENT_BYTES:
        del exif[ExifTags.Base.ImageDescription]
    block = exif.tobytes()
    if fits_segment and len(block) > _MAX_SEGMENT_BYTES:
        raise InvalidRequest(
            f"metadata: {len(block)} bytes, but a JPEG file holds {_MAX_SEGMENT_BYTES}; "
            "shorten the prompts, use png or webp, or switch metadata off",
            param="metadata",
        )
    return block


def container_tags(metadata: Metadata) -> dict[str, str]:
    """Tags of a video file; `comment` and `description` are among those that every MP4 reader knows."""
    return {"description": metadata["prompt"], "comment": json.dumps(metadata, ensure_ascii=False)}


def add_gif_comment(path: str, metadata: Metadata) -> None:
    """Put a comment into a finished GIF, which FFmpeg cannot. Raises: OSError.

    It stands before the first frame, where readers look for it, and after the loop count, which old ones want first.
    The GIF standard says ASCII.
    """
    text = json.dumps(metadata).encode("ascii")
    parts = [text[begin : begin + _GIF_BLOCK_BYTES] for begin in range(0, len(text), _GIF_BLOCK_BYTES)]
    comment = _GIF_COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    with Path(path).open("r+b") as file:
        head = file.read(13)
        has_palette, palette_bits = head[10] & 0x80, (head[10] & 0x07) + 1
        place = len(head) + (3 << palette_bits if has_palette else 0)
        file.seek(place)
        rest = file.read()
        if rest.startswith(_GIF_LOOP):
            place, rest = place + _GIF_LOOP_BYTES, rest[_GIF_LOOP_BYTES:]
        file.seek(place)
        file.write(comment)
        file.write(rest)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a file says about its making: SamplingParams fields, `model` and `software`. Empty when it says nothing.

    Raises:
        InvalidValue: not a readable image or video file.
    """
    try:
        text = _image_text(path)
    except UnidentifiedImageError:
        text = _container_text(path)
    except OSError as error:
        raise _unreadable(path) from error
    try:
        found = json.loads(text)
    except ValueError:  # another program's comment, or none
        return {}
    return found if isinstance(found, dict) else {}


def _image_text(path: str | Path) -> str:
    with Image.open(path) as image:
        if image.format == "PNG":
            image.load()  # text may stand behind the pixels
            return str(image.info.get(_PNG_KEYWORD, ""))
        if image.format == "GIF":
            comment = image.info.get("comment", b"")
        else:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    return bytes(comment).removeprefix(_ASCII).decode("utf-8", "replace")


def _container_text(path: str | Path) -> str:
    try:
        with av.open(str(path)) as container:
            return next((value for key, value in container.metadata.items() if key.lower() == "comment"), "")
    except (OSError, ValueError) as error:  # PyAV's errors are subclasses of both
        raise _unreadable(path) from error


def _unreadable(path: str | Path) -> InvalidValue:
    return InvalidValue("path", str(path), "a readable file of png, jpeg, webp, gif, mp4 or webm")
