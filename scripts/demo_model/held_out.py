"""What training never sees: fixed by arithmetic on the vocabulary before any training, and never by results."""

from __future__ import annotations

import re

from demo_model.vocabulary import COLOURS, DIRECTIONS, MOTIONS, SHAPES

_WORDS = {"colour": "|".join(COLOURS), "shape": "|".join(SHAPES), "direction": "|".join(DIRECTIONS)}
_FORM = re.compile(r"an? ({colour}) ({shape})( moving ({direction}))?".format(**_WORDS))


def is_held_out_caption(caption: str) -> bool:
    """Whether the caption is exactly `a {colour} {shape}` or `a {colour} {shape} moving {direction}`.

    Case, a full stop and spaces at the ends make no difference.
    """
    return _FORM.fullmatch(caption.strip().rstrip(".").lower()) is not None


def is_held_out_motion(colour: str, shape: str, motion: str) -> bool:
    """Whether no training clip shows this coloured shape in this motion.

    That is 22 of the 248 combinations that exist; circles never spin.
    """
    index = tuple(COLOURS).index(colour) * 5 + SHAPES.index(shape) * 3 + MOTIONS.index(motion) * 4
    return index % 11 == 4


def is_held_out_pair(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether no training clip shows these two (colour, shape) together, in either order: about one in ten."""
    names = tuple(COLOURS)
    low, high = sorted(names.index(colour) * len(SHAPES) + SHAPES.index(shape) for colour, shape in (first, second))
    return (low * 7 + high * 3) % 11 == 5
