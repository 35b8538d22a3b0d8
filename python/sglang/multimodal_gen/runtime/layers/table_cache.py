"""Tables that layers keep between forwards, such as rotations and masks, by what they were made of.

A graph that was captured from a forward reads them where they were, so it keeps those that it met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

_Made = TypeVar("_Made")
_P = ParamSpec("_P")
_listening: list[list[object]] = []
_num_made = 0


class TableCache(Generic[_P, _Made]):
    """A function that remembers what it made lately."""

    def __init__(self, make: Callable[_P, _Made], maxsize: int) -> None:
        def counted(*args: _P.args, **kwargs: _P.kwargs) -> _Made:
            global _num_made
            _num_made += 1
            return make(*args, **kwargs)

        self._cached = lru_cache(maxsize=maxsize)(counted)
        self.cache_clear = self._cached.cache_clear
        update_wrapper(self, make)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _Made:
        """What `make` returns, or returned for equal arguments."""
        made = self._cached(*args, **kwargs)  # type: ignore[arg-type]
        for kept in _listening:
            kept.append(made)
        return made


def table_cache(maxsize: int) -> Callable[[Callable[_P, _Made]], TableCache[_P, _Made]]:
    """As `functools.lru_cache`, for functions that return tensors, or what holds some; see `tables_kept`."""

    def decorate(make: Callable[_P, _Made]) -> TableCache[_P, _Made]:
        return TableCache(make, maxsize)

    return decorate


@contextmanager
def tables_kept() -> Iterator[list[object]]:
    """A list of what such functions return inside the `with` block: while it lives, their memory is not given away."""
    kept: list[object] = []
    _listening.append(kept)
    try:
        yield kept
    finally:
        # By identity: lists of tensors cannot be compared.
        del _listening[next(index for index, each in enumerate(_listening) if each is kept)]


def num_tables_made() -> int:
    """By all such functions so far, those that were there already not counted."""
    return _num_made


def row_index(rows: Iterable[int], device: torch.device) -> Tensor:
    """These rows of a batch, to index tensors with: [number of rows], int64."""
    return _row_index(tuple(rows), device)


@table_cache(64)
def _row_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    # An index made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.long, device=device)
