"""Encoding and saving, read back with the decoders that users have."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sglang.multimodal_gen.errors import InvalidRequest, StorageError
from sglang.multimodal_gen.runtime.postprocess.formats import FORMATS, choose_format, h264_crf, quality_percent, vp9_crf
from sglang.multimodal_gen.runtime.postprocess.naming import automatic_stem
from sglang.multimodal_gen.runtime.postprocess.pending_file import PendingFile
from sglang.multimodal_gen.runtime.postprocess.png import write_png
from sglang.multimodal_gen.runtime.postprocess.saving import OutputWriter
from sglang.multimodal_gen.test.clips import Wishes, clip, decode, psnr, save

VIDEOS = [name for name, file_format in FORMATS.items() if file_format.is_video]
IMAGES = [name for name, file_format in FORMATS.items() if not file_format.is_video]


# Lossy by design: 4:2:0 colour and a medium quality for MP4 and WebM, 256 dithered colours for GIF. Swapped channels,
# the wrong colour matrix or a shifted frame stay below 25 dB.
@pytest.mark.parametrize(("file_format", "lowest_psnr"), [("mp4", 36), ("webm", 34), ("gif", 32)])
def test_a_video_decodes_to_the_frames_that_were_written(tmp_path: Path, file_format: str, lowest_psnr: float) -> None:
    frames = clip(9)
    path = save(frames, tmp_path, output_format=file_format)
    got, facts = decode(path)
    assert got.shape == frames.shape
    assert facts["fps"] == pytest.approx(16, rel=0.01)
    assert min(psnr(a, b) for a, b in zip(got, frames, strict=True)) >= lowest_psnr


@pytest.mark.parametrize(
    ("file_format", "fps"), [("mp4", 1), ("mp4", 240), ("webm", 1), ("webm", 240), ("gif", 1), ("gif", 50)]
)
def test_the_frame_rate_is_kept_at_both_ends_of_its_range(tmp_path: Path, file_format: str, fps: int) -> None:
    path = save(clip(49), tmp_path, output_format=file_format, fps=fps)
    assert decode(path)[1]["fps"] == pytest.approx(fps, rel=0.01)


@pytest.mark.parametrize("file_format", VIDEOS)
def test_a_video_of_one_frame_is_a_video(tmp_path: Path, file_format: str) -> None:
    frames = clip(1)
    path = save(frames, tmp_path, output_format=file_format)
    with av.open(str(path)) as container:
        assert file_format in container.format.name
        [frame] = container.decode(video=0)
        assert psnr(frame.to_ndarray(format="rgb24")[None], frames) > 30


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (400, 1), (1, 4000), (777, 513)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "flat", "ramp"])
def test_a_png_holds_the_picture_in_any_number_of_pieces(kind: str, shape: tuple[int, int]) -> None:
    """Read by FFmpeg too, which is strict about what the pieces together add up to."""
    made = {
        "noise": np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8),
        "flat": np.full((*shape, 3), 200, dtype=np.uint8),
        "ramp": np.arange(3 * shape[0] * shape[1], dtype=np.uint32).astype(np.uint8).reshape(*shape, 3),
    }
    file, again = io.BytesIO(), io.BytesIO()
    write_png(file, made[kind])
    write_png(again, made[kind])
    assert file.getvalue() == again.getvalue()
    with Image.open(file) as image:
        image.load()
        np.testing.assert_array_equal(np.asarray(image), made[kind])
    file.seek(0)
    with av.open(file, options={"err_detect": "explode"}) as container:
        [frame] = container.decode(video=0)
        np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), made[kind])


def test_a_slower_preset_makes_a_smaller_file_of_the_same_quality(tmp_path: Path) -> None:
    frames = clip(17, height=96, width=128)
    paths = [save(frames, tmp_path / preset, x264_preset=preset) for preset in ("ultrafast", "veryslow")]
    assert paths[1].stat().st_size < paths[0].stat().st_size / 1.5
    qualities = [psnr(decode(path)[0], frames) for path in paths]
    assert abs(qualities[0] - qualities[1]) < 2


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    path = save(clip(5), tmp_path, output_compression=100)
    _, facts = decode(path)
    assert (facts["codec"], facts["pixels"], facts["matrix"]) == ("h264", "yuv420p", 1)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # playable before it is whole


@pytest.mark.parametrize("file_format", VIDEOS)
def test_chunk_by_chunk_gives_the_file_that_all_frames_at_once_give(tmp_path: Path, file_format: str) -> None:
    frames = clip(9)
    whole = save(frames, tmp_path, output_file_name=f"whole.{file_format}")
    chunked = save(frames, tmp_path, output_file_name=f"chunked.{file_format}", chunk=4)
    assert whole.read_bytes() == chunked.read_bytes()


def test_frames_may_be_overwritten_after_write_returns(tmp_path: Path) -> None:
    frames = clip(6)
    for file_format in VIDEOS:
        writer = OutputWriter(Wishes(output_format=file_format), str(tmp_path), num_frames=6)
        scratch = frames.copy()
        writer.write(scratch)
        scratch[:] = 0
        assert psnr(decode(writer.close().output)[0], frames) > 30


@pytest.mark.parametrize(("file_format", "lowest_psnr"), [("png", np.inf), ("jpeg", 36), ("webp", 34)])
def test_an_image_decodes_to_the_frame_that_was_written(tmp_path: Path, file_format: str, lowest_psnr: float) -> None:
    frames = clip(1, height=47, width=63)
    path = save(frames, tmp_path, output_format=file_format)
    with Image.open(path) as image:
        assert image.format == file_format.upper()
        got = np.asarray(image.convert("RGB"))
    if lowest_psnr == np.inf:
        assert np.array_equal(got, frames[0])
    else:
        assert psnr(got, frames[0]) >= lowest_psnr


@pytest.mark.parametrize("file_format", ["jpeg", "webp", "mp4", "webm"])
def test_a_higher_quality_costs_bytes(tmp_path: Path, file_format: str) -> None:
    frames = clip(1 if file_format in IMAGES else 5)
    sizes = [
        save(frames, tmp_path / word, output_format=file_format, output_quality=word).stat().st_size
        for word in ("low", "medium", "high", "maximum")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 2


def test_quality_words_are_the_documented_numbers() -> None:
    percent = {
        (name, word): quality_percent(FORMATS[name], output_quality=word, output_compression=None)
        for name in ("jpeg", "mp4")
        for word in ("default", "maximum", "high", "medium", "low")
    }
    assert [percent["jpeg", word] for word in ("default", "maximum", "high", "medium", "low")] == [75, 100, 90, 55, 35]
    assert percent["mp4", "default"] == 50
    assert quality_percent(FORMATS["mp4"], output_quality="low", output_compression=80) == 80
    assert [h264_crf(value) for value in (0, 50, 100)] == [40, 20, 1]
    assert vp9_crf(0) <= 63


def test_the_format_follows_the_frame_count_when_nothing_is_said() -> None:
    assert choose_format(Wishes(), num_frames=1).name == "png"
    assert choose_format(Wishes(), num_frames=2).name == "mp4"
    assert choose_format(Wishes(output_file_name="still.JPG"), num_frames=1).name == "jpeg"
    assert choose_format(Wishes(output_file_name="a.mp4"), num_frames=1).name == "mp4"


@pytest.mark.parametrize(
    ("wishes", "num_frames", "words"),
    [
        ({"output_file_name": "a.png"}, 5, ["output_file_name", "png", "5 frames", "mp4, gif, webm"]),
        ({"output_format": "jpeg"}, 5, ["output_format", "jpeg", "mp4, gif, webm"]),
        ({"output_file_name": "a.avi"}, 5, ["a.avi", ".mp4", ".webm"]),
        ({"output_format": "avi"}, 5, ["output_format", "avi", "mp4"]),
        ({"output_file_name": "a.gif", "output_format": "mp4"}, 5, ["a.gif", "output_format mp4", ".mp4"]),
        ({"output_compression": 3}, 1, ["output_compression", "3", "png", "webp"]),
        ({"output_compression": 101}, 5, ["output_compression", "101", "0 to 100"]),
        ({"output_quality": "best"}, 5, ["output_quality", "best", "maximum"]),
        ({"output_format": "webm", "x264_preset": "slow"}, 5, ["x264_preset", "slow", "webm", "mp4"]),
        ({"x264_preset": "slow"}, 1, ["x264_preset", "png", "mp4"]),
        ({"output_format": "gif", "fps": 60}, 5, ["fps", "60", "at most 50", "mp4"]),
        ({"output_file_name": "../a.mp4"}, 5, ["output_file_name", "../a.mp4", "output_path"]),
        ({"output_file_name": "a\\b.mp4"}, 5, ["output_file_name", "without a directory"]),
        ({"output_file_name": ".."}, 5, ["output_file_name"]),
        ({"output_file_name": "a\0b.mp4"}, 5, ["output_file_name", "printable"]),
        ({"output_file_name": "a" * 147 + ".mp4"}, 5, ["output_file_name", "150 characters"]),
        ({"output_file_name": "é" * 140 + ".mp4"}, 5, ["output_file_name", "240 bytes"]),
    ],
)
def test_a_wish_that_cannot_be_honoured_is_refused_before_a_frame_exists(
    tmp_path: Path, wishes: dict[str, Any], num_frames: int, words: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        OutputWriter(Wishes(**wishes), str(tmp_path), num_frames=num_frames)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_odd_size_is_refused_where_the_format_cannot_hold_it(tmp_path: Path) -> None:
    writer = OutputWriter(Wishes(), str(tmp_path), num_frames=2)
    with pytest.raises(InvalidRequest, match="63x47"):
        writer.write(clip(2, height=47, width=63))
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    assert decode(save(clip(2, height=47, width=63), tmp_path, output_format="gif"))[0].shape == (2, 47, 63, 3)


def test_automatic_names_say_prompt_and_seed_and_never_overwrite(tmp_path: Path) -> None:
    paths = [save(clip(1), tmp_path) for _ in range(3)]
    assert len({path.name for path in paths}) == 3
    assert paths[0].name.startswith("a_red_circle_moving_right_7_")
    assert paths[1].name == f"{paths[0].stem}-1.png"
    assert paths[2].name == f"{paths[0].stem}-2.png"


def test_automatic_names_are_short_plain_ascii() -> None:
    for prompt in ("../../etc/passwd", "a" * 5000, "ein blaues Äffchen\nhüpft", "红色的圆", "\ud800", ""):
        stem = automatic_stem(prompt, 2**63 - 1)
        assert stem.isascii() and stem.replace("_", "").isalnum() and len(stem) <= 140
    assert automatic_stem("红色的圆", 1).startswith("output_1_")
    assert automatic_stem("红", 1) != automatic_stem("蓝", 1)
    assert automatic_stem("a" * 200 + "b", 1) != automatic_stem("a" * 200 + "c", 1)


def test_a_chosen_name_is_kept_and_replaces_the_file_of_that_name(tmp_path: Path) -> None:
    first = save(clip(1), tmp_path, output_file_name="still.webp")
    before = first.read_bytes()
    second = save(clip(2)[1:], tmp_path, output_file_name="still.webp")
    assert first == second == tmp_path / "still.webp"
    assert second.read_bytes() != before
    assert save(clip(1), tmp_path, output_file_name="no ending").name == "no ending.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no ending.png", "still.webp"]


def test_a_missing_directory_is_made(tmp_path: Path) -> None:
    assert save(clip(1), tmp_path / "new" / "deep").parent == tmp_path / "new" / "deep"


def test_a_directory_that_cannot_be_used_is_named_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a directory")
    for given in ("file", "file/below"):
        with pytest.raises(StorageError) as caught:
            OutputWriter(Wishes(), given, num_frames=1)
        assert f"output_path: {given} cannot" in str(caught.value)
    with pytest.raises(StorageError, match="output_path: /proc/none cannot"):
        OutputWriter(Wishes(), "/proc/none", num_frames=1)


def test_nothing_is_visible_until_the_file_is_whole(tmp_path: Path) -> None:
    writer = OutputWriter(Wishes(), str(tmp_path), num_frames=6)
    writer.write(clip(6)[:3])
    assert list(tmp_path.glob("*.mp4")) == []
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    still_open = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [target for target in still_open if str(tmp_path) in target]


@pytest.mark.parametrize("anonymous", [True, False])
def test_a_pending_file_is_published_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anonymous: bool
) -> None:
    if not anonymous:
        monkeypatch.delattr(os, "O_TMPFILE")  # as on systems without nameless files
    (tmp_path / "taken").write_bytes(b"old")
    pending = PendingFile(tmp_path, name="x")
    Path(pending.path).write_bytes(b"new")
    assert len(list(tmp_path.iterdir())) == (1 if anonymous else 2)
    with pytest.raises(FileExistsError):
        pending.publish("taken", overwrite=False)
    assert (tmp_path / "taken").read_bytes() == b"old"
    assert pending.publish("free", overwrite=False).read_bytes() == b"new"
    second = PendingFile(tmp_path, name="x")
    Path(second.path).write_bytes(b"newer")
    second.publish("taken", overwrite=True)
    assert (tmp_path / "taken").read_bytes() == b"newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free", "taken"]
    assert oct((tmp_path / "free").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


WRITE_HALF = """
import sys, time
from sglang.multimodal_gen.runtime.postprocess.png import write_png
from sglang.multimodal_gen.runtime.postprocess.saving import OutputWriter
from sglang.multimodal_gen.test.clips import Wishes, clip
writer = OutputWriter(Wishes(), sys.argv[1], num_frames=200)
writer.write(clip(100))
sys.stdout.write("half\\n")
sys.stdout.flush()
time.sleep(60)
"""


def test_a_process_killed_while_writing_leaves_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_HALF, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first_line = child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert first_line == "half\n"
    assert list(tmp_path.glob("*.mp4")) == []
    assert list(tmp_path.iterdir()) == []  # on a file system with nameless files, not even a part


FILL = """
import resource, sys
from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.postprocess.png import write_png
from sglang.multimodal_gen.runtime.postprocess.saving import OutputWriter
from sglang.multimodal_gen.test.clips import Wishes, clip, save
directory = sys.argv[1]
for file_format in ("mp4", "webm", "gif", "png"):
    frames = clip(1 if file_format == "png" else 12)
    whole = save(frames, directory, output_format=file_format)
    size = whole.stat().st_size
    whole.unlink()
    for limit in (0, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            writer = OutputWriter(Wishes(output_format=file_format), directory, num_frames=len(frames))
            writer.write(frames)
            sys.exit(f"{writer.close()} was saved within {limit} of {size} bytes")
        except StorageError as error:
            assert "no space" in str(error) and directory in str(error), str(error)
            writer.abort()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: the same calls fail at the same places."""
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
