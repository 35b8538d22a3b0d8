"""One command's share of a training run: its clock, its folder, its log."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from demo_model.networks import ModelSizes
from demo_model.optimisation import Optimiser, Ranks

logger = logging.getLogger("demo_model")

# Ranks agree on the time only this often, since asking makes the host wait for the device.
_STEPS_BETWEEN_CLOCKS = 10
_SAVE_EVERY_S = 60.0
# Kept free at the end of a command, for saving.
_RESERVE_S = 5.0


@dataclass(kw_only=True)
class Session:
    """What the stages share. `work_dir` outlives the command; everything else is of this command alone."""

    work_dir: Path
    sizes: ModelSizes
    ranks: Ranks
    trial: bool
    compiled: bool
    seed: int
    deadline: float  # on time.monotonic

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files."""
        return self.ranks.rank == 0

    def log(self, stage: str, **values: Any) -> None:
        """Append a JSON line to the stage's log and show it."""
        if not self.leads:
            return
        line = json.dumps(
            {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
        )
        with (self.work_dir / f"{stage}.jsonl").open("a") as file:
            file.write(line + "\n")
        logger.info("%s %s", stage, line)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class Pace:
    """Counts training time across commands and says when to save and stop, the same on every rank."""

    def __init__(self, session: Session, optimiser: Optimiser, path: Path, budget_s: float) -> None:
        self.session, self.optimiser, self.path, self.budget_s = session, optimiser, path, budget_s
        self._before_s = optimiser.elapsed_s
        self._start = time.monotonic()
        self._last_save = self._start
        self.stopped = self.finished

    @property
    def finished(self) -> bool:
        """Whether the whole budget is used."""
        return self.optimiser.elapsed_s >= self.budget_s

    @property
    def progress(self) -> float:
        """Share of the budget used, in 0 … 1."""
        return min(1.0, self.optimiser.elapsed_s / self.budget_s)

    def tick(self) -> None:
        """Call after every step."""
        if self.optimiser.step_count % _STEPS_BETWEEN_CLOCKS:
            return
        session, now = self.session, time.monotonic()
        late = now > session.deadline - _RESERVE_S
        due = now - self._last_save > _SAVE_EVERY_S
        elapsed = self._before_s + now - self._start
        elapsed, late_flag, due_flag = session.ranks.from_first([elapsed, float(late), float(due)])
        self.optimiser.elapsed_s = elapsed
        self.stopped = bool(late_flag) or self.finished
        if self.stopped or due_flag:
            self.save()

    def save(self) -> None:
        """Write the state now."""
        self._last_save = time.monotonic()
        if self.session.leads:
            self.optimiser.save(self.path)
        self.session.ranks.wait()
