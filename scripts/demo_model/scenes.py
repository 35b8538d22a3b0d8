"""Random scenes: which objects a clip shows, where, how large, and how they move. Numbers only; `clips` draws them.

Arrays: B clips, 2 object slots (the second is unused where `num_objects` is 1). Lengths are pixels of a 128-pixel
frame, x to the right and y down. Times run from 0 (first frame) to 1 (last).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from demo_model.held_out import is_held_out_motion, is_held_out_pair
from demo_model.vocabulary import (
    BACKGROUNDS,
    CIRCUMRADIUS,
    COLOURS,
    FRAME_SIDE,
    GROWTH,
    MOTIONS,
    POSITIONS,
    RADII,
    SHAPES,
    SIZES,
    TURN,
    ClipFacts,
    ObjectFacts,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
_STILL, _SPINNING = MOTIONS.index("still"), MOTIONS.index("spinning")
_STEPS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]] + [[0, 0]] * 4, dtype=np.float64)  # by motion
_EXTENT = np.array([CIRCUMRADIUS[shape] for shape in SHAPES])
_EDGE = 3.0  # pixels that stay free between an object and the frame
_GAP = 5.0  # pixels that stay free between two objects
_CELL = 30.0  # from the centre of the frame to that of an outer cell
SIDE_THRESHOLD = 11.0  # beyond this distance from the middle a position has a name


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Parameters of B clips. `centre` is where an object is halfway through its path."""

    num_objects: Ints  # [B]
    background: Ints  # [B]
    colour: Ints  # [B, 2]
    shape: Ints  # [B, 2]
    motion: Ints  # [B, 2]
    size: Ints  # [B, 2]
    radius: Floats  # [B, 2]
    centre: Floats  # [B, 2, 2]
    travel: Floats  # [B, 2], length of the path of a moving object

    def __len__(self) -> int:
        return len(self.background)

    def select(self, rows: Ints) -> Scenes:
        """The clips at the given rows."""
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def centres_at(self, times: Floats) -> Floats:
        """Centres at T times: [B, 2, T, 2]."""
        path = _STEPS[self.motion][:, :, None] * self.travel[:, :, None, None]
        return self.centre[:, :, None] + path * (times - 0.5)[:, None]

    def radii_at(self, times: Floats) -> Floats:
        """Nominal radii at T times: [B, 2, T]."""
        low, high = GROWTH
        scale = np.ones((len(MOTIONS), len(times)))
        scale[MOTIONS.index("growing")] = low + (high - low) * times
        scale[MOTIONS.index("shrinking")] = high + (low - high) * times
        return self.radius[:, :, None] * scale[self.motion]

    def angles_at(self, times: Floats) -> Floats:
        """Clockwise rotation in radians at T times: [B, 2, T]."""
        return TURN * times * (self.motion == _SPINNING)[:, :, None]

    def facts(self, row: int, *, video: bool) -> ClipFacts:
        """Everything true of one clip, in words."""
        objects = tuple(self._object_facts(row, slot, video) for slot in range(self.num_objects[row]))
        return ClipFacts(objects=objects, background=_BACKGROUND_NAMES[self.background[row]])

    def _object_facts(self, row: int, slot: int, video: bool) -> ObjectFacts:
        motion = self.motion[row, slot]
        offset = self.centre[row, slot] - FRAME_SIDE / 2
        offset = np.where(_STEPS[motion] != 0, 0, offset)  # along its path an object has no one place
        column, line = (int(np.sign(value)) * int(abs(value) > SIDE_THRESHOLD) + 1 for value in offset)
        return ObjectFacts(
            colour=_COLOUR_NAMES[self.colour[row, slot]],
            shape=SHAPES[self.shape[row, slot]],
            motion=MOTIONS[motion] if video else None,
            size=SIZES[self.size[row, slot]],
            position=POSITIONS[3 * line + column],
        )


def _combinations() -> tuple[Ints, Ints]:
    """All (colour, shape, motion) and those of them that training may show, [N, 3] each. Circles never spin."""
    every = [
        (colour, shape, motion)
        for colour in range(len(COLOURS))
        for shape in range(len(SHAPES))
        for motion in range(len(MOTIONS))
        if not (SHAPES[shape] == "circle" and motion == _SPINNING)
    ]
    seen = [key for key in every if not is_held_out_motion(_COLOUR_NAMES[key[0]], SHAPES[key[1]], MOTIONS[key[2]])]
    return np.array(every), np.array(seen)


def _held_out_pairs() -> NDArray[np.bool_]:
    """[32, 32] over colour · 4 + shape."""
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return np.array([[is_held_out_pair(first, second) for second in looks] for first in looks])


_EVERY, _SEEN = _combinations()
_HELD_OUT_PAIRS = _held_out_pairs()


def sample_scenes(
    rng: np.random.Generator, count: int, *, video: bool = True, two_share: float = 0.5, training: bool = True
) -> Scenes:
    """Draw `count` scenes; with `training` the held-out combinations do not occur. Images hold still."""
    two = rng.random(count) < two_share
    looks = _sample_looks(rng, two, training)
    if not video:
        looks[:, :, 2] = _STILL
    size = np.where(two[:, None], rng.choice(2, (count, 2), p=(0.55, 0.45)), rng.choice(3, (count, 2)))
    bounds = np.array([RADII[name] for name in SIZES])[size]
    bounds[two] = np.minimum(bounds[two], 17.5)  # two objects must fit side by side
    radius = rng.uniform(bounds[..., 0], bounds[..., 1])
    scenes = Scenes(
        num_objects=np.where(two, 2, 1),
        background=_sample_backgrounds(rng, looks[:, :, 0], two),
        colour=looks[:, :, 0],
        shape=looks[:, :, 1],
        motion=looks[:, :, 2],
        size=size,
        radius=radius,
        centre=np.zeros((count, 2, 2)),
        travel=np.zeros((count, 2)),
    )
    _place(rng, scenes)
    return scenes


def _sample_looks(rng: np.random.Generator, two: NDArray[np.bool_], training: bool) -> Ints:
    """(colour, shape, motion) of both slots, [B, 2, 3]; two objects differ in colour."""
    table = _SEEN if training else _EVERY
    looks: Ints = table[rng.integers(len(table), size=(len(two), 2))]
    while True:
        keys = looks[:, :, 0] * len(SHAPES) + looks[:, :, 1]
        bad = looks[:, 0, 0] == looks[:, 1, 0]
        if training:
            bad |= _HELD_OUT_PAIRS[keys[:, 0], keys[:, 1]]
        bad &= two
        if not bad.any():
            return looks
        looks[bad] = table[rng.integers(len(table), size=(int(bad.sum()), 2))]


def _sample_backgrounds(rng: np.random.Generator, colour: Ints, two: NDArray[np.bool_]) -> Ints:
    """A background that shares its name with no object of the clip, [B]."""
    # Index of each colour's namesake among the backgrounds, or -1.
    namesake = np.array([_BACKGROUND_NAMES.index(name) if name in _BACKGROUND_NAMES else -1 for name in _COLOUR_NAMES])
    background = rng.integers(len(BACKGROUNDS), size=len(two))
    while True:
        same = background[:, None] == namesake[colour]
        bad = same[:, 0] | (same[:, 1] & two)
        if not bad.any():
            return background
        background[bad] = rng.integers(len(BACKGROUNDS), size=int(bad.sum()))


def _place(rng: np.random.Generator, scenes: Scenes) -> None:
    """Fill `centre` and `travel`; pairs that come too close are placed again, hopeless ones lose their second."""
    times = np.linspace(0, 1, 9)
    todo = np.arange(len(scenes))
    for _ in range(60):
        part = scenes.select(todo)
        centre, travel = _sample_paths(rng, part)
        scenes.centre[todo], scenes.travel[todo] = centre, travel
        part = scenes.select(todo)
        centres, reach = part.centres_at(times), part.radii_at(times) * _EXTENT[part.shape][..., None]
        distance = np.linalg.norm(centres[:, 0] - centres[:, 1], axis=-1)
        close = (distance < reach.sum(axis=1) + _GAP).any(axis=-1)
        todo = todo[close & (part.num_objects == 2)]
        if len(todo) == 0:
            return
    scenes.num_objects[todo] = 1


def _sample_paths(rng: np.random.Generator, scenes: Scenes) -> tuple[Floats, Floats]:
    """Centres [B, 2, 2] and travels [B, 2] that keep every object inside the frame for the whole clip."""
    shape, two = scenes.motion.shape, (scenes.num_objects == 2)[:, None]
    largest = scenes.radii_at(np.array([0.0, 1.0])).max(axis=-1) * _EXTENT[scenes.shape] + _EDGE
    longest = FRAME_SIDE - 2 * largest
    travel = np.where(two, rng.uniform(30, 44, shape), rng.uniform(40, 60, shape))
    travel = np.where(scenes.motion < 4, np.minimum(travel, longest), 0)
    cell = rng.integers(-1, 2, (*shape, 2))
    offset = cell * _CELL + rng.uniform(-4, 4, (*shape, 2))
    along = _STEPS[scenes.motion] != 0
    # Alone an object crosses the middle; two need the freedom to pass each other.
    freedom = np.where(two[..., None], 20.0, 4.0)
    offset = np.where(along, rng.uniform(-freedom, freedom, offset.shape), offset)
    slack = FRAME_SIDE / 2 - largest[..., None] - along * travel[..., None] / 2
    return FRAME_SIDE / 2 + np.clip(offset, -slack, slack), travel
