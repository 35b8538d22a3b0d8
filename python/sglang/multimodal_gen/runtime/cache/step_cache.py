"""`StepCache`: a request's step cache, which lives and dies with the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.multimodal_gen.runtime.cache.row_state import RowState, num_bytes
from sglang.multimodal_gen.runtime.cache.rules import CachedRow, CacheRule

COLD_START = "the step cache began anew after a restart: its state lies dealt over several ranks and is not saved"


@dataclass(kw_only=True)
class StepCache:
    """What the rows of a request remember, by guidance branch, of the transformer of one stage: with the next stage's
    they have nothing in common. `whole`: this rank holds all of every row, so that the state can be saved.

    `computed_steps` of the steps done had at least one row computed; `computed_rows` of `num_rows`, all of them. A step
    that `skips` left a row out: the last one did if `skipped`.
    """

    rule: CacheRule
    whole: bool
    stage: str = ""
    rows: dict[int, RowState] = field(default_factory=dict)
    computed_steps: int = 0
    computed_rows: int = 0
    num_rows: int = 0
    skipped: bool = False

    def row(self, stage: str, branch: int, step: int) -> CachedRow:
        """The row of a guidance branch at a step; nothing is remembered of it before `keep`."""
        return self.rule.row(self.rows.get(branch) if stage == self.stage else None, step)

    def keep(self, stage: str, rows: Mapping[int, CachedRow], *, computed: list[bool]) -> None:
        """The step stands: remember its rows, those that this rank ran. `computed`: which of all its rows were."""
        if stage != self.stage:
            self.stage, self.rows = stage, {}
        self.rows = self.rows | {branch: row.after for branch, row in rows.items() if row.after is not None}
        self.computed_steps += any(computed)
        self.computed_rows += sum(computed)
        self.num_rows += len(computed)
        self.skipped = not all(computed)

    def forget(self) -> None:
        """Free what the rows remember; the counts stay."""
        self.rows = {}

    @property
    def held_bytes(self) -> int:
        """What the rows hold on the device."""
        return sum(map(num_bytes, self.rows.values()))

    def state_dict(self) -> dict[str, Any]:
        """As a tree of tensors, numbers and texts; without the rows where this rank has only its share of them."""
        rows = {str(branch): state.state_dict() for branch, state in self.rows.items()} if self.whole else {}
        return {
            "stage": self.stage,
            "rows": rows,
            "had_rows": bool(self.rows),
            "computed_steps": self.computed_steps,
            "computed_rows": self.computed_rows,
            "num_rows": self.num_rows,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> str | None:
        """Go on from what `state_dict` returned; a note where the rows must begin anew."""
        self.stage = values["stage"]
        self.computed_steps, self.computed_rows = values["computed_steps"], values["computed_rows"]
        self.num_rows = values["num_rows"]
        if self.whole:
            self.rows = {int(branch): RowState.from_state_dict(state) for branch, state in values["rows"].items()}
        return COLD_START if values["had_rows"] and not self.rows else None
