"""From noise to latents, one step of each request at a time."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.cache.choice import rule_for
from sglang.multimodal_gen.runtime.cache.rules import CachedRow
from sglang.multimodal_gen.runtime.cache.step_cache import StepCache
from sglang.multimodal_gen.runtime.distributed.collectives import all_gather, all_reduce
from sglang.multimodal_gen.runtime.layers.attention.switch import AttentionSwitch
from sglang.multimodal_gen.runtime.models.schedulers import SamplerState
from sglang.multimodal_gen.runtime.models.schedulers.multistep import clean_sample
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import Denoiser, Row
from sglang.multimodal_gen.runtime.pipelines_core.guidance import Guidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import USABLE_SHARE
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

# The present sample and, at the samplers' highest order, three earlier predictions and the last sample.
_HELD_LATENTS = 5
Constraint = Callable[[Req, Tensor], Tensor]


# Of a row with a cache, while its forward runs: the tokens in front of all blocks and where it was decided, and fp32
# copies for the comparison.
_CACHING_TENSORS = 6
_NEVER_SKIPS = "the step cache skips nothing: its settings leave no step that it could skip"


class _BranchRow(NamedTuple):
    """A row, and which guidance branch of its request it is."""

    branch: int
    row: Row


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
        self.takes_step_cache = denoiser.block_runner is not None

    def admit(self, req: Req) -> None:
        """Raises: AttentionNotAvailable for a kernel that cannot serve, InvalidRequest for guidance that cannot be."""
        self.attention.names(req.params)
        self.guidance.admit(req)
        self._admit_cache(req)
        rows = self.guidance.num_branches(req)
        if rows > 1 and rows * self.denoiser.row_bytes(req) > USABLE_SHARE * self.free_bytes():
            self._one_row_at_a_time(req)
        if not self.denoiser.may_embed_ahead(req):
            req.embeds_ahead = False

    def _admit_cache(self, req: Req) -> None:
        """Raises InvalidRequest for a step cache that this transformer cannot have."""
        runner, state = self.denoiser.block_runner, req.sampler_state
        if runner is None:
            return
        assert state is not None, "planned by the stages before"
        rule = rule_for(req.params, runner, fit=self.teacache, num_steps=state.num_steps)
        if rule is None:
            return
        # A model of several transformers has one cache, which moves on from stage to stage.
        req.step_cache = StepCache(rule=rule, whole=self.parallel.world.size == 1)
        if not rule.may_skip(state.num_steps) and _NEVER_SKIPS not in req.notes:
            req.notes.append(_NEVER_SKIPS)

    def shrink(self, req: Req) -> bool:
        kept, req.embeds_ahead = req.embeds_ahead, False
        req.forget_embedded()
        if self.guidance.num_branches(req) == 1 or req.max_forward_rows == 1:
            return kept
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
            peak_bytes=(req.max_forward_rows or rows) * (self.denoiser.row_bytes(req) + self._caching_bytes(req)),
            held_bytes=self._held_bytes(req),
        )

    def _held_bytes(self, req: Req) -> int:
        """Latents and sampler history in fp32, and the embeddings of each text."""
        assert req.latent_shape is not None, "planned by the stage before"
        latents = _HELD_LATENTS * math.prod(req.latent_shape) * torch.float32.itemsize
        num_texts = 2 if self.guidance.uses_negative(req.params) else 1
        cached = 0
        if req.step_cache is not None:
            tensors = self.guidance.num_branches(req) * req.step_cache.rule.held_tensors
            cached = tensors * self.denoiser.cached_bytes(req)
        return latents + num_texts * self.denoiser.held_bytes(req) + cached

    def _caching_bytes(self, req: Req) -> int:
        """What a row with a cache needs besides while the forward runs: new state beside the old one."""
        if req.step_cache is None:
            return 0
        return (_CACHING_TENSORS + req.step_cache.rule.held_tensors) * self.denoiser.cached_bytes(req)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        advanced: list[_Advanced] = []
        rows, predictions = self._predict(requests)
        skipped = self._skipped(rows)
        for req, own in zip(requests, predictions, strict=True):
            advanced.append(_advanced(req, self.guidance.combine(own, req)))
        for req, (latents, state, generator, clean) in zip(requests, advanced, strict=True):
            req.clean_latents = clean
            req.sampler_state, req.generator = state, generator
            req.latents = latents if self.constraint is None else self.constraint(req, latents)
            self._keep_cache(req, rows, skipped)
            if state.finished:
                req.forget_embedded()
        return []

    def predict(self, requests: Sequence[Req]) -> list[list[Tensor]]:
        """For each request the predictions [C, T, H, W] of its present step's branches; no request moves on."""
        return self._predict(requests)[1]

    def _predict(self, requests: Sequence[Req]) -> tuple[list[_BranchRow], list[list[Tensor]]]:
        """The rows of all requests in order, and the predictions of each request."""
        rows: list[_BranchRow] = []
        for req in requests:
            for number, branch in enumerate(self.guidance.branches(req)):
                rows.append(_BranchRow(number, Row(req, *branch, self._cached_row(req, number))))
        with self.attention.using(requests[0].params):
            predictions = iter(self._dealt(requests, rows))
        counts = [sum(row.row.req is req for row in rows) for req in requests]
        return rows, [[next(predictions) for _ in range(count)] for count in counts]

    def _dealt(self, requests: Sequence[Req], rows: Sequence[_BranchRow]) -> list[Tensor]:
        """The prediction of each row, in order; dealt along the cfg axis."""
        axis = self.parallel.cfg
        if axis.size == 1:
            return self._predict_rows(requests, [row.row for row in rows])
        places = _places(rows, axis.size)
        share = max(map(len, places))
        own_rows = [rows[index].row for index in places[axis.rank]]
        # A rank for which no row is left has something to give as well.
        own = self._predict_rows(requests, own_rows) if own_rows else [torch.zeros_like(rows[-1].row.latents)]
        own += own[-1:] * (share - len(own))
        gathered = all_gather(torch.stack(own).float(), axis, dim=0).unbind(0)
        found = {
            index: gathered[rank * share + place]
            for rank, held in enumerate(places)
            for place, index in enumerate(held)
        }
        return [found[index] for index in range(len(rows))]

    def _predict_rows(self, requests: Sequence[Req], rows: Sequence[Row]) -> list[Tensor]:
        limits = [req.max_forward_rows for req in requests if req.max_forward_rows is not None]
        rows_per_forward = min(limits, default=len(rows))
        predictions: list[Tensor] = []
        for start in range(0, len(rows), rows_per_forward):
            part = rows[start : start + rows_per_forward]
            adapters = [row.req.adapters for row in part]
            with self.denoiser.caching(part), self.adapters.using(self.denoiser.transformer, adapters):
                predictions.extend(self.denoiser.predict(part))
        return predictions

    def _cached_row(self, req: Req, branch: int) -> CachedRow | None:
        if req.step_cache is None:
            return None
        assert req.sampler_state is not None, "prepared at admission"
        return req.step_cache.row(self.name, branch, req.sampler_state.step_index - req.sampler_state.first_step)

    def _skipped(self, rows: Sequence[_BranchRow]) -> list[bool]:
        """Which of all rows left blocks out; each was run by one rank of the cfg axis."""
        axis = self.parallel.cfg
        skipped = [row.row.cache is not None and row.row.cache.skipped for row in rows]
        if axis.size == 1 or not any(row.row.cache is not None for row in rows):
            return skipped
        found = torch.tensor(skipped, dtype=torch.int32, device=self.denoiser.device)
        return [bool(value) for value in all_reduce(found, axis).tolist()]

    def _keep_cache(self, req: Req, rows: Sequence[_BranchRow], skipped: Sequence[bool]) -> None:
        if req.step_cache is None:
            return
        own = {row.branch: row.row.cache for row in rows if row.row.req is req and row.row.cache is not None}
        computed = [not left_out for row, left_out in zip(rows, skipped, strict=True) if row.row.req is req]
        req.step_cache.keep(self.name, own, computed=computed)
        assert req.sampler_state is not None, "prepared at admission"
        if req.sampler_state.finished:
            req.step_cache.forget()


def _places(rows: Sequence[_BranchRow], size: int) -> list[list[int]]:
    """Which rows, by their numbers, each rank of the cfg axis predicts.

    Rows with a cache have a rank of their own, whoever shares the step: there is what they remember. The others go to
    the ranks that have fewest; without caches they are dealt in equal runs.
    """
    if not any(row.row.cache is not None for row in rows):
        share = -(-len(rows) // size)
        return [list(range(len(rows)))[rank * share : (rank + 1) * share] for rank in range(size)]
    places: list[list[int]] = [[] for _ in range(size)]
    for index, (branch, row) in enumerate(rows):
        if row.cache is not None:
            places[(zlib.crc32(row.req.request_id.encode()) + branch) % size].append(index)
    for index, (_, row) in enumerate(rows):
        if row.cache is None:
            min(places, key=len).append(index)
    return places


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
