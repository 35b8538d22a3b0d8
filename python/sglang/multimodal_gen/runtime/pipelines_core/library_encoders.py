"""Text encoders of the transformers library, as several families use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import key_mask, padded_ids


class PooledCLIP:
    """CLIP's text encoder where only its one vector counts. Source: arXiv:2103.00020."""

    def __init__(self, tokenizer: PromptTokenizer, text_encoder: Any) -> None:
        """`text_encoder` is transformers' CLIPTextModel."""
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.max_length: int = text_encoder.config.max_position_embeddings
        self.device = next(text_encoder.parameters()).device

    def ids(self, text: str) -> tuple[int, ...]:
        """The text's ids, cut and padded as the encoder was trained: always `max_length`."""
        ids = self.tokenizer(text, max_length=self.max_length).ids
        return ids + (self.tokenizer.pad_id,) * (self.max_length - len(ids))

    def pooled(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """[B, P]."""
        return self.text_encoder(torch.tensor(rows, device=self.device)).pooler_output


class T5Sequence:
    """T5's encoder: one hidden state for each token. Source: arXiv:1910.10683.

    With `masks=False` padding is attended to like text, and its states are embeddings like others.
    """

    def __init__(self, tokenizer: PromptTokenizer, text_encoder: Any, *, masks: bool) -> None:
        """`text_encoder` is transformers' T5EncoderModel."""
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.masks = masks
        self.device = next(text_encoder.parameters()).device

    def hidden_states(self, rows: Sequence[tuple[int, ...]], length: int) -> Tensor:
        """Ids without padding -> [B, length, D]; with `masks` the rows behind the text are what padding becomes."""
        input_ids = padded_ids(rows, length, self.tokenizer.pad_id, self.device)
        if not self.masks:
            return self.text_encoder(input_ids)[0]
        mask = key_mask([len(ids) for ids in rows], length, self.device)
        return self.text_encoder(input_ids, attention_mask=mask)[0]
