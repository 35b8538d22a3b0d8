"""Which parts of a text encoder's weights are dealt to which ranks of a replica: decided from sizes, before it loads.

An encoder sees each prompt once and its layers know nothing of the transformer's layout, so it is dealt to all ranks of
the replica where its sizes divide, and else along the largest axis that they do divide by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sglang.multimodal_gen.configs.replica_shape import ReplicaShape

Axis = Literal["world", "sequence", "tp", "ulysses", "ring", "cfg"]

LARGE_BYTES = 1 << 30
"""From here on `auto` deals: below it, what a rank would save is less than what its activations take."""


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """What of an encoder can be dealt; `num_key_heads` is less than `num_heads` where heads share keys."""

    num_heads: int
    num_key_heads: int
    ffn_dim: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class EncoderDealing:
    """Axes of the replica to which each part is dealt, None: it is whole on every rank. `reason` is for the log."""

    heads: Axis | None = None
    features: Axis | None = None
    vocabulary: Axis | None = None
    reason: str


def deal_encoder(
    name: str, size: EncoderSize | str, *, weight_bytes: int, shape: ReplicaShape, wish: str
) -> EncoderDealing:
    """For the encoder in the directory `name`; in place of its size there may be the reason why it cannot be dealt.

    `wish`: `auto` deals what has at least LARGE_BYTES, `on` whatever can be dealt, `off` nothing.
    """
    whole = f"{name} ({weight_bytes / 2**30:.1f} GiB) is whole on every rank"
    if wish == "off":
        return EncoderDealing(reason=f"{whole}: encoder_parallel is off")
    if wish == "auto" and weight_bytes < LARGE_BYTES:
        return EncoderDealing(reason=f"{whole}: it is small, less than {LARGE_BYTES / 2**30:.0f} GiB")
    if isinstance(size, str):
        return EncoderDealing(reason=f"{whole}: {size}")
    heads = _axis(shape, size.num_heads, size.num_key_heads)
    features, vocabulary = _axis(shape, size.ffn_dim), _axis(shape, size.vocab_size)
    keys = "" if size.num_key_heads == size.num_heads else f" with {size.num_key_heads} of keys"
    counts = {
        "attention": (heads, f"{size.num_heads} heads{keys}"),
        "feed-forward": (features, f"{size.ffn_dim} features"),
        "vocabulary": (vocabulary, f"{size.vocab_size} words"),
    }
    parts = [_told(part, axis, what, shape) for part, (axis, what) in counts.items()]
    if heads is None and features is None:
        return EncoderDealing(reason=f"{whole}: {'; '.join(parts[:2])}")
    return EncoderDealing(
        heads=heads,
        features=features,
        vocabulary=vocabulary,
        reason=f"{name} ({weight_bytes / 2**30:.1f} GiB) is dealt to the replica's ranks: {'; '.join(parts)}",
    )


def axis_sizes(shape: ReplicaShape) -> dict[Axis, int]:
    """Ranks along each axis that has a group of its own; of equal ones the first is taken."""
    return {
        "world": shape.num_ranks,
        "sequence": shape.ring * shape.ulysses,
        "tp": shape.tp,
        "ulysses": shape.ulysses,
        "ring": shape.ring,
        "cfg": shape.cfg,
    }


def _axis(shape: ReplicaShape, *counts: int) -> Axis | None:
    sizes = axis_sizes(shape)
    fitting = [axis for axis, size in sizes.items() if size > 1 and all(count % size == 0 for count in counts)]
    return max(fitting, key=lambda axis: sizes[axis], default=None)


def _told(part: str, axis: Axis | None, what: str, shape: ReplicaShape) -> str:
    if axis is None:
        return f"{part} whole, since {what} cannot be dealt evenly to {shape.num_ranks}"
    size = axis_sizes(shape)[axis]
    why = "" if size == shape.num_ranks else f", since {what} cannot be dealt evenly to {shape.num_ranks}"
    return f"{part} to {size}{why}"
