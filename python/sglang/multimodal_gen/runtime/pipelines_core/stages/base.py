"""What a stage is: a part of the pipeline that the scheduler can drive unit by unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.teacache import TeaCacheFit
from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE, ParallelContext
from sglang.multimodal_gen.runtime.pipelines_core.adapters import Adapters
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req


class Stage:
    """One part of a pipeline. Stages hold no state of requests, so any number of requests go through at once.

    A request passes `admit` of all stages in order when it arrives, then unit after unit of each phase. A stage without
    a phase does its work in `begin`, right before the first unit of the next phase.
    """

    name: str
    """Also the name of the stage's phase."""
    parallel: ParallelContext = SINGLE
    """The replica's ranks, said by the pipeline."""
    teacache: TeaCacheFit | None = None
    """What is published of the model's changes from step to step, likewise."""
    takes_step_cache: bool = False
    """Whether its steps can be skipped."""
    adapters: Adapters = Adapters({})
    """What requests may have beside the weights; said by the pipeline as well."""
    deterministic: bool = False
    """Whether nothing that a request gets may tell which others there are or were, not by the last bit; likewise."""
    only_leader: bool = False
    """Whether one rank runs the steps and the others wait for nothing."""
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    """Fields of Req."""

    def admit(self, req: Req) -> None:
        """Check the request's parameters and plan; cheap, and nothing on the device.

        Raises: InvalidRequest for what this checkpoint or machine cannot do.
        """

    def phase(self, req: Req) -> Phase | None:
        """The units of work this stage has for the request, planned in `admit`; None for none."""
        return None

    def begin(self, req: Req) -> None:
        """Prepare the request's first unit. May run again when that unit fails, with the same result."""

    def shrink(self, req: Req) -> bool:
        """Memory ran out for this request alone: plan the units that are left with less. False when there is no less.

        What is done stays done. The request's notes say what the user should know.
        """
        return False

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        """One unit for each request; all share a batch key. Either all requests move on or, on an exception, none."""
        raise NotImplementedError(f"{type(self).__name__} has a phase but no step")
