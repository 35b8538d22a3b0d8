"""Which file formats there are, and what a quality means in each: the one home of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue

QUALITY_PERCENT = {"maximum": 100, "high": 90, "medium": 55, "low": 35}
DEFAULT_IMAGE_PERCENT = 75
DEFAULT_VIDEO_PERCENT = 50
# GIF counts hundredths of a second, and browsers slow down what is shown for less than two of them.
GIF_MOST_FPS = 50


@dataclass(frozen=True, kw_only=True)
class OutputFormat:
    """One kind of file."""

    name: str
    suffixes: tuple[str, ...]
    media_type: str
    is_video: bool
    has_quality: bool
    """Whether there is a trade of size against fidelity to choose."""

    @property
    def suffix(self) -> str:
        """The ending of automatic names."""
        return self.suffixes[0]


FORMATS = {
    file_format.name: file_format
    for file_format in (
        OutputFormat(name="png", suffixes=(".png",), media_type="image/png", is_video=False, has_quality=False),
        OutputFormat(
            name="jpeg", suffixes=(".jpg", ".jpeg"), media_type="image/jpeg", is_video=False, has_quality=True
        ),
        OutputFormat(name="webp", suffixes=(".webp",), media_type="image/webp", is_video=False, has_quality=True),
        OutputFormat(name="mp4", suffixes=(".mp4",), media_type="video/mp4", is_video=True, has_quality=True),
        OutputFormat(name="gif", suffixes=(".gif",), media_type="image/gif", is_video=True, has_quality=False),
        OutputFormat(name="webm", suffixes=(".webm",), media_type="video/webm", is_video=True, has_quality=True),
    )
}
_BY_SUFFIX = {suffix: file_format for file_format in FORMATS.values() for suffix in file_format.suffixes}
MEDIA_TYPES = {name: file_format.media_type for name, file_format in FORMATS.items()}
_VIDEO_NAMES = ", ".join(file_format.name for file_format in FORMATS.values() if file_format.is_video)


class FormatWishes(Protocol):
    """What a client may say about the kind of file."""

    @property
    def output_file_name(self) -> str | None: ...
    @property
    def output_format(self) -> str | None: ...
    @property
    def output_quality(self) -> str: ...
    @property
    def output_compression(self) -> int | None: ...
    @property
    def x264_preset(self) -> str | None: ...
    @property
    def fps(self) -> int | None: ...


def media_type(file_name: str) -> str:
    """What a file of that name holds, by its ending."""
    return _BY_SUFFIX[PurePath(file_name).suffix.lower()].media_type


def choose_format(wishes: FormatWishes, *, num_frames: int) -> OutputFormat:
    """The format of a result: by the file name's ending, else as asked, else PNG for one frame and MP4 for several.

    Raises: InvalidRequest when the ending is unknown or contradicts `output_format`, when an image format is to hold
        several frames, or when the format has no compression, no x264 preset or no such frame rate.
    """
    named = _format_of_name(wishes.output_file_name)
    asked = None if wishes.output_format is None else _format_called(wishes.output_format)
    if named is not None and asked is not None and named is not asked:
        raise InvalidValue(
            "output_file_name",
            wishes.output_file_name,
            f"an ending that agrees with output_format {asked.name}, such as {asked.suffix}",
        )
    chosen = named or asked or FORMATS["png" if num_frames == 1 else "mp4"]
    if num_frames > 1 and not chosen.is_video:
        field = "output_file_name" if named else "output_format"
        raise InvalidValue(field, chosen.name, f"a format that holds the {num_frames} frames: {_VIDEO_NAMES}")
    if wishes.output_compression is not None and not chosen.has_quality:
        raise InvalidRequest(
            f"output_compression: got {wishes.output_compression}, but {chosen.name} has no quality to choose; "
            "leave it unset or use jpeg, webp, mp4 or webm",
            param="output_compression",
        )
    _check_video(chosen, wishes)
    return chosen


def _check_video(chosen: OutputFormat, wishes: FormatWishes) -> None:
    if wishes.x264_preset is not None and chosen.name != "mp4":
        raise InvalidRequest(
            f"x264_preset: got {wishes.x264_preset}, but {chosen.name} is not made by x264; leave it unset or use mp4",
            param="x264_preset",
        )
    if chosen.name == "gif" and (wishes.fps or 0) > GIF_MOST_FPS:
        raise InvalidValue("fps", wishes.fps, f"at most {GIF_MOST_FPS} for gif; mp4 and webm take more")


def quality_percent(chosen: OutputFormat, *, output_quality: str, output_compression: int | None) -> int:
    """0 (smallest file) to 100 (best picture); a number wins over a word."""
    if output_compression is not None:
        if not 0 <= output_compression <= 100:
            raise InvalidValue("output_compression", output_compression, "an integer from 0 to 100")
        return output_compression
    if output_quality == "default":
        return DEFAULT_VIDEO_PERCENT if chosen.is_video else DEFAULT_IMAGE_PERCENT
    if output_quality not in QUALITY_PERCENT:
        raise InvalidValue("output_quality", output_quality, f"one of default, {', '.join(QUALITY_PERCENT)}")
    return QUALITY_PERCENT[output_quality]


def h264_crf(percent: int) -> int:
    """x264's constant rate factor: 40 at 0, 20 at 50, 1 at 100 (0 would be a lossless profile that browsers lack)."""
    return max(1, round(40 - 0.4 * percent))


def vp9_crf(percent: int) -> int:
    """The same picture on libvpx's scale, which ends at 63 where x264's ends at 51."""
    return round(h264_crf(percent) * 63 / 51)


def _format_of_name(name: str | None) -> OutputFormat | None:
    suffix = "" if name is None else PurePath(name).suffix
    if suffix == "":
        return None
    if suffix.lower() not in _BY_SUFFIX:
        raise InvalidValue("output_file_name", name, f"a name that ends in one of {', '.join(_BY_SUFFIX)}, or in none")
    return _BY_SUFFIX[suffix.lower()]


def _format_called(name: str) -> OutputFormat:
    if name not in FORMATS:
        raise InvalidValue("output_format", name, f"one of {', '.join(FORMATS)}")
    return FORMATS[name]
