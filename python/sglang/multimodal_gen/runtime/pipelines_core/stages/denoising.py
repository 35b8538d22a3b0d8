"""From noise to latents, one step of each request at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.distributed.collectives import all_gather
from sglang.multimodal_gen.runtime.layers.attention.switch import AttentionSwitch
from sglang.multimodal_gen.runtime.models.schedulers import SamplerState
from sglang.multimodal_gen.runtime.models.schedulers.multistep import clean_sample
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, Row
from sglang.multimodal_gen.runtime.pipelines_core.guidance import Branch, Guidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import USABLE_SHARE
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

# The present sample and, at the samplers' highest order, three earlier predictions and the last sample.
_HELD_LATENTS = 5
Constraint = Callable[[Req, Tensor], Tensor]


class _Advanced(NamedTuple):
    latents: Tensor
    state: SamplerState
    generator: torch.Generator | None
    clean: Tensor | None


class DenoisingStage(Stage):
    """Integrates the flow from noise to latents.

    Requests of one call may be at different steps and have different samplers, step counts, shifts, guidance scales,
    and one or more guidance branches: each branch of each request is a row of the transformer's batch.
    """

    name: str = "denoise"
    reads = ("latents", "text", "negative_text", "conditioning", "sampler_state")
    writes = ("latents", "sampler_state")

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        guidance: Guidance,
        free_bytes: Callable[[], int],
        steps: Callable[[Req], int] | None = None,
        constraint: Constraint | None = None,
        name: str = "denoise",
    ) -> None:
        """A model with several transformers has a stage for each, with names of their own.

        `steps`: how many of the request's steps, in their order, are this stage's; None for all of them. `constraint`
        gives the latents [C, T, H, W] after each step, once the sampler's state has moved on: what a family or a mask
        holds fast.
        """
        self.name = name
        self.denoiser = denoiser
        self.attention = AttentionSwitch(denoiser.transformer)
        self.guidance = guidance
        self.free_bytes = free_bytes
        self.steps = steps
        self.constraint = constraint

    def admit(self, req: Req) -> None:
        """Raises: AttentionNotAvailable for a kernel that cannot serve, InvalidRequest for guidance that cannot be."""
        self.attention.names(req.params)
        self.guidance.admit(req)
        rows = self.guidance.num_branches(req)
        if rows > 1 and rows * self.denoiser.row_bytes(req) > USABLE_SHARE * self.free_bytes():
            self._one_row_at_a_time(req)

    def shrink(self, req: Req) -> bool:
        if self.guidance.num_branches(req) == 1 or req.max_forward_rows == 1:
            return False
        self._one_row_at_a_time(req)
        return True

    @staticmethod
    def _one_row_at_a_time(req: Req) -> None:
        if req.max_forward_rows != 1:
            req.max_forward_rows = 1
            req.notes.append("guidance branches run one after the other to save memory")

    def phase(self, req: Req) -> Phase | None:
        assert req.latent_shape is not None and req.sampler_state is not None, "planned by the stages before"
        units = req.sampler_state.num_steps if self.steps is None else self.steps(req)
        if units == 0:
            return None
        rows = self.guidance.num_branches(req)
        shape, kernels = "x".join(map(str, req.latent_shape)), self.attention.names(req.params)
        return Phase(
            name=self.name,
            lane="denoise",
            units=units,
            batch_key=f"{self.name}:{shape}:{self.denoiser.batch_key(req)}:{self.denoiser.dtype}:{kernels}",
            cost=float(rows * self.denoiser.num_tokens(req)),
            peak_bytes=(req.max_forward_rows or rows) * self.denoiser.row_bytes(req),
            held_bytes=self._held_bytes(req),
        )

    def _held_bytes(self, req: Req) -> int:
        """Latents and sampler history in fp32, and the embeddings of each text."""
        assert req.latent_shape is not None, "planned by the stage before"
        latents = _HELD_LATENTS * math.prod(req.latent_shape) * torch.float32.itemsize
        num_texts = 2 if self.guidance.uses_negative(req.params) else 1
        return latents + num_texts * self.denoiser.held_bytes(req)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        advanced: list[_Advanced] = []
        for req, predictions in zip(requests, self.predict(requests), strict=True):
            advanced.append(_advanced(req, self.guidance.combine(predictions, req)))
        for req, (latents, state, generator, clean) in zip(requests, advanced, strict=True):
            req.clean_latents = clean
            req.sampler_state, req.generator = state, generator
            req.latents = latents if self.constraint is None else self.constraint(req, latents)
        return []

    def predict(self, requests: Sequence[Req]) -> list[list[Tensor]]:
        """For each request the predictions [C, T, H, W] of its present step's branches; no request moves on."""
        branches = [self.guidance.branches(req) for req in requests]
        with self.attention.using(requests[0].params):
            predictions = iter(self._dealt(requests, branches))
        return [[next(predictions) for _ in own] for own in branches]

    def _dealt(self, requests: Sequence[Req], branches: Sequence[tuple[Branch, ...]]) -> list[Tensor]:
        """The prediction of each branch of each request, in order; dealt along the cfg axis."""
        rows = [Row(req, *branch) for req, own in zip(requests, branches, strict=True) for branch in own]
        axis = self.parallel.cfg
        if axis.size == 1:
            return self._predict_rows(requests, rows)
        share = -(-len(rows) // axis.size)
        # A rank for which no row is left computes the last one once more: all of them have something to give.
        own_rows = rows[axis.rank * share : (axis.rank + 1) * share] or rows[-1:]
        own = self._predict_rows(requests, own_rows)
        own += own[-1:] * (share - len(own))
        return list(all_gather(torch.stack(own), axis, dim=0).unbind(0))[: len(rows)]

    def _predict_rows(self, requests: Sequence[Req], rows: Sequence[Row]) -> list[Tensor]:
        limits = [req.max_forward_rows for req in requests if req.max_forward_rows is not None]
        rows_per_forward = min(limits, default=len(rows))
        predictions: list[Tensor] = []
        for start in range(0, len(rows), rows_per_forward):
            part = rows[start : start + rows_per_forward]
            with self.adapters.using(self.denoiser.transformer, [row.req.adapters for row in part]):
                predictions.extend(self.denoiser.predict(part))
        return predictions


def _advanced(req: Req, noise_pred: Tensor) -> _Advanced:
    """The request after its present step; it stays as it is itself."""
    assert req.sampler is not None and req.latents is not None, "prepared before the first step"
    # Samplers replace tensors and never write into them, so a shallow copy leaves the request as it is.
    state, generator = copy.copy(req.sampler_state), req.generator
    assert state is not None, "prepared at admission"
    if req.sampler.draws_noise and generator is not None:
        generator = generator.clone_state()
    clean = clean_sample(noise_pred, req.latents, state) if req.keeps_clean else None
    return _Advanced(req.sampler.step(noise_pred, req.latents, state, generator=generator), state, generator, clean)
