"""How a family turns prompts into what its transformer is steered by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Prompt, TextCondition


class PromptEncoder(Protocol):
    """A family's text encoders with its rules: cleaning, template, length, padding, and which hidden states count.

    `max_sequence_length`: text tokens at most; requests may ask for fewer.
    """

    max_sequence_length: int

    def clean(self, text: str) -> str:
        """The text as it is tokenised, but for a template around it."""
        ...

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """The text as token ids, cut to `max_length`; cheap, and nothing on the device."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """Each prompt's embeddings, padded to its `max_length` where the family pads. Equal in any company."""
        ...

    def row_bytes(self, num_tokens: int) -> int:
        """What one text of this many tokens needs while it is encoded."""
        ...


class ZeroPaddedPrompts:
    """One encoder that sees the text alone; behind it the embeddings are zeros.

    The encoder runs on the texts' own length only: padding that it would not see changes nothing but its time.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        text_encoder: nn.Module,
        *,
        clean: Callable[[str], str],
        max_sequence_length: int,
        memory: TransformerMemory,
        dtype: torch.dtype,
    ) -> None:
        """`text_encoder(ids [B, L], lengths [B])` gives hidden states [B, L, D]."""
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self._clean = clean
        self.max_sequence_length = max_sequence_length
        self.memory = memory
        self.dtype = dtype
        self.device = compute_device(text_encoder)

    def clean(self, text: str) -> str:
        """See PromptEncoder."""
        return self._clean(text)

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder."""
        tokens = self.tokenizer(self.clean(text), max_length=max_length)
        return Prompt(ids=tokens.ids, num_tokens=tokens.num_tokens, max_length=max_length)

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; all texts in one forward."""
        # An empty text has one row that counts for nothing, because attention over no token is undefined.
        lengths = [max(1, len(prompt.ids)) for prompt in prompts]
        input_ids = padded_ids([prompt.ids for prompt in prompts], max(lengths), 0, self.device)
        hidden_states = self.text_encoder(input_ids, torch.tensor(lengths, device=self.device)).to(self.dtype)
        return [
            TextCondition(zero_padded(hidden_states[row, : len(prompt.ids)], prompt.max_length), len(prompt.ids))
            for row, prompt in enumerate(prompts)
        ]

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.memory.row_bytes(num_tokens)


def padded_ids(rows: Sequence[tuple[int, ...]], length: int, pad_id: int, device: torch.device) -> Tensor:
    """Token ids [B, length], filled up on the right."""
    return torch.tensor([ids + (pad_id,) * (length - len(ids)) for ids in rows], device=device)


def key_mask(lengths: Sequence[int], num_tokens: int, device: torch.device) -> Tensor:
    """[B, num_tokens] int64: 1 for the first `lengths[b]` tokens, 0 for padding, as transformers takes it."""
    return (torch.arange(num_tokens)[None, :] < torch.tensor(lengths)[:, None]).long().to(device)


def zero_padded(hidden_states: Tensor, length: int) -> Tensor:
    """[l, D] -> [length, D], zeros behind."""
    padded = hidden_states.new_zeros(length, hidden_states.shape[1])
    padded[: hidden_states.shape[0]] = hidden_states
    return padded


def encoder_memory(config: Any, element_size: int) -> TransformerMemory:
    """What a text encoder of transformers needs, from its config, whichever of the usual names it gives its widths."""
    text = getattr(config, "text_config", config)
    hidden_size = getattr(text, "hidden_size", None) or text.d_model
    ffn_dim = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", 4 * hidden_size)
    heads = getattr(text, "num_attention_heads", None) or text.num_heads
    return TransformerMemory(hidden_size=hidden_size, ffn_dim=ffn_dim, element_size=element_size, score_heads=heads)
