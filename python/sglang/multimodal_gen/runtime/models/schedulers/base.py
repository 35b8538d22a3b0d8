"""What a sampler is: a stateless solver of the probability-flow ODE, and the state that each request holds.

Requests at different step indices, with different step counts and shifts, share one forward of the transformer; after
it every sample takes a step of its own. So a sampler is built once per checkpoint and everything that changes between
steps lives in a `SamplerState`.

Flow matching throughout: x_sigma = (1 - sigma) * x0 + sigma * noise, the network predicts noise - x0, sigma runs from
about 1 to 0.
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

StateDict = dict[str, Tensor | int | list[Tensor]]


@dataclass(frozen=True)
class Schedule:
    """Where the steps of one request lie; on the CPU, so that reading a value never waits for a device.

    `timesteps`: float32 [N], what the network is told. `sigmas`: float32 [N + 1], the noise levels, the last one 0.
    """

    timesteps: Tensor
    sigmas: Tensor

    @property
    def num_inference_steps(self) -> int:
        """N."""
        return self.timesteps.numel()


@dataclass
class SamplerState:
    """How far one request is. Its tensors are replaced, never written in place, so a shallow copy is a checkpoint."""

    schedule: Schedule
    step_index: int = 0
    order: int = 0
    """The order of the last step taken; 0 before the first."""
    history: list[Tensor] = field(default_factory=list)
    """Earlier predictions of the clean sample, newest last, fp32."""
    last_sample: Tensor | None = None
    """The sample from which the last prediction started, fp32; only predictor-corrector samplers keep it."""

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step_index >= self.schedule.num_inference_steps

    @property
    def timestep(self) -> float:
        """What the network is told at the next step."""
        return self.schedule.timesteps[self.step_index].item()

    def sigma(self, offset: int = 0) -> float:
        """The noise level `offset` steps after the present one."""
        assert self.step_index + offset >= 0, "a sampler looked back further than its first step"
        return self.schedule.sigmas[self.step_index + offset].item()

    def state_dict(self) -> StateDict:
        """Tensors, ints and lists of tensors only; `from_state_dict` continues from it with equal bits."""
        return {
            "timesteps": self.schedule.timesteps,
            "sigmas": self.schedule.sigmas,
            "step_index": self.step_index,
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
            order=values["order"],
            history=list(values["history"]),
            last_sample=values["last_sample"][0] if values["last_sample"] else None,
        )


class Sampler(ABC):
    """A way from noise to the clean sample in N network evaluations. Holds options only, so all requests share it."""

    short_name: ClassVar[str]
    takes_spacing: ClassVar[bool] = False
    """Whether pipelines hand it noise levels of their own; the other samplers always space the steps themselves."""

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
    def step(self, noise_pred: Tensor, latents: Tensor, state: SamplerState) -> Tensor:
        """The sample at the next noise level, fp32; advances `state` and leaves both inputs as they are.

        `noise_pred` and `latents` are one sample of any shape and floating dtype, such as [C, T, H, W].
        """

    def begin(self, schedule: Schedule) -> SamplerState:
        """The state before the first step."""
        return SamplerState(schedule)


def checked_schedule(timesteps: np.ndarray, sigmas: np.ndarray) -> Schedule:
    """[N] and [N + 1] in any float type -> a `Schedule`, unless its noise levels do not fall strictly to zero.

    Levels that coincide in fp32 (an extreme shift, more steps than the shift leaves room for) would make a solver
    divide by zero.
    """
    levels = sigmas.astype(np.float32)
    if not (np.isfinite(levels).all() and (np.diff(levels) < 0).all()):
        raise InvalidRequest(
            f"num_inference_steps: {len(timesteps)} steps with these shifts and sigmas give noise levels that do not "
            "fall strictly towards 0; use fewer steps, a smaller shift or strictly decreasing sigmas",
            param="num_inference_steps",
        )
    return Schedule(torch.from_numpy(timesteps.astype(np.float32)), torch.from_numpy(levels))


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
