"""What a worker knows of a tick that its device may still be at work on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen.configs.request_plan import Lane
from sglang.multimodal_gen.runtime.managers.messages import CachedSteps
from sglang.multimodal_gen.runtime.managers.worker_messages import LaneDone, Tick, TickDone, UnitFailure

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.pipelines_core.device_clock import Mark


@dataclass(frozen=True)
class StartedLane:
    """A lane's units between two marks of the device."""

    lane: Lane
    begin: Mark
    end: Mark
    peak_bytes: int | None
    cached: dict[str, CachedSteps]

    def done(self) -> LaneDone:
        """What the scheduler hears of it, when the device has reached its end."""
        ms = self.end.ms_since(self.begin)
        return LaneDone(lane=self.lane, ms=ms, peak_bytes=self.peak_bytes, cached=self.cached)


@dataclass
class StartedTick:
    """A tick that the device was given. `kept`: what it may still read, whatever becomes of the requests."""

    tick: Tick
    dropped: bool
    lanes: list[StartedLane] = field(default_factory=list)
    failures: list[UnitFailure] = field(default_factory=list)
    peak_bytes: int = 0
    preview_s: float = 0.0
    kept: list[Any] = field(default_factory=list)

    def is_done(self) -> bool:
        """Whether the device has nothing of it left to do, or never will: waiting for it then says why."""
        try:
            return all(lane.end.is_reached() for lane in self.lanes)
        except RuntimeError:
            return True

    def done(self) -> TickDone:
        """Wait for all of it; what the scheduler hears. Raises: torch.AcceleratorError when the device failed."""
        for lane in self.lanes:
            lane.end.wait()
        return TickDone(
            seq=self.tick.seq,
            epoch=self.tick.epoch,
            dropped=self.dropped,
            failures=tuple(self.failures),
            lanes=tuple(lane.done() for lane in self.lanes),
            peak_bytes=self.peak_bytes,
            preview_ms=self.preview_s * 1000,
        )
