"""How the ranks of one replica are laid out: sizes of the axes (cfg, ring, ulysses, tp)."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.errors import InvalidValue

AXES = ("cfg", "ring", "ulysses", "tp")
"""The outermost first: neighbours on the last talk most, and are to be neighbours in hardware too."""


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
