"""Where this process stands in its replica: size and rank on each of the axes (cfg, ring, ulysses, tp)."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ProcessAxis:
    """One axis of the replica's process mesh. `group` holds the ranks that differ on this axis only."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} is outside an axis of size {self.size}"

    def share(self, total: int, what: str) -> int:
        """This rank's part of `total` equal things; the degrees were checked against the model at start-up."""
        assert total % self.size == 0, f"{total} {what} cannot be dealt to {self.size} ranks"
        return total // self.size


ALONE = ProcessAxis()


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """The axes of one replica. Layers take it as an argument, so that models never ask for a global."""

    cfg: ProcessAxis = ALONE
    ring: ProcessAxis = ALONE
    ulysses: ProcessAxis = ALONE
    tp: ProcessAxis = ALONE

    @property
    def tp_size(self) -> int:
        return self.tp.size

    @property
    def tp_rank(self) -> int:
        return self.tp.rank

    @property
    def sequence_size(self) -> int:
        """Ranks among which the tokens of one sample are dealt."""
        return self.ring.size * self.ulysses.size


SINGLE = ParallelContext()
"""A replica of one process."""
