"""Whether the components of a checkpoint fit together."""

from __future__ import annotations

from collections.abc import Iterable

from sglang.multimodal_gen.errors import UnsupportedModel


def require_equal(facts: Iterable[tuple[str, object, object, str]]) -> None:
    """Each fact: what a component's config says, under which name, and what another component wants, and which.

    Raises: UnsupportedModel for the first two that differ.
    """
    for name, found, expected, source in facts:
        if found != expected:
            raise UnsupportedModel(f"{name} is {found}, but {source} wants {expected}; they must be equal")
