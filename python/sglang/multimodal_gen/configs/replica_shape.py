"""How the ranks of one replica are laid out: sizes of the axes (cfg, ring, ulysses, tp)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang.multimodal_gen.errors import InvalidValue

AXES = ("cfg", "ring", "ulysses", "tp")
"""The outermost first: neighbours on the last talk most, and are to be neighbours in hardware too."""

DEGREES = {"cfg_parallel_size": "cfg", "ring_degree": "ring", "ulysses_degree": "ulysses", "tp_size": "tp"}
"""The axis of each option."""


@dataclass(frozen=True, kw_only=True)
class ReplicaShape:
    """Sizes of the axes of a replica."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(named) or "one rank"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order of the mesh."""
        return self.cfg, self.ring, self.ulysses, self.tp

    @classmethod
    def every(cls, num_ranks: int) -> Iterator[ReplicaShape]:
        """All layouts of so many ranks."""
        for cfg in _divisors(num_ranks):
            for ring in _divisors(num_ranks // cfg):
                for ulysses in _divisors(num_ranks // cfg // ring):
                    yield cls(cfg=cfg, ring=ring, ulysses=ulysses, tp=num_ranks // cfg // ring // ulysses)

    def check_heads(self, num_heads: int) -> None:
        """Tensor-parallel ranks divide the heads, and Ulysses ranks what is left of them.

        Raises: InvalidValue naming the degrees that do.
        """
        for name, degree, other in (("tp_size", self.tp, 1), ("ulysses_degree", self.ulysses, self.tp)):
            if num_heads % (degree * other):
                fitting = [str(n) for n in range(1, num_heads + 1) if num_heads % (n * other) == 0]
                beside = f" at tp_size {other}" if other > 1 else ""
                degrees = f"{', '.join(fitting)}: what divides the transformer's {num_heads} attention heads{beside}"
                raise InvalidValue(name, degree, degrees)

    @property
    def num_ranks(self) -> int:
        """Processes of the replica."""
        return self.cfg * self.ring * self.ulysses * self.tp


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
