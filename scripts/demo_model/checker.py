"""Reads colour, shape, motion, background, size and position from a clip's pixels and compares them with a wish.

Fixed before training; its thresholds follow from how clips are drawn (`vocabulary`), never from generated ones.
numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo_model.scenes import SIDE_THRESHOLD
from demo_model.silhouettes import NUM_FOLDS, orientation, overlap_by_shape
from demo_model.tracks import Blob, Floats, background_colour, find_blobs
from demo_model.vocabulary import (
    BACKGROUNDS,
    CIRCUMRADIUS,
    FRAME_SIDE,
    GROWTH,
    POSITIONS,
    SHAPES,
    ClipFacts,
    ObjectFacts,
)

_PRESENCE = 0.95  # share of frames in which an object must be seen
_PURITY = 0.85  # share of its inside that must have its colour
_OVERLAP = 0.84  # with the template of its shape; drawn ones reach 0.9, a square and a circle share 0.83
_SHAPE_FRAMES = 9
_NEAR_BACKGROUND = 45.0  # RGB distance
_SIZE_BOUNDS = (15.0, 21.75)  # nominal radius in pixels between small, medium and large

# Drawn objects travel 30 pixels and more, grow to 2.1 times their size and turn by 180°.
_MOVED, _GROWN, _TURNED = 15.0, 1.4, math.radians(75)
# What may remain of the other motions besides the one that is named.
_HELD, _KEPT, _UPRIGHT = 7.0, 1.22, math.radians(25)
_STRAIGHTNESS = 0.8  # distance over length of the path


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One object as the checker sees it; "unclear" where nothing fits."""

    colour: str
    shape: str
    motion: str
    size: str
    position: str
    overlap: float  # with the template of `shape`


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A clip as the checker sees it."""

    background: str
    objects: tuple[Seen, ...]
    flicker: float  # mean change of the background between frames, in levels of 255


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which wishes came true; None where nothing was wished. A wrong number of objects fails the objects' wishes."""

    colour: bool
    shape: bool
    motion: bool | None
    background: bool | None
    size: bool | None
    position: bool | None

    @property
    def right(self) -> bool:
        """Colour, shape and motion together."""
        return self.colour and self.shape and self.motion is not False


def check(frames: NDArray[np.uint8], wanted: ClipFacts) -> Verdict:
    """Compare a clip [T, H, W, 3] with what was wanted of it."""
    return judge(observe(frames), wanted)


def judge(seen: Observation, wanted: ClipFacts) -> Verdict:
    """Compare an observation with a wish. Objects are paired by colour; the only one needs no pairing."""
    complete = len(seen.objects) == len(wanted.objects)
    pairs: list[tuple[ObjectFacts, Seen | None]] = []
    free = list(seen.objects)
    for wish in wanted.objects:
        alone = complete and len(wanted.objects) == 1
        match = next((item for item in free if alone or item.colour == wish.colour), None)
        if match is not None:
            free.remove(match)
        pairs.append((wish, match))

    def agree(name: str) -> bool | None:
        wishes = [(getattr(wish, name), item) for wish, item in pairs if getattr(wish, name) is not None]
        if not wishes:
            return None
        return complete and all(item is not None and getattr(item, name) == wish for wish, item in wishes)

    return Verdict(
        colour=bool(agree("colour")),
        shape=bool(agree("shape")),
        motion=agree("motion"),
        background=None if wanted.background is None else seen.background == wanted.background,
        size=agree("size"),
        position=agree("position"),
    )


def observe(frames: NDArray[np.uint8]) -> Observation:
    """Describe a clip [T, H, W, 3]."""
    clip = frames.astype(np.float64)
    rims = np.stack([background_colour(frame) for frame in clip])
    blobs = [find_blobs(frame) for frame in clip]
    return Observation(
        background=_background_name(rims),
        objects=tuple(_describe(track, len(clip)) for track in _follow(blobs)),
        flicker=_flicker(clip, rims),
    )


def _background_name(rims: Floats) -> str:
    """Name of the background if every frame [T, 3] agrees with it."""
    names, palette = tuple(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), dtype=np.float64)
    distances = np.linalg.norm(rims[:, None] - palette, axis=-1)
    nearest = int(distances.mean(axis=0).argmin())
    steady = (distances.argmin(axis=1) == nearest) & (distances[:, nearest] < _NEAR_BACKGROUND)
    return names[nearest] if steady.mean() >= _PRESENCE else "unclear"


def _flicker(clip: Floats, rims: Floats) -> float:
    """Mean absolute change, frame to frame, of pixels that are background in both."""
    if len(clip) < 2:
        return 0.0
    quiet = np.linalg.norm(clip - rims[:, None, None], axis=-1) < _NEAR_BACKGROUND
    both = quiet[1:] & quiet[:-1]
    return float(np.abs(np.diff(clip, axis=0))[both].mean()) if both.any() else 255.0


def _follow(blobs: list[list[Blob]]) -> list[list[tuple[int, Blob]]]:
    """Tracks of (frame, object), one for each object that stays: in a frame the nearest of its colour continues it."""
    tracks: list[list[tuple[int, Blob]]] = []
    for index, found in enumerate(blobs):
        free = list(tracks)
        for blob in found:
            fits = [track for track in free if track[-1][1].colour == blob.colour]
            if fits:
                track = min(fits, key=lambda track: float(np.linalg.norm(track[-1][1].centroid - blob.centroid)))
                free = [other for other in free if other is not track]
                track.append((index, blob))
            else:
                tracks.append([(index, blob)])
    # A track of a few frames is a flaw of an object that is counted elsewhere, unless nothing else is there.
    return [track for track in tracks if len(track) >= 0.2 * len(blobs)]


def _describe(track: list[tuple[int, Blob]], num_frames: int) -> Seen:
    blobs = [blob for _, blob in track]
    whole = len(blobs) >= _PRESENCE * num_frames
    pure = float(np.median([blob.purity for blob in blobs])) >= _PURITY
    shape, overlap = _shape(blobs)
    motion = _motion(track, shape, num_frames) if whole else "unclear"
    return Seen(
        colour=blobs[0].colour if whole and pure else "unclear",
        shape=shape if overlap >= _OVERLAP and whole else "unclear",
        motion=motion,
        size=_size(blobs, motion, shape),
        position=_position(blobs, motion),
        overlap=overlap,
    )


def _shape(blobs: list[Blob]) -> tuple[str, float]:
    """The shape with the highest median overlap over frames spread through the clip."""
    picked = [blobs[index] for index in sorted(set(np.linspace(0, len(blobs) - 1, _SHAPE_FRAMES).round().astype(int)))]
    overlaps = [overlap_by_shape(blob.coverage, blob.centroid, blob.radius) for blob in picked]
    medians = {shape: float(np.median([overlap[shape] for overlap in overlaps])) for shape in SHAPES}
    best = max(SHAPES, key=medians.__getitem__)
    return best, medians[best]


def _motion(track: list[tuple[int, Blob]], shape: str, num_frames: int) -> str:
    if num_frames < 2:
        return "still"
    places = np.array([blob.centroid for _, blob in track])
    radii = np.array([blob.radius for _, blob in track])
    path: Floats = places[-1] - places[0]
    length, growth = float(np.linalg.norm(path)), radii[-3:].mean() / radii[:3].mean()
    turn = abs(_turn(track, shape))
    steady, kept, upright = length < _HELD, 1 / _KEPT < growth < _KEPT, turn < _UPRIGHT
    if length >= _MOVED and kept and upright:
        return _direction(places)
    if steady and growth >= _GROWN and upright:
        return "growing"
    if steady and growth <= 1 / _GROWN and upright:
        return "shrinking"
    if steady and kept and turn >= _TURNED:
        return "spinning"
    return "still" if steady and kept and upright else "unclear"


def _direction(places: Floats) -> str:
    """Direction of a path of centroids [T, 2] that is straight and along an axis."""
    path = places[-1] - places[0]
    # Every fourth place: what trembles by a fraction of a pixel is no detour.
    length = np.linalg.norm(np.diff(places[::4], axis=0), axis=-1).sum()
    across, along = sorted(np.abs(path))
    if along < 2 * across or np.linalg.norm(path) < _STRAIGHTNESS * length:
        return "unclear"
    if abs(path[0]) > abs(path[1]):
        return "right" if path[0] > 0 else "left"
    return "down" if path[1] > 0 else "up"


def _turn(track: list[tuple[int, Blob]], shape: str) -> float:
    """Angle in radians by which the object turned over the clip; clockwise is positive, a circle never turns."""
    if shape == "circle":
        return 0.0
    symmetry = math.tau / NUM_FOLDS[shape]
    angles = [orientation(blob.coverage, blob.centroid, shape) for _, blob in track]
    return float(np.unwrap(angles, period=symmetry)[-1] - angles[0])


def _size(blobs: list[Blob], motion: str, shape: str) -> str:
    radius = float(np.max([blob.radius for blob in blobs]) if motion in ("growing", "shrinking") else 0) / GROWTH[1]
    radius = radius or float(np.median([blob.radius for blob in blobs]))
    radius /= _area_radius(shape)
    small, large = _SIZE_BOUNDS
    return "small" if radius < small else "large" if radius > large else "medium"


def _area_radius(shape: str) -> float:
    """Radius of the circle of equal area, over the nominal radius."""
    reach = CIRCUMRADIUS[shape]
    areas = {"circle": math.pi, "square": 2 * reach**2, "triangle": 1.299 * reach**2, "star": 1.382 * reach**2}
    return math.sqrt(areas[shape] / math.pi)


def _position(blobs: list[Blob], motion: str) -> str:
    offset = np.mean([blob.centroid for blob in blobs], axis=0) - FRAME_SIDE / 2
    if motion in ("left", "right"):
        offset[0] = 0
    if motion in ("up", "down"):
        offset[1] = 0
    column, line = (int(np.sign(value)) * int(abs(value) > SIDE_THRESHOLD) + 1 for value in offset)
    return POSITIONS[3 * line + column]
