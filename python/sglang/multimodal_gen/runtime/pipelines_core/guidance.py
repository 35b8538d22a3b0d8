"""Guidance: which forwards a step needs, and how their predictions become one. The one home of every guidance rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req, TextCondition


class Branch(NamedTuple):
    """One forward of a step: the text that steers it, and the transformer's layers that it leaves out."""

    text: TextCondition
    skipped_layers: tuple[int, ...] = ()


class Guidance(Protocol):
    """A rule of guidance; per request, so that requests with different scales share a forward."""

    def admit(self, req: Req) -> None:
        """Check what the request says of guidance, once its steps are planned. Raises InvalidRequest."""
        ...

    def uses_negative(self, params: SamplingParams) -> bool:
        """Whether the negative prompt is used at any step, and so must be encoded."""
        ...

    def num_branches(self, req: Req) -> int:
        """Forwards of the step that needs most of them."""
        ...

    def branches(self, req: Req) -> tuple[Branch, ...]:
        """The forwards that the request's present step needs."""
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

    def admit(self, req: Req) -> None:
        """See Guidance: each value is checked as declared."""

    def uses_negative(self, params: SamplingParams) -> bool:
        return self.scale(params) > 1

    def num_branches(self, req: Req) -> int:
        return 2 if self.uses_negative(req.params) else 1

    def branches(self, req: Req) -> tuple[Branch, ...]:
        assert req.text is not None, "text is encoded before denoising"
        if not self.uses_negative(req.params) or not self.is_on(req):
            return (Branch(req.text),)
        assert req.negative_text is not None, "the negative prompt is encoded with the prompt"
        return Branch(req.text), Branch(req.negative_text)

    def is_on(self, req: Req) -> bool:
        """Whether the present step lies in the interval that is guided. Source: arXiv:2404.07724."""
        assert req.sampler_state is not None, "prepared at admission"
        step, num_steps = req.sampler_state.step_index, req.sampler_state.schedule.num_inference_steps
        start, end = req.params.cfg_interval_start, req.params.cfg_interval_end
        return (start or 0.0) * num_steps <= step < (1.0 if end is None else end) * num_steps

    def combine(self, predictions: Sequence[Tensor], req: Req) -> Tensor:
        exact = [prediction.float() for prediction in predictions]
        if len(exact) == 1:
            return exact[0]
        return rescaled(self.steered(exact, req), exact[0], req.params.guidance_rescale or 0.0)

    def steered(self, predictions: Sequence[Tensor], req: Req) -> Tensor:
        """Two predictions [C, T, H, W] or more, fp32, the conditional one first, as one."""
        return self.guided(predictions[0], predictions[1], self.scale(req.params))

    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The two predictions [C, T, H, W] as one."""
        return unconditional + scale * (conditional - unconditional)


class DistilledGuidance(ClassifierFreeGuidance):
    """The network itself is told `guidance_scale`; `true_cfg_scale` above 1 with a negative prompt guides on top."""

    def __init__(self) -> None:
        super().__init__(true_cfg_scale)

    def uses_negative(self, params: SamplingParams) -> bool:
        return super().uses_negative(params) and params.negative_prompt is not None


class SkipLayerGuidance(ClassifierFreeGuidance):
    """Steps also away from what the network predicts without some of its layers, in an interval of the guided steps.

    Such a step needs a third forward. Source: https://github.com/Stability-AI/sd3.5
    """

    def __init__(self, num_layers: int) -> None:
        """`num_layers`: those of the transformer."""
        super().__init__()
        self.num_layers = num_layers

    def admit(self, req: Req) -> None:
        """Raises InvalidValue for an empty interval, and for layers that the transformer lacks or that come twice."""
        params, layers = req.params, req.params.skip_guidance_layers
        start, stop = _interval_of_skipping(params)
        if start >= stop:
            raise InvalidValue(
                "skip_layer_guidance_start", start, f"less than skip_layer_guidance_stop, which is {stop}"
            )
        if layers is None:
            return
        if max(layers) >= self.num_layers:
            known = f"layers from 0 to {self.num_layers - 1} for this model"
            raise InvalidValue("skip_guidance_layers", list(layers), known)
        if len(set(layers)) < len(layers):
            raise InvalidValue("skip_guidance_layers", list(layers), "each layer once")
        if not params.skip_layer_guidance_scale:
            return
        if not self.uses_negative(params):
            req.notes.append("skip_guidance_layers changes nothing at a guidance_scale of 1 or less")
        elif not self._skips_at_all(req):
            between = f"strictly between {start:g} and {stop:g} of the way (skip_layer_guidance_start and _stop)"
            req.notes.append(f"skip_guidance_layers changes nothing: no step lies {between}")

    def num_branches(self, req: Req) -> int:
        return super().num_branches(req) + self._skips_at_all(req)

    def branches(self, req: Req) -> tuple[Branch, ...]:
        usual = super().branches(req)
        assert req.sampler_state is not None, "prepared at admission"
        if len(usual) == 1 or not self._skips_at(req, req.sampler_state.step_index):
            return usual
        assert req.params.skip_guidance_layers is not None, "else nothing is skipped"
        return (*usual, Branch(usual[0].text, req.params.skip_guidance_layers))

    def steered(self, predictions: Sequence[Tensor], req: Req) -> Tensor:
        conditional, unconditional, *without_layers = predictions
        guided = super().steered((conditional, unconditional), req)
        for skipped in without_layers:
            guided = guided + (conditional - skipped) * (req.params.skip_layer_guidance_scale or 0.0)
        return guided

    def _skips_at_all(self, req: Req) -> bool:
        assert req.sampler_state is not None, "planned by the stages before"
        steps = range(req.sampler_state.first_step, req.sampler_state.schedule.num_inference_steps)
        return self.uses_negative(req.params) and any(self._skips_at(req, step) for step in steps)

    def _skips_at(self, req: Req, step: int) -> bool:
        params = req.params
        if params.skip_guidance_layers is None or not params.skip_layer_guidance_scale:
            return False
        assert req.sampler_state is not None, "planned by the stages before"
        num_steps = req.sampler_state.schedule.num_inference_steps
        start, stop = _interval_of_skipping(params)
        return num_steps * start < step < num_steps * stop


def _interval_of_skipping(params: SamplingParams) -> tuple[float, float]:
    """As shares of the steps; all of them where neither the request nor the model says more."""
    start, stop = params.skip_layer_guidance_start, params.skip_layer_guidance_stop
    return start or 0.0, 1.0 if stop is None else stop


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
