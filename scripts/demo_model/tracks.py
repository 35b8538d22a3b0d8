"""Finds the objects of each frame of a clip and follows them by colour: numpy only.

Shapes: T frames, H, W pixels. Pixel values 0 … 255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo_model.vocabulary import COLOURS

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_BORDER = 3  # pixels of the frame's rim that show the background
_CONTRAST = 40.0  # RGB distance at which a pixel is no background; palette and backgrounds differ by 85 and more
_SMALLEST = 40  # pixels; the smallest drawn object covers 110
_NEAR_COLOUR = 75.0  # RGB distance within which a colour has a name
_NAMES, _PALETTE = tuple(COLOURS), np.array(list(COLOURS.values()), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Blob:
    """One object in one frame."""

    colour: str  # nearest name, or "unknown"
    purity: float  # share of the inside that looks like its own median colour
    coverage: Floats  # [H, W], how much of each pixel the object covers
    centroid: Floats  # (x, y)
    radius: float  # of a circle of the same area


def background_colour(frame: Floats) -> Floats:
    """Median colour of the rim of [H, W, 3]."""
    rim = np.ones(frame.shape[:2], dtype=bool)
    rim[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    return np.asarray(np.median(frame[rim], axis=0))


def find_blobs(frame: Floats) -> list[Blob]:
    """Objects of one frame [H, W, 3], largest first."""
    difference = frame - background_colour(frame)
    mask = np.linalg.norm(difference, axis=-1) > _CONTRAST
    labels, count = connected_components(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    blobs = [_describe(frame, difference, labels, label) for label in range(1, count + 1) if sizes[label] >= _SMALLEST]
    return sorted(blobs, key=lambda blob: -blob.radius)


def _describe(frame: Floats, difference: Floats, labels: NDArray[np.int64], label: int) -> Blob:
    own = labels == label
    inside = erode(erode(own))
    if not inside.any():
        inside = own
    colour = np.median(frame[inside], axis=0)
    contrast = np.median(difference[inside], axis=0)
    # Share of the way from background to object, steepened so that noise on either side does not count; edge pixels
    # outside the mask belong to it too, others' do not.
    share = difference @ contrast / max(float(contrast @ contrast), 1.0)
    share = np.clip(2 * share - 0.5, 0, 1)
    coverage = np.where(dilate(own) & ((labels == 0) | own), share, 0.0)
    area = coverage.sum()
    places = np.arange(len(frame)) + 0.5, np.arange(frame.shape[1]) + 0.5
    distances = np.linalg.norm(_PALETTE - colour, axis=-1)
    nearest = int(distances.argmin())
    return Blob(
        colour=_NAMES[nearest] if distances[nearest] < _NEAR_COLOUR else "unknown",
        purity=float((np.linalg.norm(frame[inside] - colour, axis=-1) < _NEAR_COLOUR).mean()),
        coverage=coverage,
        centroid=np.array([coverage.sum(axis=0) @ places[1], coverage.sum(axis=1) @ places[0]]) / area,
        radius=math.sqrt(area / math.pi),
    )


def erode(mask: Mask) -> Mask:
    """Pixels of [H, W] whose four neighbours are set too."""
    return ~dilate(~mask)


def dilate(mask: Mask) -> Mask:
    """Pixels of [H, W] that are set or next to one that is."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def connected_components(mask: Mask) -> tuple[NDArray[np.int64], int]:
    """Labels [H, W] (0 outside) of the groups of set pixels that touch, corners included, and their number.

    Runs of set pixels in neighbouring rows are joined by union-find.
    """
    parents: list[int] = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            label = parents[label]
        return label

    labels = np.zeros(mask.shape, dtype=np.int64)
    # Where a row changes between set and unset: first and end of each run in turn.
    rows, edges = np.nonzero(np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1))
    above: list[tuple[int, int, int]] = []
    runs: list[tuple[int, int, int]] = []
    current = -1
    for row, first, end in zip(rows[::2].tolist(), edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if row != current:
            above, runs, current = runs if row == current + 1 else [], [], row
        label = len(parents)
        parents.append(label)
        for other_first, other_end, other in above:
            if other_first <= end and first <= other_end:
                parents[root(other)] = root(label)
        labels[row, first:end] = label
        runs.append((first, end, label))
    roots = np.array([root(label) for label in range(len(parents))])
    names, compact = np.unique(roots, return_inverse=True)
    return compact.reshape(-1)[labels], len(names) - 1
