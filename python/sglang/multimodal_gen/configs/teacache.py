"""What TeaCache was fitted to: data of published models. Source: arXiv:2411.19108, https://github.com/ali-vilab/TeaCache"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TeaCacheFit:
    """`coefficients`, of the highest power first, make of the relative change of a model's first signal how much its
    output changes, and `threshold` is up to which sum of that steps are skipped. `modulation_coefficients` do so for
    the second signal, what is made of the timestep for the blocks, of models that have one."""

    coefficients: tuple[float, ...]
    threshold: float
    modulation_coefficients: tuple[float, ...] | None = None
