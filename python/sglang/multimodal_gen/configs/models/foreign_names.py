"""Under which names other programs' files know a model's layers, where these are not those of diffusers' checkpoints.

Adapters go by those of linear layers, files of whole models by all of them.
"""

from __future__ import annotations

from typing import NamedTuple


class ForeignName(NamedTuple):
    """A layer of the original code, with `{}` for a number, and the layers that it is in ours, its outputs in order.

    Several of ours share the original's input; those that a model does not read are none of ours. `halves_swapped`:
    the original's first half of outputs is our second. A name may also be that of a tensor, as its own are then.
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
