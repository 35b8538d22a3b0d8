"""How HunyuanVideo reads prompts, alone or beside a picture. Source: https://github.com/Tencent/HunyuanVideo

Shapes: B batch, L tokens, D text encoder's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.errors import InvalidRequest, UnsupportedModel
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.loader.image_processor import ImageProcessor
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import encoder_memory, padded_ids
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Prompt, TextCondition
from sglang.multimodal_gen.runtime.pipelines_core.text_encoders import PooledCLIP

_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
TEXT_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    f"{_ASPECTS}<|start_header_id|>user<|end_header_id|>\n\n{{}}<|eot_id|>"
)
TEXT_CROP = 95
"""Tokens of the template before the prompt; their states are not kept."""
IMAGE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following aspects "
    f"according to the reference image: {_ASPECTS}\n\n<|start_header_id|>user<|end_header_id|>\n\n{{}}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
IMAGE_CROP = 103
IMAGE_POSITION = 5
"""Where the picture's token stands among the text's."""
IMAGE_TOKENS = 576
"""States of the picture, in place of its one token."""
NEGATIVE_INTERLEAVE = 2
"""Of a black picture's states every second is kept, whatever the model keeps of a given one."""
_END_OF_HEADER = "<|end_header_id|>"
_ASSISTANT_HEADER = 4
"""Tokens that end the prompt and name the assistant; their states are not kept."""
_KEPT_STATES = -3
"""Of the states after each layer, those two layers before the end."""


class HunyuanVideoPrompts:
    """The LLaMA's states of the prompt in a template, and CLIP's vector of it. See PromptEncoder."""

    template, crop = TEXT_TEMPLATE, TEXT_CROP

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        text_encoder: Any,
        clip: PooledCLIP,
        *,
        max_sequence_length: int,
        dtype: torch.dtype,
    ) -> None:
        """`text_encoder` is transformers' LlamaModel. Raises UnsupportedModel for a tokenizer of another model."""
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.clip = clip
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self.device = compute_device(text_encoder)
        self.memory = encoder_memory(text_encoder.config, dtype.itemsize)
        shortest = self._ids("", max_length=self.max_sequence_length)[0]
        if len(shortest) <= self.crop:
            raise UnsupportedModel(
                f"the checkpoint's tokenizer makes {len(shortest)} tokens of the template; "
                f"the model was trained with more than {self.crop}"
            )

    def clean(self, text: str) -> str:
        """See PromptEncoder: texts are taken as they are."""
        return text

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder."""
        ids, num_tokens = self._ids(text, max_length=max_length)
        return Prompt(ids=ids, num_tokens=num_tokens, pooled_ids=(self.clip.ids(text),), max_length=max_length)

    def _ids(self, text: str, *, max_length: int) -> tuple[tuple[int, ...], int]:
        tokens = self.tokenizer(self.template.format(text), max_length=self.crop + max_length)
        return tokens.ids, tokens.num_tokens

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; all texts in one forward."""
        pooled = self.clip.pooled([prompt.pooled_ids[0] for prompt in prompts]).to(self.dtype)
        states = self.hidden_states(prompts)
        conditions = []
        for row, prompt in enumerate(prompts):
            embeds = self.kept(states[row], prompt).to(self.dtype, copy=True)
            conditions.append(TextCondition(embeds, embeds.shape[0], pooled[row].clone()))
        return conditions

    def hidden_states(self, prompts: Sequence[Prompt]) -> Tensor:
        """[B, L, D]. The texts are filled up behind their end, which a causal model does not see."""
        rows = [prompt.ids for prompt in prompts]
        input_ids = padded_ids(rows, max(map(len, rows)), self.tokenizer.pad_id, self.device)
        return self.text_encoder(input_ids, output_hidden_states=True, use_cache=False).hidden_states[_KEPT_STATES]

    def kept(self, states: Tensor, prompt: Prompt) -> Tensor:
        """Of one text's states [L, D] those that steer the transformer."""
        return states[self.crop : len(prompt.ids)]

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.memory.row_bytes(num_tokens)


class HunyuanVideoImagePrompts(HunyuanVideoPrompts):
    """LLaVA's states of a picture and of the prompt that it reads after it. See PromptEncoder.

    Without a picture, as for the negative prompt, the model sees a black one.
    """

    template, crop = IMAGE_TEMPLATE, IMAGE_CROP

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        text_encoder: Any,
        clip: PooledCLIP,
        *,
        image_processor: ImageProcessor,
        interleave: int,
        max_sequence_length: int,
        dtype: torch.dtype,
    ) -> None:
        """`text_encoder` is transformers' LlavaModel; of the states of a given picture every
        `interleave`-th is kept. Raises UnsupportedModel for a tokenizer of another model.
        """
        self.image_processor = image_processor
        self.interleave = interleave
        self.image_token: int = text_encoder.config.image_token_index
        self.end_of_header = tokenizer.id_of(_END_OF_HEADER)
        super().__init__(tokenizer, text_encoder, clip, max_sequence_length=max_sequence_length, dtype=dtype)
        found = self._ids("", max_length=max_sequence_length)[0][IMAGE_POSITION]
        if found != self.image_token:
            raise UnsupportedModel(
                f"the checkpoint's tokenizer gives token {found} where the template has the picture; "
                f"text_encoder/config.json says image_token_index: {self.image_token}"
            )

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder. Raises InvalidRequest for a text that holds the picture's own token."""
        ids, num_tokens = self._ids(text, max_length=max_length)
        if ids.count(self.image_token) != 1:
            raise InvalidRequest(
                "prompt: it holds <image>, which stands for the picture; accepted are texts without", param="prompt"
            )
        return Prompt(
            ids=ids,
            num_tokens=num_tokens,
            pooled_ids=(self.clip.ids(text),),
            max_length=max_length,
            digest=inputs.digest() if inputs.images else "",
            images=inputs.images,
        )

    def hidden_states(self, prompts: Sequence[Prompt]) -> Tensor:
        """[B, L, D], the picture's states in place of its token."""
        rows = [_with_image_tokens(prompt.ids) for prompt in prompts]
        input_ids = padded_ids(rows, max(map(len, rows)), self.tokenizer.pad_id, self.device)
        pictures = [
            Image.fromarray(prompt.images[0]) if prompt.images else Image.new("RGB", (1, 1)) for prompt in prompts
        ]
        output = self.text_encoder(
            input_ids=input_ids,
            pixel_values=self.image_processor(pictures).to(self.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return output.hidden_states[_KEPT_STATES]

    def kept(self, states: Tensor, prompt: Prompt) -> Tensor:
        """The picture's states, thinned out, then the prompt's, without the assistant's header."""
        interleave = self.interleave if prompt.images else NEGATIVE_INTERLEAVE
        if prompt.options:
            [interleave] = prompt.options
        image = states[IMAGE_POSITION : IMAGE_POSITION + IMAGE_TOKENS : interleave]
        text = states[IMAGE_TOKENS - 1 :]  # so that a token is at its place in `ids`
        after = self._assistant_start(prompt)
        before = max(self.crop, after - _ASSISTANT_HEADER)
        return torch.cat((image, text[self.crop : before], text[after : len(prompt.ids)]))

    def _assistant_start(self, prompt: Prompt) -> int:
        """The first token after the last header."""
        headers = [place for place, token in enumerate(prompt.ids) if token == self.end_of_header]
        # A prompt that fills the whole length has pushed the assistant's header out; then its own end goes.
        last = headers[-1] if len(headers) != 2 else self.crop + prompt.max_length - 1
        return last + 1

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.memory.row_bytes(num_tokens + IMAGE_TOKENS - 1)


def _with_image_tokens(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The picture's one token as many times as it has states."""
    return ids[:IMAGE_POSITION] + ids[IMAGE_POSITION : IMAGE_POSITION + 1] * IMAGE_TOKENS + ids[IMAGE_POSITION + 1 :]
