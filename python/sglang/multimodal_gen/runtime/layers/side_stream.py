"""Two computations at once where a graph is captured: the few tokens of a text need a part of a GPU only, and go beside
those of the image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

_Small = TypeVar("_Small")
_Large = TypeVar("_Large")


def side_by_side(small: Callable[[], _Small], large: Callable[[], _Large]) -> tuple[_Small, _Large]:
    """What both give. In a graph neither waits for the other; elsewhere the small one comes first.

    What they read stays alive until both are done, so they close over it.
    """
    if not _is_captured():
        return small(), large()
    main, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
    side.wait_stream(main)
    with torch.cuda.stream(side):
        of_small = small()
    of_large = large()
    main.wait_stream(side)
    return of_small, of_large


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
