"""What becomes of image, mask and video files: decoded as documented, or refused before it costs much."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from sglang.multimodal_gen.configs.model_info import GivenInputs, InputLimits, SizeFromImage
from sglang.multimodal_gen.errors import IncompatibleParameters, MissingParameter, ServingError, UnsupportedParameter
from sglang.multimodal_gen.errors_media import (
    InvalidImage,
    InvalidMask,
    InvalidVideo,
    TooManyImages,
    TooManyPixels,
    VideoTooLong,
)
from sglang.multimodal_gen.runtime.entrypoints import media_decoding
from sglang.multimodal_gen.runtime.entrypoints.media_decoding import Origin, PixelBudget, decode_video, open_image
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import Clip, MediaSources, split_media
from sglang.multimodal_gen.runtime.entrypoints.media_reading import read_sources

HERE = Origin(param="image", where="image")
RNG = np.random.default_rng(0)
# Smooth, so that lossy formats keep it.
PICTURE = np.stack(np.meshgrid(np.arange(32) * 7, np.arange(24) * 9), axis=-1).astype(np.uint8)
PICTURE = np.concatenate([PICTURE, PICTURE[..., :1] // 2], axis=-1)


def encoded(image: Image.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, file_format, **options)
    return buffer


def rgb(file: io.BytesIO) -> np.ndarray:
    return open_image(file, HERE, PixelBudget()).rgb()


def reference(file: io.BytesIO) -> np.ndarray:
    """As diffusers' `load_image` converts, by Pillow's own way in."""
    file.seek(0)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_the_pixels_are_those_of_the_file() -> None:
    for file_format in ("PNG", "BMP"):
        np.testing.assert_array_equal(rgb(encoded(PICTURE, file_format)), PICTURE)
    np.testing.assert_array_equal(rgb(encoded(PICTURE, "WEBP", lossless=True)), PICTURE)
    for file_format in ("JPEG", "WEBP"):
        file = encoded(PICTURE, file_format, quality=90)
        np.testing.assert_array_equal(rgb(file), reference(file))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA"])
def test_other_modes_are_converted_as_diffusers_does(mode: str) -> None:
    file = encoded(Image.fromarray(PICTURE).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode))
    np.testing.assert_array_equal(rgb(file), reference(file))


def test_cmyk_is_converted_and_transparent_palettes_lose_their_transparency() -> None:
    cmyk = encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(rgb(cmyk), reference(cmyk))
    palette = Image.fromarray(PICTURE).convert("P", palette=Image.Palette.ADAPTIVE)
    file = encoded(palette, transparency=bytes([0] + [255] * 255))
    np.testing.assert_array_equal(rgb(file), np.asarray(palette.convert("RGB")))


def test_grey_of_sixteen_bits_keeps_its_upper_eight() -> None:
    deep = (PICTURE[..., 0].astype(np.uint16) << 8) + 200
    found = rgb(encoded(Image.fromarray(deep)))
    np.testing.assert_array_equal(found, np.repeat(PICTURE[..., :1], 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_turned_upright(file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    upright = rgb(encoded(PICTURE, file_format, exif=exif, quality=100))
    flat = rgb(encoded(PICTURE, file_format, quality=100))
    np.testing.assert_array_equal(upright, np.rot90(flat, k=-1))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(file_format: str) -> None:
    frames = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (10, 200)]
    file = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True)
    assert (rgb(file) == 10).all()


# --- what is refused ---


def png_header(width: int, height: int, *, frames: int = 0) -> io.BytesIO:
    """A PNG that announces this size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if frames:
        parts.append(chunk(b"acTL", struct.pack(">II", frames, 0)))
    parts += [chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def webp_header(width: int, height: int) -> io.BytesIO:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return io.BytesIO(b"RIFF" + struct.pack("<I", len(body)) + body)


BOMBS = {
    "13300 a side": png_header(13_300, 13_300),
    "14000 a side": png_header(14_000, 14_000),
    "100 by two million": png_header(100, 2_000_000),
    "ten thousand frames": png_header(1000, 1000, frames=10_000),
    "a long side": png_header(16_385, 16),
    "webp": webp_header(16_000, 16_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(TooManyPixels, match=r"^image: has \d+x\d+ pixels") as caught:
        open_image(BOMBS[name], HERE, PixelBudget())
    assert (caught.value.code, caught.value.param) == ("image_too_many_pixels", "image")
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


def test_images_that_are_large_together_are_refused_before_the_first_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media_decoding.OpenedImage, "rgb", lambda self: pytest.fail("decoded"))
    sources = MediaSources(images=tuple(png_header(7000, 7000) for _ in range(3)))
    with pytest.raises(TooManyPixels, match="image_path 3: with it the images have more than the 100000000 pixels"):
        read_sources(sources)


def test_a_file_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_header(16, 16).getvalue())
    with path.open("r+b") as file:
        file.truncate(51_000_000)
    image, video = MediaSources(images=(path,)), MediaSources(video=path)
    for source, code in ((image, "image_too_large"), (video, "invalid_video")):
        with pytest.raises(ServingError) as caught:
            read_sources(source)
        assert caught.value.code == code
    with path.open("r+b") as file:
        file.truncate(201_000_000)
    with pytest.raises(ServingError) as caught:
        read_sources(video)
    assert (caught.value.code, caught.value.http_status) == ("video_too_large", 413)


GIF = encoded(PICTURE, "GIF").getvalue()
DAMAGED = {
    "empty": b"",
    "text": b"these are no pixels",
    "gif": GIF,
    "tiff": encoded(PICTURE, "TIFF").getvalue(),
    "a signature alone": b"\x89PNG\r\n\x1a\n",
    "half a png": encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8)).getvalue()[:5000],
    "half a jpeg": encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG").getvalue()[:1500],
    "half a webp": encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), "WEBP").getvalue()[:1500],
    "riff": b"RIFF\0\0\0\0WEBPVP8 ",
    "tiny": encoded(PICTURE[:1, :1]).getvalue(),
    "thin": encoded(PICTURE[:15]).getvalue(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_whole_image_of_an_accepted_format_is_refused(name: str) -> None:
    with pytest.raises(InvalidImage, match=r"^image: ") as caught:
        rgb(io.BytesIO(DAMAGED[name]))
    assert caught.value.http_status == 400


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_mutated_files_end_in_an_image_or_in_our_own_words(file_format: str) -> None:
    """Decoders' own texts hold addresses; whatever they raise, it does not pass."""
    data = bytearray(encoded(PICTURE, file_format).getvalue())
    for seed in range(150):
        rng = np.random.default_rng(seed)
        mutated = bytearray(data)
        for index in rng.integers(8, len(mutated), 4):
            mutated[index] = rng.integers(0, 256)
        with contextlib.suppress(TooManyPixels):
            try:
                assert rgb(io.BytesIO(mutated[: rng.integers(20, len(mutated) + 1)])).dtype == np.uint8
            except InvalidImage as error:
                assert not re.search("0x[0-9a-f]{6,}", error.message)


# --- masks ---


def test_a_mask_is_grey_and_by_transparency_its_alpha_turned_round() -> None:
    values = np.tile(np.array([0, 128, 255, 255], np.uint8), (24, 8))
    [image] = [encoded(PICTURE)]
    for mask in (encoded(values), encoded(np.repeat(values[..., None], 3, axis=2)), values, Image.fromarray(values)):
        found = read_sources(MediaSources(images=(image,), mask=mask)).mask
        np.testing.assert_array_equal(found, values)
    with_alpha = encoded(np.dstack([PICTURE, values]))
    found = read_sources(MediaSources(images=(image,), mask=with_alpha, mask_is_transparency=True)).mask
    np.testing.assert_array_equal(found, 255 - values)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (encoded(PICTURE[:16, :16]), "mask_path: has 16x16 pixels, accepted are the 32x24 of image_path"),
        (encoded(PICTURE), "has no transparency, accepted is a PNG"),
        (encoded(PICTURE, "JPEG"), "has no transparency, accepted is a PNG"),
        (encoded(np.dstack([PICTURE, PICTURE[..., 0]]), "WEBP"), "has no transparency, accepted is a PNG"),
        (io.BytesIO(b"no image"), "not a PNG, JPEG, WebP or BMP image"),
        (io.BytesIO(encoded(PICTURE).getvalue() + bytes(4_000_000)), "larger than the 4000000 bytes"),
    ],
)
def test_a_mask_that_does_not_fit_or_cannot_be_read_is_refused(mask: io.BytesIO, says: str) -> None:
    transparency = "has 16x16" not in says
    if not transparency:
        mask = encoded(PICTURE[:16, :16, 0])
    with pytest.raises(InvalidMask, match=says) as caught:
        read_sources(MediaSources(images=(encoded(PICTURE),), mask=mask, mask_is_transparency=transparency))
    assert (caught.value.code, caught.value.param) == ("invalid_mask", "mask_path")


# --- videos ---


def clip(file_format: str, codec: str, *, num_frames: int = 5, side: int = 32, pixels: str = "yuv420p") -> io.BytesIO:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=file_format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = side, side // 2, pixels  # type: ignore[attr-defined]
        for number in range(num_frames):
            grey = np.full((side // 2, side, 3), 40 * number % 256, np.uint8)
            grey[:8, :8] = 255
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            container.mux(stream.encode(frame))  # type: ignore[attr-defined]
        container.mux(stream.encode(None))  # type: ignore[attr-defined]
    return buffer


VIDEOS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "webm": ("webm", "libvpx-vp9", "yuv420p"),
    "gif": ("gif", "gif", "rgb8"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_gives_its_frames_and_their_rate(name: str) -> None:
    file_format, codec, pixels = VIDEOS[name]
    found = decode_video(clip(file_format, codec, pixels=pixels), HERE)
    assert (found.frames.shape, found.frames.dtype, found.fps) == ((5, 16, 32, 3), np.uint8, 10.0)
    levels = found.frames[:, :, 16:].reshape(5, -1).mean(axis=1)
    np.testing.assert_allclose(levels, [0, 40, 80, 120, 160], atol=12)  # three bits a channel in the GIF


def test_a_video_that_is_to_be_shown_turned_is_turned() -> None:
    """Its header says, as of one filmed upright: a quarter, clockwise."""
    data = bytearray(clip("mp4", "libx264").getvalue())
    matrix = data.index(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    turned, flat = (decode_video(file, HERE).frames for file in (io.BytesIO(data), clip("mp4", "libx264")))
    assert (flat[0, :8, :8] > 200).all() and (turned[0, :8, -8:] > 200).all() and (turned[0, :8, :8] < 50).all()
    np.testing.assert_array_equal(turned, np.rot90(flat, k=-1, axes=(1, 2)))


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"MAX_VIDEO_FRAMES": 4}, "has 5 frames of 32x16 pixels or more, accepted are at most 4 frames"),
        ({"MAX_VIDEO_PIXELS": 2000}, "and 2000 pixels in all of them"),
    ],
)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_long_video_is_refused_at_its_first_frame_too_many(
    monkeypatch: pytest.MonkeyPatch, name: str, limits: dict[str, int], says: str
) -> None:
    """Also where the header does not say how many frames there are."""
    for limit, value in limits.items():
        monkeypatch.setattr(media_decoding, limit, value)
    file_format, codec, pixels = VIDEOS[name]
    with pytest.raises(VideoTooLong, match="accepted are at most") as caught:
        decode_video(clip(file_format, codec, pixels=pixels), HERE)
    assert caught.value.code == "video_too_long"
    if name == "mp4":
        assert says in caught.value.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        bytes(4) + b"ftypisom" + bytes(100),
        clip("mp4", "libx264").getvalue()[:300],
        b"\x1a\x45\xdf\xa3" + bytes(50),
        encoded(PICTURE).getvalue(),
        encoded(PICTURE[:15, :15], "GIF").getvalue(),
    ],
)
def test_what_is_no_video_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidVideo, match=r"^image: ") as caught:
        decode_video(io.BytesIO(data), HERE)
    assert "/etc" not in caught.value.message


def test_frames_and_arrays_make_a_video_too() -> None:
    frames = np.stack([PICTURE, PICTURE[::-1]])
    for source in (frames, list(frames), [Image.fromarray(frame) for frame in frames], Clip(frames=frames)):
        found = read_sources(MediaSources(video=source)).video
        assert found is not None and found.fps is None
        np.testing.assert_array_equal(found.frames, frames)
    for wrong in ([PICTURE, PICTURE[:16]], PICTURE, [], frames.astype(np.float32)):
        with pytest.raises(InvalidVideo, match=r"^video_path: "):
            read_sources(MediaSources(video=wrong))


# --- what callers give, what models take ---


@pytest.mark.parametrize("array", [PICTURE.astype(np.float32), PICTURE[None], PICTURE[..., :2], PICTURE[:0]])
def test_an_array_of_another_form_is_refused_with_its_form(array: np.ndarray) -> None:
    with pytest.raises(InvalidImage, match=re.escape(f"got an array {list(array.shape)} of {array.dtype}")):
        read_sources(MediaSources(images=(array,)))


def test_inputs_are_split_from_the_other_parameters() -> None:
    rest, sources = split_media({"prompt": "x", "image_path": "a.png", "mask_path": None, "video_path": "v.mp4"})
    assert rest == {"prompt": "x"}
    assert (sources.images, sources.mask, sources.video) == (("a.png",), None, "v.mp4")
    assert not split_media({"prompt": "x", "image_path": None})[1]


EDIT = InputLimits(max_images=3, takes_mask=True, takes_strength=True)
I2V = InputLimits(min_images=1, max_images=1, takes_last_image=True)
ENDS = InputLimits(min_images=1, max_images=1, requires_last_image=True)
V2V = InputLimits(takes_video=True, requires_video=True, takes_strength=True)
TWO = InputLimits(min_images=2, max_images=2)


@pytest.mark.parametrize(
    ("limits", "given", "error", "says"),
    [
        (InputLimits(), {"num_images": 1}, UnsupportedParameter, "the model works from text alone"),
        (InputLimits(), {"strength": True}, UnsupportedParameter, "strength: not supported here"),
        (EDIT, {"video": True}, UnsupportedParameter, "works from text, up to 3 images and a mask"),
        (EDIT, {"num_images": 4}, TooManyImages, "got 4 images, accepted is up to 3 images"),
        (EDIT, {"mask": True}, IncompatibleParameters, "accepted is mask_path with image_path"),
        (EDIT, {"strength": True}, IncompatibleParameters, "accepted is strength with image_path"),
        (I2V, {}, MissingParameter, "image_path: got nothing, accepted is one image"),
        (I2V, {"num_images": 2}, TooManyImages, "got 2 images, accepted is one image"),
        (I2V, {"num_images": 1, "mask": True}, UnsupportedParameter, "works from text, one image and a last image"),
        (ENDS, {"num_images": 1}, MissingParameter, "last_image_path: got nothing, accepted is one image"),
        (V2V, {}, MissingParameter, "video_path: got nothing, accepted is one video"),
        (TWO, {"num_images": 1}, MissingParameter, "image_path: got only 1, accepted is 2 images"),
    ],
)
def test_what_a_model_does_not_take_is_said_in_one_sentence(
    limits: InputLimits, given: dict[str, Any], error: type[ServingError], says: str
) -> None:
    with pytest.raises(error) as caught:
        limits.check(GivenInputs(**given))
    assert says in caught.value.message


def test_what_a_model_takes_passes() -> None:
    InputLimits().check(GivenInputs())
    EDIT.check(GivenInputs(num_images=3, mask=True, strength=True))
    I2V.check(GivenInputs(num_images=1, last_image=True))
    ENDS.check(GivenInputs(num_images=1, last_image=True))
    V2V.check(GivenInputs(video=True, strength=True))


def test_a_size_follows_from_an_image_as_in_the_reference() -> None:
    """Against the rule's own words: sqrt(area * ratio) and that by the ratio, each rounded to the multiple."""
    rule = SizeFromImage(area=1024 * 1024, multiple=32, source="first")
    assert rule.size(1920, 1080) == (1376, 768)
    assert rule.size(1080, 1920) == (768, 1376)
    assert rule.size(500, 500) == (1024, 1024)
    assert rule.size(500, 500, area=512 * 512) == (512, 512)
    assert rule.size(16_000, 16) == (32_384, 32)
