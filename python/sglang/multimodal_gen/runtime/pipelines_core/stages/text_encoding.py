"""Prompts to embeddings."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.errors import EmptyPrompt, InvalidValue
from sglang.multimodal_gen.runtime.pipelines_core.conditioning_cache import ConditioningCache
from sglang.multimodal_gen.runtime.pipelines_core.guidance import Guidance
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import PromptEncoder
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Prompt, Req, TextCondition
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage


class TextEncodingStage(Stage):
    """What prompt and negative prompt mean to the transformer; equal texts are encoded once.

    Tokens are counted at admission, so that a cut prompt is known before any work.
    """

    name: str = "text_encode"
    reads: ClassVar[tuple[str, ...]] = ("params", "inputs")
    writes: ClassVar[tuple[str, ...]] = ("prompt", "negative_prompt", "text", "negative_text")

    def __init__(self, encoder: PromptEncoder, *, guidance: Guidance, cache: ConditioningCache) -> None:
        self.encoder = encoder
        self.guidance = guidance
        self.cache = cache

    def admit(self, req: Req) -> None:
        """Raises EmptyPrompt, or InvalidValue for more text tokens than the model takes."""
        params = req.params
        params.require_prompt()
        if self._max_length(req) > self.encoder.max_sequence_length:
            raise InvalidValue(
                "max_sequence_length",
                params.max_sequence_length,
                f"at most {self.encoder.max_sequence_length} for this model",
            )
        if not self.encoder.clean(params.prompt).strip():
            raise EmptyPrompt
        req.prompt = self._prepare(req, "prompt", params.prompt, req.inputs)
        if self.guidance.uses_negative(params):
            text, inputs = params.negative_prompt or "", self.negative_inputs(req)
            req.negative_prompt = self._prepare(req, "negative prompt", text, inputs)

    def negative_inputs(self, req: Req) -> RequestInputs:
        """The pictures beside which the negative prompt is read."""
        return req.inputs

    def _max_length(self, req: Req) -> int:
        return req.params.max_sequence_length or self.encoder.max_sequence_length

    def _prepare(self, req: Req, what: str, text: str, inputs: RequestInputs) -> Prompt:
        prompt = self.encoder.prepare(text, max_length=self._max_length(req), inputs=inputs)
        if prompt.was_cut:
            req.notes.append(f"{what} cut to {len(prompt.ids)} of {prompt.num_tokens} tokens")
        return prompt

    def phase(self, req: Req) -> Phase:
        lengths = [len(prompt.ids) for prompt in _prompts(req)]
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(sum(lengths)),
            peak_bytes=(req.max_text_rows or len(lengths)) * self.encoder.row_bytes(max(lengths)),
        )

    def shrink(self, req: Req) -> bool:
        if req.max_text_rows == 1 or req.negative_prompt is None:
            return False
        req.max_text_rows = 1
        return True

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        groups: dict[Hashable, list[Req]] = {}
        for req in requests:
            groups.setdefault(self.adapters.text_key(req.adapters), []).append(req)
        for adapters, group in groups.items():
            with self.adapters.encoding(group[0].adapters):
                texts = self._encoded(group, adapters)
            for req in group:
                assert req.prompt is not None, "prepared at admission"
                req.text = texts[req.prompt]
                req.negative_text = None if req.negative_prompt is None else texts[req.negative_prompt]
        return []

    def _encoded(self, requests: Sequence[Req], adapters: Hashable) -> dict[Prompt, TextCondition]:
        """Each distinct prompt's condition under these adapters, from the cache or else from one forward."""
        wanted = dict.fromkeys(prompt for req in requests for prompt in _prompts(req))
        keys = {prompt: (self.name, prompt, adapters) for prompt in wanted}
        found = {prompt: text for prompt, key in keys.items() if (text := self.cache.get(key)) is not None}
        missing = [prompt for prompt in wanted if prompt not in found]
        rows = min((req.max_text_rows for req in requests if req.max_text_rows is not None), default=len(wanted))
        rows = 1 if self.deterministic else rows  # else the cache tells in which company a text was encoded first
        for start in range(0, len(missing), rows):
            group = missing[start : start + rows]
            found |= zip(group, self.encoder.encode(group), strict=True)
        for prompt in missing:
            self.cache.put(keys[prompt], found[prompt])
        return found


def _prompts(req: Req) -> tuple[Prompt, ...]:
    assert req.prompt is not None, "prepared at admission"
    return (req.prompt,) if req.negative_prompt is None else (req.prompt, req.negative_prompt)
