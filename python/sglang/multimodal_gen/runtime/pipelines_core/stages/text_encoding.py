"""Prompts to embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.errors import EmptyPrompt, InvalidValue
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer, TokenizedText
from sglang.multimodal_gen.runtime.pipelines_core.guidance import Guidance
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import Stage


class TextEncodingStage(Stage):
    """Embeddings [L, D] of prompt and negative prompt, L = max_sequence_length, zero after the text.

    Tokens are counted at admission, so that a cut prompt is known before any work. The encoder runs on the texts' own
    length only: padding that it would not see changes nothing but its time.
    """

    name: ClassVar[str] = "text_encode"
    reads: ClassVar[tuple[str, ...]] = ("params",)
    writes: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        tokenizer: TextTokenizer,
        text_encoder: nn.Module,
        *,
        clean: Callable[[str], str],
        guidance: Guidance,
        max_sequence_length: int,
        memory: TransformerMemory,
        dtype: torch.dtype,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.clean = clean
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length
        self.memory = memory
        self.dtype = dtype
        self.device = next(text_encoder.parameters()).device

    def admit(self, req: Req) -> None:
        """Raises EmptyPrompt, or InvalidValue for more text tokens than the model takes."""
        params = req.params
        params.require_prompt()
        if self._max_length(req) > self.max_sequence_length:
            raise InvalidValue(
                "max_sequence_length", params.max_sequence_length, f"at most {self.max_sequence_length} for this model"
            )
        prompt = self.clean(params.prompt)
        if not prompt:
            raise EmptyPrompt
        req.prompt_tokens = self._tokenise(req, "prompt", prompt)
        if self.guidance.uses_negative(params):
            negative = self.clean(params.negative_prompt or "")
            req.negative_prompt_tokens = self._tokenise(req, "negative prompt", negative)

    def _max_length(self, req: Req) -> int:
        return req.params.max_sequence_length or self.max_sequence_length

    def _tokenise(self, req: Req, what: str, text: str) -> TokenizedText:
        tokens = self.tokenizer(text, max_length=self._max_length(req))
        if tokens.was_cut:
            req.notes.append(f"{what} cut to {len(tokens.ids)} of {tokens.num_tokens} tokens")
        return tokens

    def phase(self, req: Req) -> Phase:
        lengths = [len(tokens.ids) for tokens in (req.prompt_tokens, req.negative_prompt_tokens) if tokens is not None]
        return Phase(
            name=self.name,
            lane="encode",
            units=1,
            batch_key=self.name,
            cost=float(sum(lengths)),
            peak_bytes=(req.max_text_rows or len(lengths)) * self.memory.row_bytes(max(lengths)),
        )

    def shrink(self, req: Req) -> bool:
        if req.max_text_rows == 1 or req.negative_prompt_tokens is None:
            return False
        req.max_text_rows = 1
        return True

    def step(self, requests: Sequence[Req]) -> list[OutputBatch]:
        wanted = {
            tokens.ids: None
            for req in requests
            for tokens in (req.prompt_tokens, req.negative_prompt_tokens)
            if tokens is not None
        }
        texts = list(wanted)
        rows = min((req.max_text_rows for req in requests if req.max_text_rows is not None), default=len(texts))
        hidden_states: dict[tuple[int, ...], Tensor] = {}
        for start in range(0, len(texts), rows):
            hidden_states |= self._encode(texts[start : start + rows])

        def embeds(req: Req, tokens: TokenizedText | None) -> Tensor | None:
            return None if tokens is None else _padded(hidden_states[tokens.ids], self._max_length(req))

        results = [(embeds(req, req.prompt_tokens), embeds(req, req.negative_prompt_tokens)) for req in requests]
        for req, (prompt_embeds, negative_prompt_embeds) in zip(requests, results, strict=True):
            req.prompt_embeds, req.negative_prompt_embeds = prompt_embeds, negative_prompt_embeds
        return []

    def _encode(self, texts: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Each text's hidden states [its length, D], from one forward."""
        # An empty text has one row that counts for nothing, because attention over no token is undefined.
        longest = max(1, *map(len, texts)) if len(texts) > 1 else max(1, len(texts[0]))
        input_ids = torch.tensor([ids + (0,) * (longest - len(ids)) for ids in texts], device=self.device)
        lengths = torch.tensor([max(1, len(ids)) for ids in texts], device=self.device)
        hidden_states = self.text_encoder(input_ids, lengths).to(self.dtype)
        return {ids: hidden_states[row, : len(ids)] for row, ids in enumerate(texts)}


def _padded(hidden_states: Tensor, length: int) -> Tensor:
    """[l, D] -> [length, D], zeros behind."""
    padded = hidden_states.new_zeros(length, hidden_states.shape[1])
    padded[: hidden_states.shape[0]] = hidden_states
    return padded
