"""From noise to latents, one step of each request at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.runtime.layers.attention.switch import AttentionSwitch
from sglang.multimodal_gen.runtime.models.schedulers import SamplerState
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import Guidance, TextCondition
from sglang.multimodal_gen.runtime.pipelines_core.memory import USABLE_SHARE, TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage

# The present sample and, at the samplers' highest order, three earlier predictions and the last sample.
_HELD_LATENTS = 5


class DenoisingStage(Stage):
    """Integrates the flow from noise to latents.

    Requests of one call may be at different steps and have different samplers, step counts, shifts, guidance scales,
    and one or two guidance branches: each branch of each request is a row of the transformer's batch.
    """

    name: ClassVar[str] = "denoise"
    reads: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds", "sampler_state")
    writes: ClassVar[tuple[str, ...]] = ("latents", "sampler_state")

    def __init__(
        self,
        transformer: nn.Module,
        *,
        guidance: Guidance,
        geometry: VideoGeometry,
        max_sequence_length: int,
        memory: TransformerMemory,
        free_bytes: Callable[[], int],
        dtype: torch.dtype,
    ) -> None:
        self.transformer = transformer
        self.attention = AttentionSwitch(transformer)
        self.guidance = guidance
        self.geometry = geometry
        self.max_sequence_length = max_sequence_length
        self.memory = memory
        self.free_bytes = free_bytes
        self.dtype = dtype

    def admit(self, req: Req) -> None:
        """Raises: AttentionNotAvailable when the request asks for a kernel that cannot serve."""
        self.attention.names(req.params)
        rows = self._num_rows(req)
        if rows > 1 and rows * self._row_bytes(req) > USABLE_SHARE * self.free_bytes():
            self._one_row_at_a_time(req)

    def shrink(self, req: Req) -> bool:
        if self._num_rows(req) == 1 or req.max_forward_rows == 1:
            return False
        self._one_row_at_a_time(req)
        return True

    @staticmethod
    def _one_row_at_a_time(req: Req) -> None:
        req.max_forward_rows = 1
        req.notes.append("guidance branches run one after the other to save memory")

    def phase(self, req: Req) -> Phase:
        assert req.latent_shape is not None and req.sampler_state is not None, "planned by the stages before"
        rows = self._num_rows(req)
        num_text_tokens = req.params.max_sequence_length or self.max_sequence_length
        shape, kernels = "x".join(map(str, req.latent_shape)), self.attention.names(req.params)
        return Phase(
            name=self.name,
            lane="denoise",
            units=req.sampler_state.num_steps,
            batch_key=f"{self.name}:{shape}:text{num_text_tokens}:{self.dtype}:{kernels}",
            cost=float(rows * self.geometry.num_tokens(req.latent_shape)),
            peak_bytes=(req.max_forward_rows or rows) * self._row_bytes(req),
            held_bytes=self._held_bytes(req),
        )

    def _held_bytes(self, req: Req) -> int:
        """Latents and sampler history in fp32, and the embeddings of each branch."""
        assert req.latent_shape is not None, "planned by the stage before"
        latents = _HELD_LATENTS * math.prod(req.latent_shape) * torch.float32.itemsize
        num_text_tokens = req.params.max_sequence_length or self.max_sequence_length
        return latents + self._num_rows(req) * num_text_tokens * self.memory.hidden_size * self.memory.element_size

    def _num_rows(self, req: Req) -> int:
        return 2 if self.guidance.uses_negative(req.params) else 1

    def _row_bytes(self, req: Req) -> int:
        assert req.latent_shape is not None, "planned by the stage before"
        num_text_tokens = req.params.max_sequence_length or self.max_sequence_length
        return self.memory.row_bytes(self.geometry.num_tokens(req.latent_shape), num_text_tokens)

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        branches = [self.guidance.branches(req) for req in requests]
        with self.attention.using(requests[0].params):
            predictions = iter(self._predict(requests, branches))
        advanced: list[tuple[Tensor, SamplerState, torch.Generator | None]] = []
        for req, texts in zip(requests, branches, strict=True):
            noise_pred = self.guidance.combine([next(predictions) for _ in texts], req.params)
            assert req.sampler is not None and req.latents is not None, "prepared before the first step"
            # Samplers replace tensors and never write into them, so a shallow copy leaves the request as it is.
            state = copy.copy(req.sampler_state)
            assert state is not None, "prepared at admission"
            generator = req.generator
            if req.sampler.draws_noise and generator is not None:
                generator = generator.clone_state()
            latents = req.sampler.step(noise_pred, req.latents, state, generator=generator)
            advanced.append((latents, state, generator))
        for req, (latents, state, generator) in zip(requests, advanced, strict=True):
            req.latents, req.sampler_state, req.generator = latents, state, generator
        return []

    def _predict(self, requests: Sequence[Req], branches: Sequence[tuple[TextCondition, ...]]) -> list[Tensor]:
        """The velocity [C, T, H, W] of each branch of each request, in order."""
        latents: list[Tensor] = []
        timesteps: list[float] = []
        for req, texts in zip(requests, branches, strict=True):
            assert req.latents is not None and req.sampler_state is not None, "prepared before the first step"
            latents.extend([req.latents.to(self.dtype)] * len(texts))
            timesteps.extend([req.sampler_state.timestep] * len(texts))
        conditions = [text for group in branches for text in group]
        limits = [req.max_forward_rows for req in requests if req.max_forward_rows is not None]
        rows_per_forward = min(limits, default=len(latents))
        predictions: list[Tensor] = []
        for start in range(0, len(latents), rows_per_forward):
            rows = slice(start, start + rows_per_forward)
            batch = torch.stack(latents[rows])
            timestep = torch.tensor(timesteps[rows], dtype=torch.float32, device=batch.device)
            prompt_embeds = torch.stack([text.embeds for text in conditions[rows]])
            lengths = [text.length for text in conditions[rows]]
            predictions.extend(self.transformer(batch, timestep, prompt_embeds, text_lengths=lengths))
        return predictions
