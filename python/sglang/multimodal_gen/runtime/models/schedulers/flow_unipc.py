"""UniPC with another schedule, as the authors of some video models publish it beside their checkpoints.

Source: https://github.com/Wan-Video/Wan2.1, `FlowUniPCMultistepScheduler`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np

from sglang.multimodal_gen.runtime.models.schedulers.base import Schedule, check_steps, checked_schedule
from sglang.multimodal_gen.runtime.models.schedulers.options import OptionRules, read_options
from sglang.multimodal_gen.runtime.models.schedulers.shifting import check_shift_request, shifted, static_shift
from sglang.multimodal_gen.runtime.models.schedulers.unipc import FIRST_SIGMA_MARGIN, UniPCOptions, UniPCSampler

NAME = "FlowUniPCMultistepScheduler"


@dataclass(frozen=True, kw_only=True)
class FlowUniPCOptions:
    """The options of `FlowUniPCMultistepScheduler` that are implemented, with its published defaults."""

    num_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    shift: float = 1.0
    use_dynamic_shifting: bool = False


class FlowUniPCSampler(UniPCSampler):
    """Levels start at the highest training level, which is shifted once already, and end at 0 before the shift."""

    rules: ClassVar[OptionRules] = OptionRules(
        required={},
        fixed={
            "prediction_type": "flow_prediction",
            "predict_x0": True,
            "thresholding": False,
            "solver_p": None,
            "final_sigmas_type": "zero",
            "time_shift_type": "exponential",
            "shift_terminal": None,
            "invert_sigmas": False,
        },
        inert=("timestep_spacing", "steps_offset", "dynamic_thresholding_ratio", "sample_max_value"),
    )
    shift_option: ClassVar[str] = "shift"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        options = asdict(read_options(config, options=FlowUniPCOptions, rules=cls.rules, sampler=NAME))
        return cls(UniPCOptions(flow_shift=options.pop("shift"), **options))

    def schedule(
        self,
        num_inference_steps: int,
        *,
        shift: float | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        options = self.options
        check_steps(num_inference_steps, sigmas, shift)
        check_shift_request(use_dynamic_shifting=options.use_dynamic_shifting, shift=shift, mu=mu)
        shift = options.flow_shift if shift is None else shift
        if sigmas is None:
            levels = np.linspace(self._highest_level(shift), 0, num_inference_steps + 1)[:-1]
        else:
            levels = np.asarray(sigmas, dtype=np.float64)
        levels = shifted(levels, shift=shift, mu=mu, time_shift_type="exponential", shift_terminal=None)
        if np.float32(levels[0]) == 1:
            levels[0] -= FIRST_SIGMA_MARGIN
        return checked_schedule(np.trunc(levels * options.num_train_timesteps), np.append(levels, 0))

    def _highest_level(self, shift: float) -> float:
        """In fp32, as the published class keeps its training levels."""
        level = np.array([1 - 1 / self.options.num_train_timesteps], dtype=np.float32)
        return float((level if self.options.use_dynamic_shifting else static_shift(level, shift))[0])
