"""Where a request's denoising steps lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from sglang.multimodal_gen.errors import InvalidValue, MissingParameter
from sglang.multimodal_gen.runtime.models.schedulers import Sampler, build_sampler, sampler_with_name
from sglang.multimodal_gen.runtime.models.schedulers.shifting import resolution_mu
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage


class TimestepPreparationStage(Stage):
    """The request's sampler and its schedule: the checkpoint's own, or the one the request names.

    All of it happens at admission, on the CPU, so that a step count or shift the sampler cannot do is refused there.
    """

    name: str = "timesteps"
    reads: ClassVar[tuple[str, ...]] = ("params",)
    writes: ClassVar[tuple[str, ...]] = ("sampler", "sampler_state")

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        *,
        schedulers: Collection[str] = (),
        default: str | None = None,
        spacing: Callable[[int], np.ndarray] | None = None,
        num_tokens: Callable[[Req], int] | None = None,
        rounds_strength_down: bool = False,
    ) -> None:
        """`schedulers`: the names that requests may choose, empty: all. `default`: the name of those that choose none.
        `spacing`: the noise levels before the shift, by the number of steps, for samplers that take them.
        `num_tokens`: the picture's or clip's tokens, on which a dynamic shift depends. `rounds_strength_down`: of the
        steps that a request's strength leaves, a fraction counts as none.

        Raises: InvalidRequest when the checkpoint's own sampler or the default cannot be had.
        """
        self.scheduler_config = scheduler_config
        self.schedulers = schedulers
        self.spacing = spacing
        self.num_tokens = num_tokens
        self.rounds_strength_down = rounds_strength_down
        self.own_sampler = build_sampler(scheduler_config)
        self._sampler(default)  # refused when the model is loaded rather than with each request

    def admit(self, req: Req) -> None:
        """Raises InvalidRequest for steps, a shift or a sampler that the checkpoint cannot be sampled with."""
        params = req.params
        if params.num_inference_steps is None:
            raise MissingParameter("num_inference_steps: missing", param="num_inference_steps")
        req.sampler = self._sampler(params.scheduler)
        schedule = req.sampler.schedule(
            params.num_inference_steps, shift=params.flow_shift, mu=self._mu(req), sigmas=self._sigmas(req)
        )
        req.sampler_state = req.sampler.begin(schedule, strength=req.strength, round_down=self.rounds_strength_down)

    def _mu(self, req: Req) -> float | None:
        if req.params.mu is not None:
            return req.params.mu  # samplers refuse it where the shift does not depend on one
        if self.num_tokens is None or not self.scheduler_config.get("use_dynamic_shifting", False):
            return None
        return resolution_mu(self.num_tokens(req), self.scheduler_config)

    def _sigmas(self, req: Req) -> Sequence[float] | None:
        assert req.sampler is not None and req.params.num_inference_steps is not None, "checked before"
        if self.spacing is None or not req.sampler.takes_sigmas:
            return None
        return self.spacing(req.params.num_inference_steps).tolist()

    def _sampler(self, name: str | None) -> Sampler:
        if name is None:
            return self.own_sampler
        if self.schedulers and name not in self.schedulers:
            raise InvalidValue("scheduler", name, f"one of {', '.join(self.schedulers)} for this model")
        return sampler_with_name(name, self.scheduler_config)
