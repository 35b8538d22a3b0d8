"""Where a request's denoising steps lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from sglang.multimodal_gen.errors import InvalidValue, MissingParameter
from sglang.multimodal_gen.runtime.models.schedulers import Sampler, build_sampler, sampler_with_name
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage


class TimestepPreparationStage(Stage):
    """The request's sampler and its schedule: the checkpoint's own, or the one the request names.

    All of it happens at admission, on the CPU, so that a step count or shift the sampler cannot do is refused there.
    """

    name: ClassVar[str] = "timesteps"
    reads: ClassVar[tuple[str, ...]] = ("params",)
    writes: ClassVar[tuple[str, ...]] = ("sampler", "sampler_state")

    def __init__(
        self, scheduler_config: Mapping[str, Any], *, schedulers: Collection[str] = (), default: str | None = None
    ) -> None:
        """`schedulers`: the names that requests may choose, empty: all. `default`: the name of those that choose none.

        Raises: InvalidRequest when the checkpoint's own sampler or the default cannot be had.
        """
        self.scheduler_config = scheduler_config
        self.schedulers = schedulers
        self.own_sampler = build_sampler(scheduler_config)
        self._sampler(default)  # refused when the model is loaded rather than with each request

    def admit(self, req: Req) -> None:
        """Raises InvalidRequest for steps, a shift or a sampler that the checkpoint cannot be sampled with."""
        params = req.params
        if params.num_inference_steps is None:
            raise MissingParameter("num_inference_steps: missing", param="num_inference_steps")
        req.sampler = self._sampler(params.scheduler)
        req.sampler_state = req.sampler.begin(req.sampler.schedule(params.num_inference_steps, shift=params.flow_shift))

    def _sampler(self, name: str | None) -> Sampler:
        if name is None:
            return self.own_sampler
        if self.schedulers and name not in self.schedulers:
            raise InvalidValue("scheduler", name, f"one of {', '.join(self.schedulers)} for this model")
        return sampler_with_name(name, self.scheduler_config)
