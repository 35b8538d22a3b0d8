"""Guidance: which forwards a step needs, and how their predictions become one. The one home of every guidance rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req, TextCondition


class Guidance(Protocol):
    """A rule of guidance; per request, so that requests with different scales share a forward."""

    def uses_negative(self, params: SamplingParams) -> bool:
        """Whether the negative prompt is used at any step, and so must be encoded."""
        ...

    def branches(self, req: Req) -> tuple[TextCondition, ...]:
        """The text of each forward that the request's present step needs."""
        ...

    def combine(self, predictions: Sequence[Tensor], req: Req) -> Tensor:
        """The predictions [C, T, H, W] of those forwards, in order -> the one that the sampler gets, fp32."""
        ...


def guidance_scale(params: SamplingParams) -> float:
    """The scale as most models mean it."""
    return 1.0 if params.guidance_scale is None else params.guidance_scale


class ClassifierFreeGuidance:
    """Steps away from the unconditional prediction; off at a scale of 1 or less. Source: arXiv:2207.12598."""

    def __init__(self, scale: Callable[[SamplingParams], float] = guidance_scale) -> None:
        """`scale`: which parameter says how far."""
        self.scale = scale

    def uses_negative(self, params: SamplingParams) -> bool:
        return self.scale(params) > 1

    def branches(self, req: Req) -> tuple[TextCondition, ...]:
        assert req.text is not None, "text is encoded before denoising"
        if not self.uses_negative(req.params) or not self.is_on(req):
            return (req.text,)
        assert req.negative_text is not None, "the negative prompt is encoded with the prompt"
        return req.text, req.negative_text

    def is_on(self, req: Req) -> bool:
        """Whether the present step lies in the interval that is guided. Source: arXiv:2404.07724."""
        assert req.sampler_state is not None, "prepared at admission"
        step, num_steps = req.sampler_state.step_index, req.sampler_state.schedule.num_inference_steps
        start, end = req.params.cfg_interval_start, req.params.cfg_interval_end
        return (start or 0.0) * num_steps <= step < (1.0 if end is None else end) * num_steps

    def combine(self, predictions: Sequence[Tensor], req: Req) -> Tensor:
        conditional = predictions[0].float()
        if len(predictions) == 1:
            return conditional
        guided = self.guided(conditional, predictions[1].float(), self.scale(req.params))
        return rescaled(guided, conditional, req.params.guidance_rescale or 0.0)

    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The two predictions [C, T, H, W] as one."""
        return unconditional + scale * (conditional - unconditional)


class DistilledGuidance(ClassifierFreeGuidance):
    """The network itself is told `guidance_scale`; `true_cfg_scale` above 1 with a negative prompt guides on top."""

    def __init__(self) -> None:
        super().__init__(true_cfg_scale)

    def uses_negative(self, params: SamplingParams) -> bool:
        return super().uses_negative(params) and params.negative_prompt is not None


def true_cfg_scale(params: SamplingParams) -> float:
    """The scale of models for which `guidance_scale` means something else."""
    return 1.0 if params.true_cfg_scale is None else params.true_cfg_scale


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """`guided` with its standard deviation pulled towards the conditional one's. Source: arXiv:2305.08891."""
    if share == 0:
        return guided
    ratio = torch.std(conditional) / torch.std(guided)
    return guided * (share * ratio + (1 - share))


def renormed(guided: Tensor, conditional: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`guided` with the conditional prediction's length along `dim`. Source: https://github.com/QwenLM/Qwen-Image"""
    length = conditional.norm(dim=dim, keepdim=True)
    return guided * (length / guided.norm(dim=dim, keepdim=True))


def length_capped(guided: Tensor, conditional: Tensor, longest: float) -> Tensor:
    """`guided` no longer than `longest` times the conditional prediction. Source: https://github.com/Tongyi-MAI/Z-Image"""
    limit = longest * torch.linalg.vector_norm(conditional)
    return guided * (limit / torch.linalg.vector_norm(guided)).clamp(max=1)
