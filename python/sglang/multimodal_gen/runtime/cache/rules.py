"""The rules by which steps are skipped: the first-block cache and TeaCache, each as one row at one step follows it.

Source: arXiv:2411.19108 (TeaCache), https://github.com/chengzeyi/ParaAttention (first-block cache),
https://github.com/vipshop/cache-dit (its settings), arXiv:2503.06923 (prediction)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sglang.multimodal_gen.configs.sample.cache_params import FirstBlockSettings
from sglang.multimodal_gen.runtime.cache.row_state import RowState, differences
from sglang.multimodal_gen.runtime.layers.block_runner import RowCache


class CachedRow(RowCache, Protocol):
    """A row at one step. `after` is what it will remember once the step stands; None while it has not been run."""

    after: RowState | None
    skipped: bool


class CacheRule(Protocol):
    """How one request's steps are skipped."""

    @property
    def held_tensors(self) -> int:
        """Tensors as large as the tokens' hidden states that a row keeps between steps."""
        ...

    def row(self, state: RowState | None, step: int) -> CachedRow:
        """A row at `step`, counted from the request's first one, with what it remembers."""
        ...

    def may_skip(self, num_steps: int) -> bool:
        """Whether any of so many steps could be skipped."""
        ...


@dataclass(frozen=True)
class FirstBlockRule:
    """Skip while what the first blocks add differs little from the last step that was computed."""

    settings: FirstBlockSettings

    @property
    def order(self) -> int:
        """Differences that the prediction uses."""
        return self.settings.taylorseer_order if self.settings.enable_taylorseer else 0

    @property
    def held_tensors(self) -> int:
        """See CacheRule: what the first blocks added, what the others did, and the differences of that."""
        return 2 + self.order

    def row(self, state: RowState | None, step: int) -> CachedRow:
        """See CacheRule."""
        return FirstBlockRow(self, state, step)

    def may_skip(self, num_steps: int) -> bool:
        """See CacheRule; the first step has nothing to take over."""
        s = self.settings
        limited = s.residual_diff_threshold == 0 or s.max_continuous_cached_steps == 0
        return not limited and num_steps > max(1, s.max_warmup_steps)


class FirstBlockRow:
    """See CachedRow."""

    signal = None

    def __init__(self, rule: FirstBlockRule, state: RowState | None, step: int) -> None:
        self.order, settings = rule.order, rule.settings
        self.first_blocks, self.last_blocks = settings.Fn_compute_blocks, settings.Bn_compute_blocks
        self.threshold = settings.residual_diff_threshold
        self.state, self.step = state, step
        self.after: RowState | None = None
        self.skipped = False
        most = settings.max_continuous_cached_steps
        self.must_compute = (
            state is None or state.num_steps < settings.max_warmup_steps or (most >= 0 and state.num_skipped >= most)
        )

    @property
    def before(self) -> Tensor | None:
        """See RowCache."""
        return None if self.must_compute or self.state is None else self.state.signal

    def decide(self, distance: float | None) -> bool:
        """See RowCache."""
        self.skipped = distance is not None and distance < self.threshold
        return self.skipped

    def predicted(self) -> Tensor:
        """See RowCache."""
        assert self.state is not None, "a row skips only after one that was computed"
        return self.state.predicted(self.step)

    def keep(self, signal: Tensor, residual: Tensor | None) -> None:
        """See RowCache; what is compared with stays that of the last computed step."""
        num_steps = 1 if self.state is None else self.state.num_steps + 1
        if residual is None:
            assert self.state is not None, "see `predicted`"
            signal, factors, computed_at = self.state.signal, self.state.factors, self.state.computed_at
            num_skipped = self.state.num_skipped + 1
        else:
            factors = differences(residual, self.state, step=self.step, order=self.order)
            computed_at, num_skipped = self.step, 0
        self.after = RowState(
            signal=signal, factors=factors, computed_at=computed_at, num_steps=num_steps, num_skipped=num_skipped
        )


@dataclass(frozen=True, kw_only=True)
class TeaCacheRule:
    """Skip until the signal's changes from step to step, through a polynomial, add up to the threshold; only steps from
    `start` on and before `end`. `signal` names what is watched."""

    threshold: float
    coefficients: tuple[float, ...]
    start: int
    end: int
    signal: str

    held_tensors: int = 2

    def row(self, state: RowState | None, step: int) -> CachedRow:
        """See CacheRule."""
        return TeaCacheRow(self, state, step)

    def may_skip(self, num_steps: int) -> bool:
        """See CacheRule."""
        return self.threshold > 0 and max(1, self.start) < min(self.end, num_steps)


class TeaCacheRow:
    """See CachedRow."""

    first_blocks = last_blocks = 0

    def __init__(self, rule: TeaCacheRule, state: RowState | None, step: int) -> None:
        self.rule, self.state, self.step = rule, state, step
        self.signal = rule.signal
        self.after: RowState | None = None
        self.skipped = False
        self.accumulated = 0.0

    @property
    def before(self) -> Tensor | None:
        """See RowCache."""
        inside = self.rule.start <= self.step < self.rule.end
        return self.state.signal if inside and self.state is not None else None

    def decide(self, distance: float | None) -> bool:
        """See RowCache."""
        if distance is None or self.state is None:
            return False
        self.accumulated = self.state.accumulated + polynomial(self.rule.coefficients, distance)
        # A polynomial may fall below zero where nothing was fitted, which must not make a threshold of 0 skip.
        self.skipped = self.rule.threshold > 0 and self.accumulated < self.rule.threshold
        return self.skipped

    def predicted(self) -> Tensor:
        """See RowCache."""
        assert self.state is not None, "a row skips only after one that was computed"
        return self.state.factors[0]

    def keep(self, signal: Tensor, residual: Tensor | None) -> None:
        """See RowCache; what is compared with is the step before, computed or not."""
        num_steps = 1 if self.state is None else self.state.num_steps + 1
        if residual is None:
            assert self.state is not None, "see `predicted`"
            self.after = RowState(
                signal=signal,
                factors=self.state.factors,
                computed_at=self.state.computed_at,
                num_steps=num_steps,
                num_skipped=self.state.num_skipped + 1,
                accumulated=self.accumulated,
            )
        else:
            self.after = RowState(signal=signal, factors=(residual,), computed_at=self.step, num_steps=num_steps)


def polynomial(coefficients: Sequence[float], value: float) -> float:
    """The coefficient of the highest power first."""
    total = 0.0
    for coefficient in coefficients:
        total = total * value + coefficient
    return total
