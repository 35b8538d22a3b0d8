"""How a request's work is cut into units that the scheduler can order, batch, count and stop."""

from __future__ import annotations

from typing import Literal

import msgspec

Lane = Literal["encode", "denoise", "decode"]
LANES: tuple[Lane, ...] = ("encode", "denoise", "decode")
LAUNCH_ORDER: tuple[Lane, ...] = ("denoise", "encode", "decode")
"""In which a worker gives the lanes of a tick to its device: the others may run beside denoising."""


class Phase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stretch of a request's life in the workers, made of `units` equal units.

    `lane` says which kind of work a unit is, `batch_key` which other requests' units may share a forward with it,
    `cost` is the relative price of one unit (latent tokens). `peak_bytes` estimates what one unit needs while it runs,
    `held_bytes` what the request keeps between units, both above the weights. Units that run `alone` share no forward;
    their key says only whose times and memory are alike.
    """

    name: str
    lane: Lane
    units: int
    batch_key: str
    cost: float
    peak_bytes: int
    held_bytes: int = 0
    alone: bool = False
