"""Encoders: uint8 frames in, one image or video file out, while later frames are still being made. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.runtime.postprocess.formats import OutputFormat, h264_crf, vp9_crf
from sglang.multimodal_gen.runtime.postprocess.metadata import (
    Metadata,
    add_gif_comment,
    container_tags,
    exif_block,
    png_chunks,
)
from sglang.multimodal_gen.runtime.postprocess.png import write_png

DEFAULT_X264_PRESET = "fast"

_BT709 = 1  # ITU-T H.273 code point, the same for primaries, transfer and matrix
_LIMITED_RANGE = 1
_FULL_CHROMA_PERCENT = 90  # from here on JPEG keeps colour at full resolution
# x264's output depends on the number of threads; left to itself it takes as many as the machine has processors.
_CODEC_THREADS = 4
# What x264 looks ahead with AVX-512 differs from run to run; with what such processors have besides it does not.
_WITHOUT_AVX512 = {"x264-params": "asm=avx2,fma3,bmi1,bmi2,lzcnt"}
# Without it the file carries FFmpeg's version, and WebM a random number.
_REPRODUCIBLE = {"fflags": "+bitexact"}
_FAST_START = {"movflags": "+faststart"}  # the index first: players start before the whole file is there


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a file is encoded. `percent`: 0 to 100, see `quality_percent`."""

    fps: int
    percent: int
    x264_preset: str = DEFAULT_X264_PRESET


class FrameEncoder(ABC):
    """Open, write any number of chunks, close. `write` copies: the caller may unmap its frames afterwards."""

    @abstractmethod
    def write(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [T, H, W, 3] RGB. Raises: OSError, such as for a full disk."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is buffered and finish the file. Raises: OSError."""

    def abort(self) -> None:  # noqa: B027 - nothing to release by default
        """Release what is held without finishing the file."""


def open_encoder(path: str, chosen: OutputFormat, encoding: Encoding, *, metadata: Metadata | None) -> FrameEncoder:
    """The encoder of `chosen`, writing to `path` whatever its ending; `metadata` goes into the file.

    Equal frames, encoding and metadata give equal bytes, on any machine with the same versions of the libraries.

    Raises: InvalidRequest for metadata that the format cannot hold, OSError.
    """
    if chosen.name == "mp4":
        options = {"crf": str(h264_crf(encoding.percent)), "preset": encoding.x264_preset}
        options |= _WITHOUT_AVX512 if _has_avx512() else {}
        return YuvEncoder(path, MP4, fps=encoding.fps, codec_options=options, metadata=metadata)
    if chosen.name == "webm":
        options = {"crf": str(vp9_crf(encoding.percent)), **_FAST_VP9}
        return YuvEncoder(path, WEBM, fps=encoding.fps, codec_options=options, metadata=metadata)
    if chosen.name == "gif":
        return GifEncoder(path, fps=encoding.fps, metadata=metadata)
    return ImageEncoder(path, chosen, percent=encoding.percent, metadata=metadata)


class ImageEncoder(FrameEncoder):
    """PNG, JPEG or WebP; exactly one frame."""

    def __init__(self, path: str, chosen: OutputFormat, *, percent: int, metadata: Metadata | None) -> None:
        self._path = path
        self._format = chosen.name
        self._chunks = None if metadata is None or chosen.name != "png" else png_chunks(metadata)
        self._options: dict[str, Any] = {"quality": percent} if chosen.has_quality else {}
        if chosen.name == "jpeg" and percent >= _FULL_CHROMA_PERCENT:
            self._options["subsampling"] = 0
        if metadata is not None and chosen.name != "png":
            self._options["exif"] = exif_block(metadata, fits_segment=chosen.name == "jpeg")
        self._written = False

    def write(self, frames: np.ndarray) -> None:
        assert len(frames) == 1 and not self._written, "an image file takes one frame"
        picture = np.ascontiguousarray(frames[0])
        with Path(self._path).open("wb") as file:
            if self._format == "png":
                write_png(file, picture, self._chunks)
            else:
                Image.fromarray(picture).save(file, format=self._format, **self._options)
        self._written = True

    def close(self) -> None:
        assert self._written, "closed before its frame came"


@dataclass(frozen=True, kw_only=True)
class Container:
    """A kind of video file: FFmpeg's names of the muxer and the codec, and the muxer's options."""

    muxer: str
    codec: str
    options: Mapping[str, str]


MP4 = Container(muxer="mp4", codec="libx264", options=_REPRODUCIBLE | _FAST_START)
WEBM = Container(muxer="webm", codec="libvpx-vp9", options=_REPRODUCIBLE)
GIF = Container(muxer="gif", codec="gif", options=_REPRODUCIBLE | {"loop": "0"})
_FAST_VP9 = {"b:v": "0", "deadline": "realtime", "cpu-used": "5", "row-mt": "1"}


@cache
def _has_avx512() -> bool:
    try:
        return " avx512f" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return False


class _ContainerEncoder(FrameEncoder):
    """What the two kinds of video share: a container with one video stream."""

    def __init__(self, path: str, container: Container, *, fps: int, codec_options: dict[str, str]) -> None:
        self._container = av.open(path, "w", format=container.muxer, options=dict(container.options))
        stream = self._container.add_stream(container.codec, rate=fps, options=codec_options)
        self._stream = cast(VideoStream, stream)
        self._frame_seconds = Fraction(1, fps)
        self._num_frames = 0

    def _encode(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def _numbered(self, frame: np.ndarray) -> av.VideoFrame:
        """[H, W, 3] uint8 as a frame with its time stamp, in units of one frame."""
        assert frame.dtype == np.uint8 and frame.shape[-1] == 3, f"expected uint8 RGB, got {frame.dtype} {frame.shape}"
        video_frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        video_frame.pts = self._num_frames
        video_frame.time_base = self._frame_seconds
        self._num_frames += 1
        return video_frame

    def close(self) -> None:
        self._encode(None)
        self._container.close()

    def abort(self) -> None:
        with suppress(OSError, ValueError):  # the trailer may fail for the reason that led here
            self._container.close()


class YuvEncoder(_ContainerEncoder):
    """MP4 (H.264) or WebM (VP9): 8 bits, 4:2:0, BT.709 at limited range and labelled so."""

    def __init__(
        self,
        path: str,
        container: Container,
        *,
        fps: int,
        codec_options: dict[str, str],
        metadata: Metadata | None,
    ) -> None:
        super().__init__(path, container, fps=fps, codec_options=codec_options)
        if metadata is not None:
            self._container.metadata.update(container_tags(metadata))
        self._name = container.muxer
        self._reformatter = VideoReformatter()
        context = self._stream.codec_context
        context.pix_fmt = "yuv420p"
        context.thread_type = "AUTO"
        context.thread_count = _CODEC_THREADS
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE

    def write(self, frames: np.ndarray) -> None:
        if self._num_frames == 0:
            self._set_size(*frames.shape[1:3])
        for frame in frames:
            self._encode(
                self._reformatter.reformat(
                    self._numbered(frame),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    src_color_range=ColorRange.JPEG,
                    dst_color_range=ColorRange.MPEG,
                )
            )

    def _set_size(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise InvalidValue("size", f"{width}x{height}", f"even width and height for {self._name}; gif takes any")
        self._stream.codec_context.height, self._stream.codec_context.width = height, width


class GifEncoder(_ContainerEncoder):
    """GIF with one palette of 256 colours for the whole clip, which therefore waits in memory until the end."""

    def __init__(self, path: str, *, fps: int, metadata: Metadata | None) -> None:
        super().__init__(path, GIF, fps=fps, codec_options={})
        self._path = path
        self._metadata = metadata
        self._stream.codec_context.pix_fmt = "pal8"
        self._graph: Graph | None = None

    def write(self, frames: np.ndarray) -> None:
        for frame in frames:
            video_frame = self._numbered(frame)
            if self._graph is None:
                self._graph = self._palette_graph(video_frame)
            self._graph.push(video_frame)

    def close(self) -> None:
        assert self._graph is not None, "closed before a frame came"
        self._graph.push(None)
        while True:
            try:
                frame = cast(av.VideoFrame, self._graph.pull())
            except (av.error.EOFError, av.error.BlockingIOError):
                break
            self._encode(frame)
        super().close()
        if self._metadata is not None:
            add_gif_comment(self._path, self._metadata)

    def _palette_graph(self, frame: av.VideoFrame) -> Graph:
        """frames -> palette of them all -> frames in that palette."""
        context = self._stream.codec_context
        context.width, context.height = frame.width, frame.height
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        split = graph.add("split")
        palette = graph.add("palettegen", "stats_mode=full:reserve_transparent=0")
        # Ordered dithering keeps still areas still; error diffusion makes them crawl from frame to frame.
        use = graph.add("paletteuse", "dither=bayer:bayer_scale=4:diff_mode=rectangle")
        sink = graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        return graph
