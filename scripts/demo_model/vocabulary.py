"""The names and looks that clips, captions and checker agree on. No torch, so that the checker runs anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

FRAME_SIDE = 128
NUM_FRAMES = 33
FPS = 16

# sRGB, 0 … 255. Backgrounds are pale, so that a name means one look as an object and another behind it.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 42, 44),
    "orange": (247, 130, 28),
    "yellow": (247, 203, 21),
    "green": (34, 153, 66),
    "blue": (33, 88, 222),
    "purple": (130, 50, 190),
    "pink": (245, 95, 170),
    "cyan": (16, 186, 206),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "black": (18, 18, 22),
    "gray": (160, 164, 170),
    "blue": (176, 208, 246),
    "green": (190, 232, 190),
    "yellow": (255, 240, 176),
    "pink": (255, 212, 226),
    "purple": (214, 196, 244),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left", "right", "up", "down")
MOTIONS = (*DIRECTIONS, "growing", "shrinking", "spinning", "still")
SIZES = ("small", "medium", "large")
# Cell of the 3 × 3 grid in which an object is on average, in raster order.
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

# Circumradius over nominal radius: all four shapes cover about the area of a circle of the nominal radius.
CIRCUMRADIUS: dict[str, float] = {"circle": 1.0, "square": 1.26, "triangle": 1.46, "star": 1.5}
# Rotations by this angle (radians) leave the shape as it was.
SYMMETRY: dict[str, float] = {"circle": 0.0, "square": math.pi / 2, "triangle": math.tau / 3, "star": math.tau / 5}

# Nominal radius in pixels.
RADII: dict[str, tuple[float, float]] = {"small": (11.0, 13.0), "medium": (17.0, 19.5), "large": (24.0, 26.5)}
# A growing object goes from the first to the second share of its nominal radius; a shrinking one back.
GROWTH = (0.55, 1.15)
# A spinning object turns clockwise by this angle over a whole clip: slow enough that four frames, which share one
# latent frame, turn the star by less than half its symmetry.
TURN = math.pi


@dataclass(frozen=True, kw_only=True)
class ObjectFacts:
    """What is true, or wanted, of one object; None says nothing about it."""

    colour: str
    shape: str
    motion: str | None = None
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """What is true, or wanted, of a clip; images have no motion."""

    objects: tuple[ObjectFacts, ...]
    background: str | None = None
