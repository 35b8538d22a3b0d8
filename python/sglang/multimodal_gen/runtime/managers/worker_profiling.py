"""Torch profiles of single requests, taken in the worker: one at a time, written as Chrome traces.

A profile spans ticks, so whatever else the worker does meanwhile is in the trace as well, under the name of its unit;
the others' results are the same, only later.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import profiler

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import PROFILED_TIMESTEPS, SamplingParams
from sglang.multimodal_gen.errors import ProfilerBusy, StorageError
from sglang.multimodal_gen.runtime.managers.worker_messages import ProfileReady, Unit
from sglang.multimodal_gen.runtime.observability.logging_setup import fields

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Profile:
    """The profile of one request: from its unit number `first` to `last`, counted over all phases."""

    request_id: str
    starts: dict[str, int]
    first: int
    last: int
    recorder: Any = None

    def number(self, unit: Unit) -> int:
        """The unit's number over all phases."""
        return self.starts[unit.phase] + unit.index


class WorkerProfiler:
    """Watches the units of the request that wants a profile; all others pass."""

    def __init__(self, directory: Path, *, cuda: bool, rank: int = 0) -> None:
        self._directory = directory
        self._cuda = cuda
        self._rank = rank
        self._profile: _Profile | None = None

    def admit(self, request_id: str, params: SamplingParams, phases: Sequence[Phase]) -> None:
        """A request was admitted; does nothing unless it wants a profile.

        Raises:
            ProfilerBusy: another request is being profiled.
            StorageError: the profile directory cannot be written.
        """
        if not params.profile:
            return
        self.release(request_id)  # admitted once more: what an earlier attempt recorded is of no use
        if self._profile is not None:
            raise ProfilerBusy(request_id)
        self._prepare_directory()
        first, last = _window(params, phases)
        starts, total = {}, 0
        for phase in phases:
            starts[phase.name] = total
            total += phase.units
        self._profile = _Profile(request_id=request_id, starts=starts, first=first, last=last)

    def _prepare_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            probe = self._directory / f".{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StorageError(f"profile_dir: cannot be written ({error.strerror})", param="profile") from error

    def begin(self, units: Sequence[Unit]) -> bool:
        """Start recording when one of the units is where the profile begins; whether one is recorded. Not part of any
        unit's time."""
        profile = self._profile
        if profile is None:
            return False
        if profile.recorder is None and any(
            u.request_id == profile.request_id and profile.number(u) >= profile.first for u in units
        ):
            profile.recorder = self._start()
        return profile.recorder is not None

    def _start(self) -> Any:
        activities = [profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(profiler.ProfilerActivity.CUDA)
        recorder = profiler.profile(activities=activities, record_shapes=True)
        recorder.start()
        return recorder

    @contextlib.contextmanager
    def named(self, units: Sequence[Unit]) -> Iterator[None]:
        """Give the units a name in the trace while one is recorded."""
        if self._profile is None or self._profile.recorder is None:
            yield
            return
        numbers = ", ".join(str(unit.index) for unit in units)
        with profiler.record_function(f"{units[0].phase} {numbers}"):
            yield

    def ends_with(self, units: Sequence[Unit]) -> bool:
        """Whether these are where what is recorded ends."""
        profile = self._profile
        return (
            profile is not None
            and profile.recorder is not None
            and any(u.request_id == profile.request_id and profile.number(u) >= profile.last for u in units)
        )

    def end(self) -> ProfileReady:
        """Stop and write, once the last of the profile's units has run. Not part of any unit's time."""
        profile, self._profile = self._profile, None
        assert profile is not None, "it is being recorded"
        profile.recorder.stop()
        try:
            path = self._write(profile)
        except OSError as error:
            logger.warning(
                "the profile was not written: %s", error.strerror, extra=fields(request_id=profile.request_id)
            )
            return ProfileReady(request_id=profile.request_id, note=f"no profile was written: {error.strerror}")
        logger.info("profile written to %s", path, extra=fields(request_id=profile.request_id))
        return ProfileReady(request_id=profile.request_id, path=str(path))

    def _write(self, profile: _Profile) -> Path:
        stem = re.sub(r"[^\w.-]", "_", profile.request_id)
        path = self._directory.absolute() / f"{stem}-rank{self._rank}.trace.json.gz"
        part = path.with_name(f".{secrets.token_hex(8)}.json.gz")
        try:
            profile.recorder.export_chrome_trace(str(part))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def release(self, request_id: str) -> None:
        """The request has ended; a profile that is not complete goes with it."""
        profile = self._profile
        if profile is not None and profile.request_id == request_id:
            self._profile = None
            if profile.recorder is not None:
                profile.recorder.stop()


def _window(params: SamplingParams, phases: Sequence[Phase]) -> tuple[int, int]:
    """First and last unit of the profile: all of them, or N denoising steps after one that warms up."""
    lanes = [phase.lane for phase in phases for _ in range(phase.units)]
    if params.profile_all_stages:
        return 0, len(lanes) - 1
    steps = [number for number, lane in enumerate(lanes) if lane == "denoise"]
    wanted = steps[1:][: params.num_profiled_timesteps or PROFILED_TIMESTEPS] or steps
    return wanted[0], wanted[-1]
