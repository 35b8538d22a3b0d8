"""`Denoiser`: a family's transformer behind the one call that the denoising stage makes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.cost_model import STEPS_AHEAD
from sglang.multimodal_gen.runtime.cache.rules import CachedRow
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRunner
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device, has_its_weights
from sglang.multimodal_gen.runtime.layers.step_embedding import StepTable
from sglang.multimodal_gen.runtime.layers.uploads import uploaded
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.guidance import guidance_scale
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import EmbeddedSteps, EmbeddedText, Req, TextCondition

_FP32_BYTES = 4
_THOUSAND = 1000.0


class Row(NamedTuple):
    """One row of a forward: one guidance branch of one request, which stands at a step of its own."""

    req: Req
    text: TextCondition
    skipped_layers: tuple[int, ...] = ()
    cache: CachedRow | None = None

    @property
    def latents(self) -> Tensor:
        """[C, T, H, W] fp32."""
        assert self.req.latents is not None, "prepared before the first step"
        return self.req.latents

    @property
    def timestep(self) -> float:
        """What the sampler tells the network at this step."""
        assert self.req.sampler_state is not None, "prepared at admission"
        return self.req.sampler_state.timestep


class Denoiser:
    """What a family says of its transformer; a family overrides `predict`, and the rest where it differs.

    Rows of one call have equal `batch_key`s, and so equal latent shapes.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        geometry: VideoGeometry,
        memory: TransformerMemory,
        max_sequence_length: int,
        dtype: torch.dtype,
    ) -> None:
        self.transformer = transformer
        self.geometry = geometry
        self.memory = memory
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self.device = compute_device(transformer)
        self.block_runner: BlockRunner | None = getattr(transformer, "block_runner", None)

    def caching(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Forwards inside are of these rows and skip what the rows' caches say; a `predict` that divides its rows opens
        it anew for each part."""
        if self.block_runner is None:
            return contextlib.nullcontext()
        return self.block_runner.using([row.cache for row in rows])

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """The network's prediction [C, T, H, W] for each row, from one forward, as the sampler wants it."""
        raise NotImplementedError

    @property
    def step_table(self) -> StepTable | None:
        """Where the transformer's `embed_steps` puts what it makes of a step; None where forwards do that."""
        return getattr(self.transformer, "step_table", None)

    def may_embed_ahead(self, req: Req) -> bool:
        """Whether a request can bring what is made of texts and steps: neither with adapters, which belong to the rows
        of a forward, nor where blocks' weights come for their turn."""
        return not req.adapters and has_its_weights(self.transformer)

    def embedded(self, rows: Sequence[Row], *constant: float) -> Embedded:
        """What the transformer makes of the rows' texts and present steps, for its forward; behind the steps the same
        of each `constant` timestep, for all rows again. Nothing where a row's request does not bring it."""
        if not all(row.req.embeds_ahead for row in rows):
            return NOTHING
        text = stacked_texts([self._text_of(row) for row in rows])
        if self.step_table is None:
            return Embedded(text=text)
        found = [self._steps_of(row, constant) for row in rows]
        own = [steps.values[_step_index(row) - steps.first] for row, steps in zip(rows, found, strict=True)]
        others = [steps.values[place - len(constant)] for place in range(len(constant)) for steps in found]
        return Embedded(torch.stack([*own, *others]), text)

    def embed_text(self, row: Row) -> Tensor:
        """What the transformer makes of a row's text, [..., L, D]."""
        return self.transformer.embed_text(row.text.embeds.unsqueeze(0))[0]  # type: ignore[operator]

    def embed_steps(self, row: Row, timesteps: Sequence[float]) -> Tensor:
        """What the transformer makes of these timesteps of a row's request, [T, V]; of families with a `step_table`."""
        raise NotImplementedError

    def _text_of(self, row: Row) -> Tensor:
        kept = [text for text in row.req.embedded_texts if text.transformer is self.transformer]
        for text in kept:
            if text.embeds is row.text.embeds:
                return text.values
        text = EmbeddedText(self.transformer, row.text.embeds, self.embed_text(row))
        row.req.embedded_texts = [*kept, text]
        return text.values

    def _steps_of(self, row: Row, constant: tuple[float, ...]) -> EmbeddedSteps:
        """Those that the row's present step is among."""
        first = _step_index(row) // STEPS_AHEAD * STEPS_AHEAD
        kept = [steps for steps in row.req.embedded_steps if steps.first == first]
        for steps in kept:
            if steps.pooled is row.text.pooled:
                return steps
        assert row.req.sampler_state is not None, "prepared at admission"
        timesteps = row.req.sampler_state.schedule.timesteps[first : first + STEPS_AHEAD].tolist()
        steps = EmbeddedSteps(first, row.text.pooled, self.embed_steps(row, [*timesteps, *constant]))
        row.req.embedded_steps = [*kept, steps]
        return steps

    def batch_key(self, req: Req) -> str:
        """What must be equal, besides latent shape, kernels and dtype, for requests to share a forward."""
        return f"text{self.num_text_tokens(req)}"

    def num_text_tokens(self, req: Req) -> int:
        """Text tokens of one row."""
        return req.params.max_sequence_length or self.max_sequence_length

    def num_tokens(self, req: Req) -> int:
        """Image or video tokens of one row, those of pictures beside what is made included."""
        return self.output_tokens(req)

    def output_tokens(self, req: Req) -> int:
        """Tokens of what is made, on which a dynamic shift depends."""
        assert req.latent_shape is not None, "planned by the stages before"
        return self.geometry.num_tokens(req.latent_shape)

    def row_bytes(self, req: Req) -> int:
        """What one row needs while the forward runs."""
        return self.memory.row_bytes(self.num_tokens(req), self.num_text_tokens(req))

    def held_bytes(self, req: Req) -> int:
        """What one row's embeddings take between steps, with what is made of them ahead."""
        given = self.num_text_tokens(req) * self.memory.hidden_size * self.memory.element_size
        if not req.embeds_ahead:
            return given
        table_width = 0 if self.step_table is None else self.step_table.width
        return given + self.embedded_text_bytes(self.num_text_tokens(req)) + STEPS_AHEAD * table_width * _FP32_BYTES

    def embedded_text_bytes(self, num_tokens: int) -> int:
        """What `embed_text` makes of so many tokens."""
        width: int = self.transformer.text_width  # type: ignore[assignment]
        return num_tokens * width * self.dtype.itemsize

    def cached_bytes(self, req: Req) -> int:
        """What a step cache holds of one row for each tensor that it keeps."""
        return self.num_tokens(req) * self.memory.hidden_size * self.memory.element_size

    # For `predict`

    def stacked_latents(self, rows: Sequence[Row]) -> Tensor:
        """[B, C, T, H, W] in the transformer's dtype."""
        return torch.stack([row.latents.to(self.dtype) for row in rows])

    def timesteps(self, rows: Sequence[Row]) -> Tensor:
        """[B] fp32."""
        return self.numbers([row.timestep for row in rows])

    def numbers(self, values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        """One fp32 number for each row, or several, on the device: [B] or [B, N]."""
        return uploaded(values, self.device)

    @staticmethod
    def stacked_text(rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
        """Embeddings [B, L, D], zeros behind shorter ones, and how many of each row count."""
        return stacked_texts([row.text.embeds for row in rows]), [row.text.length for row in rows]

    @staticmethod
    def stacked_pooled(rows: Sequence[Row]) -> Tensor:
        """[B, P]."""
        return torch.stack([pooled for row in rows if (pooled := row.text.pooled) is not None])


class DistilledDenoiser(Denoiser):
    """Of a transformer that is told the pooled text and, where its config says so, the scale of guidance."""

    def embed_steps(self, row: Row, timesteps: Sequence[float]) -> Tensor:
        """See Denoiser."""
        assert row.text.pooled is not None, "of an encoder that gives one vector"
        count = len(timesteps)
        pooled, guidance = row.text.pooled.expand(count, -1), self.guidance([row] * count)
        return self.transformer.embed_steps(self.numbers(timesteps), pooled, guidance)  # type: ignore[operator]

    def guidance(self, rows: Sequence[Row]) -> Tensor | None:
        """Each row's scale times 1000, for models that are told it."""
        if not self.transformer.config.guidance_embeds:  # type: ignore[union-attr]
            return None
        return self.numbers([_THOUSAND * guidance_scale(row.req.params) for row in rows])


def stacked_texts(texts: Sequence[Tensor]) -> Tensor:
    """[..., L, D] with L of their own -> [B, ..., L, D], zeros behind shorter ones."""
    if len(texts) == 1:
        return texts[0].unsqueeze(0)
    longest = max(text.shape[-2] for text in texts)
    return torch.stack([nn.functional.pad(text, (0, 0, 0, longest - text.shape[-2])) for text in texts])


def _step_index(row: Row) -> int:
    assert row.req.sampler_state is not None, "prepared at admission"
    return row.req.sampler_state.step_index


def pack(latents: Tensor, patch_size: int = 2) -> Tensor:
    """Cells of p x p to one token: [B, C, T, H, W] -> [B, T·H/p·W/p, C·p·p], channels outermost in a token."""
    cells = latents.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))  # [B, C, T, h, p, w, p]
    return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4, 6).flatten(1, 3)


def unpack(tokens: Tensor, grid: tuple[int, int, int], patch_size: int = 2) -> Tensor:
    """Back from `pack`, for T x H/p x W/p = `grid` tokens: [B, S, C·p·p] -> [B, C, T, H, W]."""
    cells = tokens.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, grid)  # [B, T, h, w, C, p, p]
    return cells.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
