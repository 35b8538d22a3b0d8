"""Under which names adapters in the wild know a model's linear layers, where these are not the checkpoint's own."""

from __future__ import annotations

from typing import NamedTuple


class ForeignName(NamedTuple):
    """A layer of the original code, with `{}` for a number, and the layers that it is in ours, its outputs in order.

    Several of ours share the original's input. `halves_swapped`: the original's first half of outputs is our second.
    """

    name: str
    own: tuple[str, ...]
    halves_swapped: bool = False


def foreign(name: str, *own: str, inside: str = "", within: str = "") -> ForeignName:
    """`inside` stands before the original's name, `within` before each of ours."""
    return ForeignName(inside + name, tuple(within + each for each in own))


def swapped(name: str, own: str) -> ForeignName:
    """An adaptive norm whose original has shift before scale, and ours scale before shift."""
    return ForeignName(name, (own,), halves_swapped=True)
