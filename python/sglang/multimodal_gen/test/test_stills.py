"""Thumbnails and contact sheets: what they show, where they lie, and that they hold no clip."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sglang.multimodal_gen.errors import InsufficientStorage
from sglang.multimodal_gen.runtime.postprocess.saving import OutputWriter, SavedFiles
from sglang.multimodal_gen.runtime.postprocess.stills import CONTACT_SHEET, THUMBNAIL
from sglang.multimodal_gen.test.clips import Wishes, clip

COLOUR_STEP = 7


def numbered_frames(num_frames: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame i is grey of level 7 i."""
    levels = np.arange(num_frames, dtype=np.uint8) * COLOUR_STEP
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))


def save_all(frames: np.ndarray, directory: Path, *, chunk: int = 4, **wishes: Any) -> SavedFiles:
    wishes = {"thumbnail": True, "contact_sheet": True} | wishes
    writer = OutputWriter(Wishes(**wishes), str(directory), num_frames=len(frames))
    for begin in range(0, len(frames), chunk):
        writer.write(frames[begin : begin + chunk])
    return writer.close()


def pixels(path: Path | None, file_format: str) -> np.ndarray:
    assert path is not None
    with Image.open(path) as image:
        assert image.format == file_format
        return np.asarray(image.convert("RGB")).astype(int)


def shown_frames(sheet: np.ndarray, *, rows: int, columns: int) -> list[int]:
    """The numbers of the frames in the cells, row by row; both formats are off by a level or two."""
    height, width = sheet.shape[0] // rows, sheet.shape[1] // columns
    cells = sheet.reshape(rows, height, columns, width, 3).mean(axis=(1, 3, 4)).ravel()
    assert all(abs(level - COLOUR_STEP * round(level / COLOUR_STEP)) < 2.5 for level in cells)
    return [round(level / COLOUR_STEP) for level in cells]


@pytest.mark.parametrize(("num_frames", "middle"), [(1, 0), (2, 1), (5, 2), (33, 16)])
def test_a_thumbnail_is_the_middle_frame(tmp_path: Path, num_frames: int, middle: int) -> None:
    saved = save_all(numbered_frames(num_frames), tmp_path, output_format="mp4")
    thumbnail = pixels(saved.thumbnail, "WEBP")
    assert thumbnail.shape == (48, 64, 3), "a small one is not enlarged"
    assert shown_frames(thumbnail, rows=1, columns=1) == [middle]


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 832), (185, 320)), ((1000, 20), (320, 6)), ((320, 320), (320,) * 2)]
)
def test_a_thumbnail_has_at_most_320_pixels_a_side(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    saved = save_all(clip(1, *size), tmp_path, output_format="png")
    assert pixels(saved.thumbnail, "WEBP").shape[:2] == expected


@pytest.mark.parametrize(
    ("num_frames", "rows", "columns", "expected"),
    [
        (1, 1, 1, [0]),
        (2, 1, 2, [0, 1]),
        (4, 2, 2, [0, 1, 2, 3]),
        (7, 3, 3, [0, 1, 2, 3, 4, 5, 6, 0, 0]),  # the last row is filled with black
        (25, 5, 5, list(range(25))),
        (33, 5, 5, [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 19, 20, 21, 23, 24, 25, 27, 28, 29, 31, 32]),
    ],
)
def test_a_contact_sheet_shows_the_clip_from_first_to_last(
    tmp_path: Path, num_frames: int, rows: int, columns: int, expected: list[int]
) -> None:
    saved = save_all(numbered_frames(num_frames), tmp_path, output_format="mp4")
    sheet = pixels(saved.contact_sheet, "JPEG")
    assert sheet.shape == (rows * 48, columns * 64, 3)
    assert shown_frames(sheet, rows=rows, columns=columns) == expected


def test_any_clip_is_shown_by_different_frames_in_order() -> None:
    for num_frames in range(1, 400):
        frames = CONTACT_SHEET.frames_of(num_frames)
        assert len(frames) == min(25, num_frames) == len(set(frames)) and list(frames) == sorted(frames)
        assert num_frames == 1 or (frames[0], frames[-1]) == (0, num_frames - 1)
        assert THUMBNAIL.frames_of(num_frames) == (num_frames // 2,)


def test_only_what_is_asked_for_is_made(tmp_path: Path) -> None:
    only_thumbnail = save_all(clip(2), tmp_path, contact_sheet=False)
    assert only_thumbnail.contact_sheet is None and only_thumbnail.thumbnail is not None
    assert save_all(clip(2), tmp_path / "b", thumbnail=False, contact_sheet=False).thumbnail is None
    assert len(list(tmp_path.iterdir())) == 3 and len(list((tmp_path / "b").iterdir())) == 1


@pytest.mark.parametrize("taken", [".mp4", ".thumb.webp", ".sheet.jpg"])
@pytest.mark.parametrize("system", ["usual", "no nameless files", "no hard links"])
def test_the_files_of_an_output_share_a_name_that_was_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str, system: str
) -> None:
    if system != "usual":
        monkeypatch.delattr(os, "O_TMPFILE")
    if system == "no hard links":
        monkeypatch.setattr(os, "link", refuse_links)
    stem = save_all(clip(2), tmp_path / "elsewhere").output.stem
    (tmp_path / f"{stem}{taken}").write_bytes(b"another's")
    saved = save_all(clip(2), tmp_path)
    expected = [f"{stem}-1{ending}" for ending in (".mp4", ".thumb.webp", ".sheet.jpg")]
    assert [p and p.name for p in (saved.output, saved.thumbnail, saved.contact_sheet)] == expected
    assert (tmp_path / f"{stem}{taken}").read_bytes() == b"another's"
    assert len(list(tmp_path.glob("*.*"))) == 4 and not list(tmp_path.glob(".*"))
    assert saved.output.stat().st_nlink == 1


def refuse_links(*_: Any, **__: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_chosen_name_replaces_all_files_of_that_name(tmp_path: Path) -> None:
    first = save_all(numbered_frames(9), tmp_path, output_file_name="clip.mp4")
    before = pixels(first.thumbnail, "WEBP")
    second = save_all(numbered_frames(3), tmp_path, output_file_name="clip.mp4")
    assert first == second and (pixels(second.thumbnail, "WEBP") != before).all()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["clip.mp4", "clip.sheet.jpg", "clip.thumb.webp"]


def test_a_name_of_the_greatest_length_has_room_for_the_other_endings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")  # so that the unfinished files have names too
    name = "🐒" * 60  # 240 bytes, to which an ending is added
    assert save_all(clip(2), tmp_path, output_file_name=name).output.name == f"{name}.mp4"


def test_the_output_gets_its_name_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    link = os.link

    def watched(source: Any, target: str, **options: Any) -> None:
        link(source, target, **options)
        named.append(target)

    monkeypatch.setattr(os, "link", watched)
    save_all(clip(2), tmp_path, output_format="gif")
    endings = ["".join(Path(name).suffixes) for name in named if not name.startswith(".")]
    assert endings == [".thumb.webp", ".sheet.jpg", ".gif"]


def test_nothing_is_left_when_the_output_cannot_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def full(source: Any, target: str, **options: Any) -> None:
        if target.endswith(".gif"):
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", full)
    writer = OutputWriter(Wishes(output_format="gif", thumbnail=True, contact_sheet=True), str(tmp_path), num_frames=2)
    writer.write(clip(2))
    with pytest.raises(InsufficientStorage, match="no space"):
        writer.close()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_aborted_output(tmp_path: Path) -> None:
    writer = OutputWriter(Wishes(thumbnail=True, contact_sheet=True), str(tmp_path), num_frames=6)
    writer.write(clip(6)[:3])
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    still_open = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [target for target in still_open if str(tmp_path) in target]


FILL = """
import resource, sys
from sglang.multimodal_gen.errors import InsufficientStorage
from sglang.multimodal_gen.test.clips import clip
from sglang.multimodal_gen.test.test_stills import save_all
frames = clip(1)
wishes = {"output_format": "webp", "output_quality": "low", "contact_sheet": False}
saved = save_all(frames, sys.argv[2], **wishes)
size = saved.thumbnail.stat().st_size
assert saved.output.stat().st_size < size - 1
resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
try:
    save_all(frames, sys.argv[1], **wishes)
except InsufficientStorage as error:
    sys.stdout.write(str(error))
"""


def test_a_disk_that_is_too_full_for_a_thumbnail_is_an_error(tmp_path: Path) -> None:
    """The output itself would fit: at a low quality it is smaller than its thumbnail."""
    directories = [str(tmp_path / name) for name in ("full", "free")]
    done = subprocess.run([sys.executable, "-c", FILL, *directories], capture_output=True, text=True)
    assert "no space" in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "full").iterdir()) == []


HOLD = """
import resource, sys
import numpy as np
from sglang.multimodal_gen.runtime.postprocess.stills import CONTACT_SHEET, THUMBNAIL, Still
num_frames = int(sys.argv[1])
stills = [Still(kind, num_frames=num_frames) for kind in (THUMBNAIL, CONTACT_SHEET)]
for first in range(0, num_frames, 4):
    frames = np.full((4, 480, 640, 3), first % 256, dtype=np.uint8)
    for still in stills:
        still.take(first, frames)
for still in stills:
    still.save("/dev/null")
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def test_a_long_clip_needs_no_more_memory_than_a_short_one() -> None:
    """200 frames of 640x480 are 176 MiB, 40 are 35 MiB; the sheet is 5.5 MiB."""
    peaks = [
        float(subprocess.run([sys.executable, "-c", HOLD, n], capture_output=True, text=True, check=True).stdout)
        for n in ("40", "200")
    ]
    assert abs(peaks[1] - peaks[0]) < 8
