"""What does not change between the steps of a request, or is known before they come: computed once, given to forwards.

Shapes: B rows, V numbers of a step, L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Embedded(NamedTuple):
    """What the rows of a forward bring; the forward computes itself what is None.

    `steps` [B, V] fp32 is what a transformer's `embed_steps` made of the rows' steps, `text` [B, …, L, D] what its
    `embed_text` made of their texts. It does not look at what these were made of then, except for its shape.
    """

    steps: Tensor | None = None
    text: Tensor | None = None


NOTHING = Embedded()
