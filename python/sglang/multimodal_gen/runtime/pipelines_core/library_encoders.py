"""Text encoders of the transformers library, as several families use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import encoder_memory, padded_ids


class LanguageModelStates:
    """A causal language model as a text encoder: the states of one layer, one for each token.

    Tokens see those before them only, so that rows of unequal length need no mask: padding stands behind the text.
    """

    def __init__(self, text_encoder: Any, *, layer: int, dtype: torch.dtype) -> None:
        """`text_encoder` is a model of transformers, with or without a head; `layer` as in its `hidden_states`."""
        self.model = text_encoder.base_model
        self.layer = layer
        self.dtype = dtype
        self.device = compute_device(text_encoder)
        self.memory: TransformerMemory = encoder_memory(text_encoder.config, dtype.itemsize)

    def hidden_states(self, rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Ids without padding -> [l, D] for each, as many as it has ids."""
        input_ids = padded_ids(rows, max(map(len, rows)), 0, self.device)
        states = self.model(input_ids, output_hidden_states=True, use_cache=False).hidden_states[self.layer]
        # Copies: whoever keeps one row shall not keep them all.
        return [states[row, : len(ids)].to(self.dtype, copy=True) for row, ids in enumerate(rows)]
