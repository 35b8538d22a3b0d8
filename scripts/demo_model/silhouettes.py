"""Tells circle, square, triangle and star apart by overlap with templates, whatever their size and rotation.

The templates are polygons and know nothing of the code that draws the clips.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from demo_model.vocabulary import SHAPES, SYMMETRY

Floats = NDArray[np.float64]

_SIDE = 40  # cells of the canonical picture
_REACH = 1.75  # half its width, in radii of the circle of equal area
_STAR_WAIST = 0.47  # inner over outer radius
_ROTATIONS = {"circle": 1, "square": 12, "triangle": 16, "star": 10}
NUM_FOLDS = {"square": 4, "triangle": 3, "star": 5}


def overlap_by_shape(coverage: Floats, centroid: Floats, radius: float) -> dict[str, float]:
    """Best intersection over union of an object [H, W] with each shape, over all rotations.

    `centroid` (x, y) and `radius` (of the circle of equal area), in pixels, bring it to the templates' size.
    """
    shapes, templates = _templates()
    canonical = _resample(coverage, centroid, radius).reshape(-1)
    common = np.minimum(templates, canonical).sum(axis=1)
    overlap = common / np.maximum(templates, canonical).sum(axis=1)
    return {shape: float(overlap[shapes == shape].max()) for shape in SHAPES}


def orientation(coverage: Floats, centroid: Floats, shape: str) -> float:
    """Clockwise angle in radians of an object [H, W], within one symmetry of its shape. Not for circles.

    The phase of the moment that has the shape's symmetry, weighted to the corners.
    """
    folds = NUM_FOLDS[shape]
    y, x = np.indices(coverage.shape)
    points = (x + 0.5 - centroid[0]) + 1j * (y + 0.5 - centroid[1])
    return float(np.angle((coverage * points**folds).sum()) / folds)


def _resample(coverage: Floats, centroid: Floats, radius: float) -> Floats:
    """[H, W] -> [side, side] around the centroid, bilinear, zero outside the frame."""
    cells = (np.arange(_SIDE) + 0.5) / _SIDE * 2 - 1
    x, y = (axis + cells * _REACH * radius - 0.5 + 1 for axis in centroid)  # + 1: the padding
    padded = np.pad(coverage, 1)
    rows, columns = (_interpolation(axis, size) for axis, size in zip((y, x), padded.shape, strict=True))
    return rows @ padded @ columns.T


def _interpolation(places: Floats, size: int) -> Floats:
    """Linear interpolation at N places of a line of `size` samples, as a matrix [N, size]; clamped at the ends."""
    return np.clip(1 - np.abs(np.clip(places, 0, size - 1)[:, None] - np.arange(size)), 0, 1)


@cache
def _templates() -> tuple[NDArray[np.str_], Floats]:
    """Names [N] and pictures [N, side²] of every shape at every rotation."""
    names: list[str] = []
    pictures: list[Floats] = []
    for shape in SHAPES:
        for step in range(_ROTATIONS[shape]):
            names.append(shape)
            pictures.append(_picture(shape, SYMMETRY[shape] * step / _ROTATIONS[shape]))
    return np.array(names), np.stack(pictures)


def _picture(shape: str, angle: float, samples: int = 4) -> Floats:
    """Coverage of each canonical cell by a shape of area π, from `samples`² points a cell: [side²]."""
    axis = ((np.arange(_SIDE * samples) + 0.5) / (_SIDE * samples) * 2 - 1) * _REACH
    x, y = np.meshgrid(axis, axis)
    inside = x * x + y * y < 1 if shape == "circle" else _inside_star(x, y, _corners(shape, angle))
    return inside.reshape(_SIDE, samples, _SIDE, samples).mean(axis=(1, 3)).reshape(-1)


def _corners(shape: str, angle: float) -> Floats:
    """Corners [N, 2] of a polygon of area π around the origin."""
    points = NUM_FOLDS[shape]
    radii = [1.0, _STAR_WAIST] if shape == "star" else [1.0, math.cos(math.pi / points)]
    headings = angle + np.arange(2 * points) * math.pi / points
    corners = np.tile(radii, points)[:, None] * np.stack((np.sin(headings), -np.cos(headings)), axis=-1)
    following = np.roll(corners, -1, axis=0)
    area = 0.5 * abs((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum())
    return np.asarray(corners * math.sqrt(math.pi / area))


def _inside_star(x: Floats, y: Floats, corners: Floats) -> NDArray[np.bool_]:
    """Whether points lie inside a polygon that can be seen whole from the origin: in one of its triangles."""
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside |= (ax * y - ay * x >= 0) & (bx * y - by * x <= 0) & ((bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0)
    return inside
