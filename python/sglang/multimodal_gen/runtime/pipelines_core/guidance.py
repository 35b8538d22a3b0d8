"""Guidance: which forwards a step needs, and how their predictions become one. The one home of every guidance rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req


class TextCondition(NamedTuple):
    """Embeddings [L, D] of a text; the rows from `length` on are padding, all zeros."""

    embeds: Tensor
    length: int


class Guidance(Protocol):
    """A rule of guidance; per request, so that requests with different scales share a forward."""

    def uses_negative(self, params: SamplingParams) -> bool:
        """Whether the negative prompt is used, and so must be encoded."""
        ...

    def branches(self, req: Req) -> tuple[TextCondition, ...]:
        """The text of each forward that the request's step needs."""
        ...

    def combine(self, predictions: Sequence[Tensor], params: SamplingParams) -> Tensor:
        """The predictions [C, T, H, W] of those forwards, in order -> the one that the sampler gets, fp32."""
        ...


class ClassifierFreeGuidance:
    """Steps away from the unconditional prediction; off at a scale of 1 or less. Source: arXiv:2207.12598."""

    def uses_negative(self, params: SamplingParams) -> bool:
        return params.guidance_scale is not None and params.guidance_scale > 1

    def branches(self, req: Req) -> tuple[TextCondition, ...]:
        assert req.prompt_embeds is not None and req.prompt_tokens is not None, "text is encoded before denoising"
        conditional = TextCondition(req.prompt_embeds, len(req.prompt_tokens.ids))
        if not self.uses_negative(req.params):
            return (conditional,)
        embeds, tokens = req.negative_prompt_embeds, req.negative_prompt_tokens
        assert embeds is not None and tokens is not None, "the negative prompt is encoded with the prompt"
        return conditional, TextCondition(embeds, len(tokens.ids))

    def combine(self, predictions: Sequence[Tensor], params: SamplingParams) -> Tensor:
        conditional = predictions[0].float()
        if len(predictions) == 1:
            return conditional
        unconditional = predictions[1].float()
        assert params.guidance_scale is not None, "two branches mean a scale above 1"
        guided = unconditional + params.guidance_scale * (conditional - unconditional)
        return rescaled(guided, conditional, params.guidance_rescale or 0.0)


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """`guided` with its standard deviation pulled towards the conditional one's. Source: arXiv:2305.08891."""
    if share == 0:
        return guided
    ratio = torch.std(conditional) / torch.std(guided)
    return guided * (share * ratio + (1 - share))
