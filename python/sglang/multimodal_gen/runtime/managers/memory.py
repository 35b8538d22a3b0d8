"""Memory of one replica: what units were measured to take, and who holds a reservation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from sglang.multimodal_gen.configs.request_plan import Phase

# The first run of a kind may allocate workspaces that stay; after this many measurements it no longer counts.
_REMEMBERED = 8


@dataclass
class LearnedMemory:
    """By batch key, how many times the estimate its units really took, and the largest batch after one did not fit."""

    _ratios: dict[str, deque[float]] = field(default_factory=dict)
    _largest_batch: dict[str, int] = field(default_factory=dict)

    def record(self, batch_key: str, *, estimated_bytes: int, measured_bytes: int) -> None:
        """Units with this estimate in all ran in one forward and took `measured_bytes` at most."""
        ratios = self._ratios.setdefault(batch_key, deque(maxlen=_REMEMBERED))
        ratios.append(measured_bytes / max(1, estimated_bytes))

    def needed_bytes(self, batch_key: str, estimated_bytes: int) -> int:
        """What units with this estimate in all will take: as measured, else as estimated."""
        ratios = self._ratios.get(batch_key)
        return estimated_bytes if ratios is None else math.ceil(max(ratios) * estimated_bytes)

    def ran_out(self, batch_key: str, batch_size: int) -> None:
        """A forward of so many requests ran out of memory: from now on half as many share one."""
        self._largest_batch[batch_key] = max(1, batch_size // 2)

    def largest_batch(self, batch_key: str, most: int) -> int:
        """How many requests may share a forward, `most` unless memory ran out before."""
        return min(most, self._largest_batch.get(batch_key, most))


class Holder(Protocol):
    """A request that has, or wants, a reservation."""

    @property
    def phases(self) -> tuple[Phase, ...]: ...


@dataclass(frozen=True)
class Budget:
    """What the requests of a replica may take together: what each holds between units, and the largest unit of all."""

    total_bytes: int
    learned: LearnedMemory

    def held_bytes(self, holders: Iterable[Holder]) -> int:
        """What these requests keep between their units."""
        return sum(max((phase.held_bytes for phase in holder.phases), default=0) for holder in holders)

    def reserved_bytes(self, holders: Iterable[Holder]) -> int:
        """What is reserved while these requests run."""
        present = list(holders)
        return self.held_bytes(present) + max((self._peak_bytes(holder) for holder in present), default=0)

    def has_room(self, holder: Holder, beside: Iterable[Holder]) -> bool:
        """Whether a request can run beside those. Alone it always can: the worker has checked it against the device."""
        others = list(beside)
        return not others or self.reserved_bytes([*others, holder]) <= self.total_bytes

    def _peak_bytes(self, holder: Holder) -> int:
        return max((self.learned.needed_bytes(p.batch_key, p.peak_bytes) for p in holder.phases), default=0)
