"""Text encoders of ours, as several families use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.models.encoders.clip_text import (
    CLIPReading,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import padded_ids


class PooledCLIP:
    """CLIP's text encoder where only its one vector counts. Source: arXiv:2103.00020."""

    def __init__(self, tokenizer: PromptTokenizer, text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.max_length = text_encoder.config.max_position_embeddings
        self.device = compute_device(text_encoder)

    def ids(self, text: str) -> tuple[int, ...]:
        """The text's ids, cut and padded as the encoder was trained: always `max_length`."""
        ids = self.tokenizer(text, max_length=self.max_length).ids
        return ids + (self.tokenizer.pad_id,) * (self.max_length - len(ids))

    def pooled(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """[B, P]."""
        return self.read(rows).pooled

    def read(self, rows: Sequence[tuple[int, ...]]) -> CLIPReading:
        """See CLIPReading."""
        found: CLIPReading = self.text_encoder(torch.tensor(rows, device=self.device))
        return found


class ProjectedCLIP(PooledCLIP):
    """CLIP's text encoder where its tokens' states count too; the vector is projected. Source: arXiv:2307.01952."""

    @property
    def most_skipped(self) -> int:
        """How many layers before the last one `states` can leave out."""
        return self.text_encoder.config.num_hidden_layers - 1

    def states(self, rows: Sequence[tuple[int, ...]], skipped: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The states before the last layer [B, L, D], and the vectors [B, P]. L is `max_length`.

        `skipped`: for each row how many layers earlier its states are taken; the vectors always pass all layers.
        """
        found = self.read(rows)
        states = [found.hidden_states[-2 - layers][row] for row, layers in enumerate(skipped)]
        return torch.stack(states), found.pooled


class T5Sequence:
    """T5's encoder: one hidden state for each token. Source: arXiv:1910.10683.

    With `masks=False` padding is attended to like text, and its states are embeddings like others.
    """

    def __init__(self, tokenizer: PromptTokenizer, text_encoder: T5EncoderModel, *, masks: bool) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.masks = masks
        self.device = compute_device(text_encoder)

    def hidden_states(self, rows: Sequence[tuple[int, ...]], length: int) -> Tensor:
        """Ids without padding -> [B, length, D]; with `masks` the rows behind the text are what padding becomes."""
        input_ids = padded_ids(rows, length, self.tokenizer.pad_id, self.device)
        lengths = torch.tensor([len(ids) for ids in rows]).to(self.device) if self.masks else None
        return self.text_encoder(input_ids, lengths)
