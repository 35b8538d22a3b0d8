"""Tables that layers keep between forwards, such as rotations and masks, by what they were made of.

A graph that was captured from a forward reads them where they were, so it keeps those that it met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

_Made = TypeVar("_Made")
_P = ParamSpec("_P")
_listening: list[list[object]] = []


def table_cache(maxsize: int) -> Callable[[Callable[_P, _Made]], Callable[_P, _Made]]:
    """As `functools.lru_cache`, for functions that return tensors, or what holds some; see `tables_kept`."""

    def decorate(make: Callable[_P, _Made]) -> Callable[_P, _Made]:
        cached = lru_cache(maxsize=maxsize)(make)

        @wraps(make)
        def get(*args: _P.args, **kwargs: _P.kwargs) -> _Made:
            made = cached(*args, **kwargs)  # type: ignore[arg-type]
            for kept in _listening:
                kept.append(made)
            return made

        return get

    return decorate


@contextmanager
def tables_kept() -> Iterator[list[object]]:
    """A list of what such functions return inside the `with` block: while it lives, their memory is not given away."""
    kept: list[object] = []
    _listening.append(kept)
    try:
        yield kept
    finally:
        _listening.remove(kept)
