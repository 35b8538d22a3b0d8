"""What made a file, written into it and read back: by our reader and by those that users have."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from sglang.multimodal_gen.configs.declare import parameters
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue
from sglang.multimodal_gen.runtime.postprocess.formats import FORMATS
from sglang.multimodal_gen.runtime.postprocess.metadata import file_metadata, read_metadata
from sglang.multimodal_gen.runtime.postprocess.saving import OutputWriter
from sglang.multimodal_gen.test.clips import Wishes, clip, decode, save

PROMPT = 'ein Äffchen 红色 🐒 "quoted" \\ back\nsecond line'
PARAMS = SamplingParams(
    prompt=PROMPT,
    negative_prompt="blurry",
    width=64,
    height=48,
    num_frames=9,
    fps=16,
    num_inference_steps=4,
    guidance_scale=3.0,
    scheduler="unipc",
    seed=2**63 - 1,
    output_path="/home/somebody/results",
    output_file_name="secret.mp4",
    save_output=True,
)
METADATA = file_metadata(PARAMS.recorded(), model="tiny")


def save_as(file_format: str, directory: Path, *, metadata: Any = METADATA, num_frames: int = 9) -> Path:
    frames = clip(num_frames if FORMATS[file_format].is_video else 1)
    return save(frames, directory, output_format=file_format, metadata=metadata)


# --- what is recorded ---


def test_the_record_is_what_made_the_result_in_the_order_of_the_declarations() -> None:
    assert list(METADATA.items()) == [
        ("prompt", PROMPT),
        ("negative_prompt", "blurry"),
        ("width", 64),
        ("height", 48),
        ("num_frames", 9),
        ("fps", 16),
        ("num_inference_steps", 4),
        ("guidance_scale", 3.0),
        ("scheduler", "unipc"),
        ("seed", 2**63 - 1),
        ("model", "tiny"),
        ("software", METADATA["software"]),
    ]
    assert METADATA["software"].startswith("sglang-diffusion ")


def test_what_shapes_the_result_is_recorded_and_where_it_goes_is_not() -> None:
    """A new parameter of these groups has to be recorded, or to be named here."""
    by_name = {name: parameter.declaration for name, parameter in parameters(SamplingParams).items()}
    missing = {name for name, d in by_name.items() if d.group in ("prompt", "size", "denoising") and not d.recorded}
    assert missing == {"num_outputs_per_prompt"}  # each output is a request of its own
    assert not [name for name, d in by_name.items() if d.group == "output" and d.recorded]


def test_fields_without_effect_are_not_recorded() -> None:
    def recorded(**values: Any) -> dict[str, Any]:
        return SamplingParams(prompt="a", negative_prompt="b", fps=16, **values).recorded()

    assert recorded(guidance_scale=1.5, num_frames=5) == {
        "prompt": "a", "negative_prompt": "b", "num_frames": 5, "fps": 16, "guidance_scale": 1.5
    }  # fmt: skip
    assert recorded(guidance_scale=1.0, num_frames=1) == {"prompt": "a", "num_frames": 1, "guidance_scale": 1.0}
    interval = {"skip_layer_guidance_scale": 2.8, "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.2}
    assert recorded(num_frames=1, **interval) == {"prompt": "a", "num_frames": 1}
    skipping = recorded(num_frames=1, skip_guidance_layers=(7, 8), **interval)
    assert skipping == {"prompt": "a", "num_frames": 1, "skip_guidance_layers": (7, 8)} | interval
    again = SamplingParams.from_values(json.loads(json.dumps(skipping)))
    assert again.recorded() == skipping


# --- read back ---


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_says_what_made_it_and_that_can_be_generated_again(tmp_path: Path, file_format: str) -> None:
    found = read_metadata(save_as(file_format, tmp_path))
    assert list(found.items()) == list(METADATA.items())
    again = {name: value for name, value in found.items() if name not in ("model", "software")}
    assert SamplingParams.from_values(again).recorded() == PARAMS.recorded()


def test_pillow_finds_the_text_of_a_png(tmp_path: Path) -> None:
    with Image.open(save_as("png", tmp_path)) as image:
        assert json.loads(image.info["parameters"]) == METADATA
        assert (image.info["Description"], image.info["Software"]) == (PROMPT, METADATA["software"])


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_pillow_finds_the_exif_of_a_photo(tmp_path: Path, file_format: str) -> None:
    with Image.open(save_as(file_format, tmp_path)) as image:
        exif = image.getexif()
        # Pillow reads such texts as Latin-1; the bytes are UTF-8, as other programs expect them.
        assert exif[ExifTags.Base.ImageDescription].encode("latin-1").decode("utf-8") == PROMPT
        assert exif[ExifTags.Base.Software] == METADATA["software"]
        comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert comment.startswith(b"ASCII\0\0\0") and json.loads(comment[8:].decode("ascii")) == METADATA


@pytest.mark.parametrize(("file_format", "spelling"), [("mp4", str.lower), ("webm", str.upper)])
def test_ffmpeg_finds_the_tags_of_a_video(tmp_path: Path, file_format: str, spelling: Any) -> None:
    with av.open(str(save_as(file_format, tmp_path))) as container:
        assert json.loads(container.metadata[spelling("comment")]) == METADATA
        assert container.metadata[spelling("description")] == PROMPT


def test_the_comment_of_a_gif_changes_nothing_that_is_shown(tmp_path: Path) -> None:
    plain, told = (save_as("gif", tmp_path / name, metadata=m) for name, m in (("plain", None), ("told", METADATA)))
    for path in (plain, told):
        with Image.open(path) as image:
            assert (image.info["loop"], image.n_frames) == (0, 9)  # type: ignore[attr-defined]
            assert json.loads(image.info.get("comment", "{}")) == (METADATA if path is told else {})
    assert told.read_bytes().index(b"NETSCAPE2.0") < told.read_bytes().index(b'{"prompt"'), "the loop count comes first"
    assert np.array_equal(decode(plain)[0], decode(told)[0])
    assert decode(plain)[1] == decode(told)[1]


@pytest.mark.parametrize("file_format", FORMATS)
def test_without_metadata_a_file_says_nothing(tmp_path: Path, file_format: str) -> None:
    path = save_as(file_format, tmp_path, metadata=None)
    assert read_metadata(path) == {}
    assert b"sglang" not in path.read_bytes() and b"comment" not in path.read_bytes().lower()


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_longest_prompt_fits(tmp_path: Path, file_format: str) -> None:
    metadata = file_metadata(SamplingParams(prompt="a" * 32_000).recorded(), model="tiny")
    assert read_metadata(save_as(file_format, tmp_path, metadata=metadata)) == metadata


def test_a_jpeg_without_room_for_both_keeps_the_json(tmp_path: Path) -> None:
    metadata = file_metadata({"prompt": "a" * 32_000, "negative_prompt": "b" * 32_000}, model="tiny")
    path = save_as("jpeg", tmp_path, metadata=metadata)
    assert read_metadata(path) == metadata
    with Image.open(path) as image:
        assert ExifTags.Base.ImageDescription not in image.getexif()


def test_what_does_not_fit_into_a_jpeg_is_refused_before_a_frame_exists(tmp_path: Path) -> None:
    metadata = file_metadata({"prompt": "红" * 12_000}, model="tiny")
    with pytest.raises(InvalidRequest, match=r"^metadata: \d+ bytes, .* use png or webp"):
        OutputWriter(Wishes(output_format="jpeg"), str(tmp_path), num_frames=1, metadata=metadata)
    assert list(tmp_path.iterdir()) == []
    assert read_metadata(save_as("webp", tmp_path, metadata=metadata)) == metadata


@pytest.mark.parametrize("text", ["no JSON", "5", "[1]", ""])
def test_another_programs_comment_is_no_metadata(tmp_path: Path, text: str) -> None:
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=chunks)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif", comment=text.encode() or None)
    assert read_metadata(tmp_path / "a.png") == read_metadata(tmp_path / "a.gif") == {}


def test_a_file_that_is_no_image_or_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a red circle")
    (tmp_path / "empty.mp4").touch()
    for path in (tmp_path / "notes.txt", tmp_path / "empty.mp4", tmp_path / "missing.png", tmp_path):
        with pytest.raises(InvalidValue, match="png, jpeg, webp, gif, mp4 or webm"):
            read_metadata(path)


# --- nothing that differs between equal requests ---


def test_equal_requests_give_equal_bytes_in_every_format(tmp_path: Path) -> None:
    """At another second, in another directory, and while others are encoded: the codecs use several threads."""

    def encode(name: str) -> dict[str, bytes]:
        return {f: save_as(f, tmp_path / name, num_frames=33).read_bytes() for f in FORMATS}

    first = encode("first")
    time.sleep(1.1)  # FFmpeg's times have whole seconds
    with ThreadPoolExecutor(3) as pool:
        others = list(pool.map(encode, ("second", "third", "fourth")))
    for file_format in FORMATS:
        assert all(other[file_format] == first[file_format] for other in others), file_format


def test_a_file_does_not_tell_how_many_processors_made_it(tmp_path: Path) -> None:
    """x264's output depends on its threads, and says so in the file."""
    assert b"threads=4" in save_as("mp4", tmp_path).read_bytes()
