"""Small images of a result, made while its frames stream by: thumbnail and contact sheet. Holds no frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sglang.multimodal_gen.runtime.postprocess.naming import CONTACT_SHEET_ENDING, THUMBNAIL_ENDING

LONGEST_SIDE = 320
MOST_CELLS = 25
_QUALITY = 85


@dataclass(frozen=True, kw_only=True)
class StillKind:
    """`ending` is that of its files, `file_format` Pillow's name."""

    ending: str
    file_format: str
    most_cells: int

    def frames_of(self, num_frames: int) -> tuple[int, ...]:
        """The frames that it shows. Several: from the first to the last, evenly spaced.

        One: the middle one, since a clip often begins before its subject is there and ends after it has left.
        """
        cells = min(self.most_cells, num_frames)
        if cells == 1:
            return (num_frames // 2,)
        return tuple(round(cell * (num_frames - 1) / (cells - 1)) for cell in range(cells))


THUMBNAIL = StillKind(ending=THUMBNAIL_ENDING, file_format="webp", most_cells=1)
CONTACT_SHEET = StillKind(ending=CONTACT_SHEET_ENDING, file_format="jpeg", most_cells=MOST_CELLS)


class Still:
    """Shrunk frames in a grid as square as can be, row by row, without gaps; cells are at most 320 pixels a side."""

    def __init__(self, kind: StillKind, *, num_frames: int) -> None:
        self._kind = kind
        self._wanted = kind.frames_of(num_frames)
        self._columns = math.ceil(math.sqrt(len(self._wanted)))
        self._canvas: Image.Image | None = None

    def take(self, first_frame: int, frames: np.ndarray) -> None:
        """See the next frames, uint8 [T, H, W, 3] RGB; the wanted ones are copied."""
        for cell, index in enumerate(self._wanted):
            if first_frame <= index < first_frame + len(frames):
                self._place(cell, frames[index - first_frame])

    def save(self, path: str) -> None:
        """Write the image once all frames were seen. Raises: OSError."""
        assert self._canvas is not None, "saved before a frame came"
        with Path(path).open("wb") as file:
            self._canvas.save(file, format=self._kind.file_format, quality=_QUALITY)

    def _place(self, cell: int, frame: np.ndarray) -> None:
        image = Image.fromarray(np.ascontiguousarray(frame))
        scale = min(1.0, LONGEST_SIDE / max(image.size))  # never enlarged
        width, height = (max(1, round(side * scale)) for side in image.size)
        if self._canvas is None:
            rows = math.ceil(len(self._wanted) / self._columns)
            self._canvas = Image.new("RGB", (self._columns * width, rows * height))
        corner = (cell % self._columns * width, cell // self._columns * height)
        self._canvas.paste(image.resize((width, height), Image.Resampling.LANCZOS), corner)
