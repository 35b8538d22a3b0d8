"""What a sampler is: a stateless solver of the flow's ODE or SDE, and the state that each request holds.

Requests at different step indices, with different step counts and shifts, share one forward of the transformer; after
it every sample takes a step of its own. So a sampler is built once per checkpoint and everything that changes between
steps lives in a `SamplerState`.

Flow matching throughout: x_sigma = (1 - sigma) * x0 + sigma * noise, the network predicts noise - x0, sigma runs from
about 1 to 0. Inverted schedules count the other way: x_sigma = (1 - sigma) * noise + sigma * x0, the network predicts
x0 - noise, sigma runs from about 0 to 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sglang.multimodal_gen.errors import InvalidRequest, InvalidValue
from sglang.multimodal_gen.runtime.layers.uploads import sent
from sglang.multimodal_gen.runtime.models.schedulers.options import OptionRules

StateDict = dict[str, Tensor | int | list[Tensor]]


@dataclass(frozen=True)
class Schedule:
    """Where the steps of one request lie; on the CPU, so that reading a value never waits for a device.

    `timesteps`: float32 [N], what the network is told. `sigmas`: float32 [N + 1], the noise levels, the last one 0; 1
    if the schedule is inverted.
    """

    timesteps: Tensor
    sigmas: Tensor

    @property
    def num_inference_steps(self) -> int:
        """N."""
        return self.timesteps.numel()

    @property
    def is_inverted(self) -> bool:
        """Whether sigma is the share of the clean sample."""
        return bool(self.sigmas[-1] == 1)


@dataclass
class SamplerState:
    """How far one request is. Its tensors are replaced, never written in place, so a shallow copy is a checkpoint."""

    schedule: Schedule
    step_index: int = 0
    """The next step, counted from the start of the whole schedule."""
    first_step: int = 0
    """The step that was begun with; above 0 when the request starts from something other than pure noise."""
    order: int = 0
    """The order of the last step taken; 0 before the first."""
    history: list[Tensor] = field(default_factory=list)
    """Earlier predictions of the clean sample, newest last, fp32."""
    last_sample: Tensor | None = None
    """The sample from which the last prediction started, fp32; only predictor-corrector samplers keep it."""

    @property
    def num_steps(self) -> int:
        """Steps to be taken in all."""
        return self.schedule.num_inference_steps - self.first_step

    @property
    def finished(self) -> bool:
        """Whether all of them are taken."""
        return self.step_index >= self.schedule.num_inference_steps

    @property
    def timestep(self) -> float:
        """What the network is told at the next step."""
        return self.schedule.timesteps[self.step_index].item()

    def sigma(self, offset: int = 0) -> float:
        """The noise level `offset` steps after the present one."""
        assert self.step_index + offset >= 0, "a sampler looked back further than its first step"
        return self.schedule.sigmas[self.step_index + offset].item()

    @property
    def noise_level(self) -> float:
        """The share of noise in the present sample."""
        return 1 - self.sigma() if self.schedule.is_inverted else self.sigma()

    def state_dict(self) -> StateDict:
        """Tensors, ints and lists of tensors only; `from_state_dict` continues from it with equal bits."""
        return {
            "timesteps": self.schedule.timesteps,
            "sigmas": self.schedule.sigmas,
            "step_index": self.step_index,
            "first_step": self.first_step,
            "order": self.order,
            "history": list(self.history),
            "last_sample": [] if self.last_sample is None else [self.last_sample],
        }

    @classmethod
    def from_state_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `state_dict`; tensors stay on the device where they are given."""
        return cls(
            schedule=Schedule(values["timesteps"].cpu(), values["sigmas"].cpu()),
            step_index=values["step_index"],
            first_step=values["first_step"],
            order=values["order"],
            history=list(values["history"]),
            last_sample=values["last_sample"][0] if values["last_sample"] else None,
        )


class Sampler(ABC):
    """A way from noise to the clean sample in N network evaluations. Holds options only, so all requests share it."""

    rules: ClassVar[OptionRules]
    shift_option: ClassVar[str] = "shift"
    """What this class's `scheduler_config.json` calls the timestep shift."""
    takes_sigmas: ClassVar[bool] = True
    """Whether a pipeline that has noise levels of its own hands them to `schedule`, or leaves the spacing to it."""

    @property
    def draws_noise(self) -> bool:
        """Whether `step` needs the request's generator."""
        return False

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Built from the content of `scheduler_config.json`.

        Raises: InvalidRequest for an option that is unknown or whose value is not implemented.
        """

    @abstractmethod
    def schedule(
        self,
        num_inference_steps: int,
        *,
        shift: float | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        """The steps of one request.

        Args:
            shift: replaces the checkpoint's timestep shift, as if its config had this value.
            mu: the resolution-dependent shift; required if and only if the config says `use_dynamic_shifting`.
            sigmas: N noise levels before shifting, decreasing from at most 1; default: evenly spaced.

        Raises: InvalidRequest for values that the sampler cannot honour.
        """

    @abstractmethod
    def step(
        self, noise_pred: Tensor, latents: Tensor, state: SamplerState, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The sample at the next noise level, fp32; advances `state` and leaves both inputs as they are.

        `noise_pred` and `latents` are one sample of any shape and floating dtype, such as [C, T, H, W]. `generator`,
        on the CPU, moves on with each step of a sampler that `draws_noise`, and only then.
        """

    def begin(self, schedule: Schedule, *, strength: float = 1.0, round_down: bool = False) -> SamplerState:
        """The state before the first step; a `strength` below 1 leaves out that share of the steps at the start.

        A fraction of a step counts as a step, with `round_down` as none: pipelines differ in this.

        Raises: InvalidRequest for a strength out of range, or one that leaves no step.
        """
        if not 0 <= strength <= 1:
            raise InvalidValue("strength", strength, "a number from 0 to 1")
        num_inference_steps = schedule.num_inference_steps
        wanted = min(num_inference_steps * strength, num_inference_steps)
        first_step = int(num_inference_steps - (int(wanted) if round_down else wanted))
        if first_step == num_inference_steps:
            raise InvalidRequest(
                f"strength: {strength} of num_inference_steps {num_inference_steps} leaves no step to take, accepted "
                "is a higher strength or more steps",
                param="strength",
            )
        return SamplerState(schedule, step_index=first_step, first_step=first_step)

    def add_noise(self, clean: Tensor, noise: Tensor, state: SamplerState) -> Tensor:
        """The sample that `clean` and `noise` make at the state's present noise level, fp32; all of one shape.

        After the last step that is `clean` itself.
        """
        level = state.noise_level
        return level * noise.float() + (1 - level) * clean.float()


def checked_schedule(timesteps: np.ndarray, sigmas: np.ndarray, *, holds_last: bool = False) -> Schedule:
    """[N] and [N + 1] in any float type -> a `Schedule`, unless its noise levels do not move strictly to the end.

    Levels that coincide in fp32 (an extreme shift, more steps than the shift leaves room for) would make a solver
    divide by zero. With `holds_last` the last two may be equal.
    """
    levels = sigmas.astype(np.float32)
    schedule = Schedule(torch.from_numpy(timesteps.astype(np.float32)), torch.from_numpy(levels))
    moves = np.diff(levels[:-1] if holds_last else levels)
    if not (np.isfinite(levels).all() and ((moves > 0) if schedule.is_inverted else (moves < 0)).all()):
        raise InvalidRequest(
            f"num_inference_steps: {len(timesteps)} steps with these shifts and sigmas give noise levels that do not "
            "fall strictly towards 0; use fewer steps, a smaller shift or strictly decreasing sigmas",
            param="num_inference_steps",
        )
    return schedule


def check_steps(num_inference_steps: int, sigmas: Sequence[float] | None, shift: float | None) -> None:
    """Raises InvalidRequest for a step count, sigmas or a shift out of range."""
    if num_inference_steps < 1:
        raise InvalidValue("num_inference_steps", num_inference_steps, "an integer of at least 1")
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise InvalidValue("flow_shift", shift, "a finite number above 0")
    if sigmas is None:
        return
    if len(sigmas) != num_inference_steps:
        raise InvalidValue("sigmas", f"{len(sigmas)} values", f"one per step, {num_inference_steps} values")
    if not all(0 < sigma <= 1 for sigma in sigmas):
        raise InvalidValue("sigmas", list(sigmas), "numbers above 0 and at most 1")


def weighted_sum(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Sum of weight * tensor in fp32, as a new tensor."""
    weight, tensor = terms[0]
    total = tensor.float() * weight
    for weight, tensor in terms[1:]:
        total.add_(tensor, alpha=weight)
    return total


def drawn_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of the shape of `like`, fp32, on its device.

    Drawn where the generator is and with a batch axis, as a pipeline of one sample would.
    """
    assert generator is not None, "a sampler that draws noise was given no generator"
    noise = torch.randn((1, *like.shape), generator=generator, device=generator.device, dtype=torch.float32)[0]
    return sent(noise, like.device)
