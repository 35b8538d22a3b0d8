"""Qwen-Image's prompts: Qwen2.5-VL's hidden states of a chat that asks for an image. Source: arXiv:2508.02324."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sglang.multimodal_gen.configs.model_info import SizeFromImage
from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.pipelines_core.memory import TransformerMemory
from sglang.multimodal_gen.runtime.pipelines_core.pictures import resized
from sglang.multimodal_gen.runtime.pipelines_core.prompt_encoding import encoder_memory, key_mask, padded_ids
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Prompt, TextCondition

PICTURE_TOKEN = "<|image_pad|>"
"""Stands once for each of a picture's features."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The chat that a prompt is put into. The states of its first `num_dropped` tokens do not count."""

    instruction: str
    num_dropped: int

    def __call__(self, text: str) -> str:
        return (
            f"<|im_start|>system\n{self.instruction}<|im_end|>\n"
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )


TEXT_TO_IMAGE = ChatTemplate(
    instruction="Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
    num_dropped=34,
)
EDITING = ChatTemplate(
    instruction="Describe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.",
    num_dropped=64,
)


class QwenPrompts:
    """Prompts without pictures. See PromptEncoder."""

    def __init__(
        self, tokenizer: PromptTokenizer, text_encoder: Any, *, max_sequence_length: int, dtype: torch.dtype
    ) -> None:
        """`text_encoder` is transformers' Qwen2_5_VLTextModel."""
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self.device = compute_device(text_encoder)
        self.memory = encoder_memory(text_encoder.config, dtype.itemsize)

    def clean(self, text: str) -> str:
        """See PromptEncoder."""
        return text

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder. `max_length` counts the tokens behind the dropped ones."""
        # No token sees the ones behind it, so that those beyond the length need not be encoded.
        tokens = self.tokenizer(TEXT_TO_IMAGE(text), max_length=TEXT_TO_IMAGE.num_dropped + max_length)
        return Prompt(ids=tokens.ids, num_tokens=tokens.num_tokens)

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; all texts in one forward."""
        lengths = [len(prompt.ids) for prompt in prompts]
        states = self.text_encoder(
            input_ids=padded_ids([prompt.ids for prompt in prompts], max(lengths), self.tokenizer.pad_id, self.device),
            attention_mask=key_mask(lengths, max(lengths), self.device),
            use_cache=False,
        ).last_hidden_state
        return [
            counted(states[row, :length], TEXT_TO_IMAGE.num_dropped, self.dtype) for row, length in enumerate(lengths)
        ]

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        return self.memory.row_bytes(num_tokens)


class QwenPicturePrompts(QwenPrompts):
    """Prompts that show pictures before the text. See PromptEncoder.

    `label` comes before each picture, with its number; `shown` is the size in which it is shown. With
    `spatial_positions` a picture's tokens have rows and columns.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        text_encoder: Any,
        processor: Any,
        *,
        label: str,
        shown: SizeFromImage,
        max_sequence_length: int,
        dtype: torch.dtype,
        spatial_positions: bool,
    ) -> None:
        """`text_encoder` is transformers' Qwen2_5_VLModel, `processor` its image processor."""
        super().__init__(tokenizer, text_encoder, max_sequence_length=max_sequence_length, dtype=dtype)
        self.processor = processor
        self.label = label
        self.shown = shown
        self.spatial_positions = spatial_positions
        vision = text_encoder.config.vision_config
        self.vision_memory = TransformerMemory(
            hidden_size=vision.hidden_size, ffn_dim=vision.intermediate_size, element_size=dtype.itemsize
        )
        self.patches_per_token: int = vision.spatial_merge_size**2

    def prepare(self, text: str, *, max_length: int, inputs: RequestInputs) -> Prompt:
        """See PromptEncoder. `max_length` counts neither the dropped tokens nor the pictures'.

        Raises: InvalidValue for a text with the token that stands for pictures, of which there are no more, and for a
            length at which pictures would be cut.
        """
        if PICTURE_TOKEN in text:
            raise InvalidValue("prompt", PICTURE_TOKEN, "a text without the token that stands for pictures")
        counts = [self._num_tokens(image) for image in inputs.images]
        pictures = "".join(
            f"{self.label.format(index)}<|vision_start|>{PICTURE_TOKEN * count}<|vision_end|>"
            for index, count in enumerate(counts, start=1)
        )
        uncounted = EDITING.num_dropped + sum(counts)
        tokens = self.tokenizer(EDITING(pictures + text), max_length=uncounted + max_length)
        picture_id = self.text_encoder.config.image_token_id
        if tokens.ids.count(picture_id) < sum(counts):
            whole = self.tokenizer(EDITING(pictures + text), max_length=tokens.num_tokens).ids
            behind = len(whole) - whole[::-1].index(picture_id)
            raise InvalidValue("max_sequence_length", max_length, f"at least {behind - uncounted} with such pictures")
        return Prompt(ids=tokens.ids, num_tokens=tokens.num_tokens, digest=inputs.digest(), images=inputs.images)

    def _num_tokens(self, image: np.ndarray) -> int:
        """Tokens that a picture [H, W, 3] becomes."""
        width, height = size_of(image, self.shown)
        return self.processor.get_number_of_image_patches(height, width, {}) // self.patches_per_token

    def encode(self, prompts: Sequence[Prompt]) -> list[TextCondition]:
        """See PromptEncoder; the pictures that prompts have in common are looked at once."""
        pictures: dict[str, tuple[Any, Tensor]] = {}
        for prompt in prompts:
            if prompt.digest not in pictures:
                pictures[prompt.digest] = self._features(prompt.images)
        return [self._encoded(prompt, *pictures[prompt.digest]) for prompt in prompts]

    def _features(self, images: Sequence[np.ndarray]) -> tuple[Any, Tensor]:
        """What the vision tower makes of the pictures, and their grids of patches [pictures, 3]."""
        sizes = [size_of(image, self.shown) for image in images]
        shown = [
            Image.fromarray(resized(image, height, width)) for image, (width, height) in zip(images, sizes, strict=True)
        ]
        patches = self.processor(images=shown, return_tensors="pt")
        grids = patches["image_grid_thw"].to(self.device)
        features = self.text_encoder.get_image_features(
            patches["pixel_values"].to(self.device), grids, return_dict=True
        )
        return features, grids

    def _encoded(self, prompt: Prompt, features: Any, grids: Tensor) -> TextCondition:
        input_ids = torch.tensor([prompt.ids], device=self.device)
        is_picture = (input_ids == self.text_encoder.config.image_token_id).int()
        states = self.text_encoder(
            input_ids=input_ids,
            image_grid_thw=grids,
            mm_token_type_ids=is_picture if self.spatial_positions else None,
            mm_encoder_outputs={"image": features},
            use_cache=False,
        ).last_hidden_state
        return counted(states[0], EDITING.num_dropped, self.dtype)

    def row_bytes(self, num_tokens: int) -> int:
        """See PromptEncoder."""
        vision = self.vision_memory.row_bytes(self.patches_per_token * num_tokens)
        return max(vision, self.memory.row_bytes(num_tokens))


def counted(states: Tensor, num_dropped: int, dtype: torch.dtype) -> TextCondition:
    """The states [L, D] that count, in memory of their own."""
    kept = states[num_dropped:].to(dtype, copy=True)
    return TextCondition(kept, kept.shape[0])


def size_of(image: np.ndarray, rule: SizeFromImage) -> tuple[int, int]:
    """(width, height) that a picture [H, W, 3] gets."""
    return rule.size(image.shape[1], image.shape[0])
