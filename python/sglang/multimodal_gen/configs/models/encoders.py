"""Architectures of the text encoders, as published in `text_encoder/config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from sglang.multimodal_gen.configs.encoder_dealing import EncoderSize
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class UMT5EncoderConfig(ModelConfig):
    """The encoder half of UMT5; the defaults are those of transformers' `UMT5Config`. Source: arXiv:2304.09151."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu":
            raise InvalidRequest(
                f"UMT5EncoderConfig.feed_forward_proj is {self.feed_forward_proj!r}; only 'gated-gelu' is implemented",
                param="feed_forward_proj",
            )

    @property
    def size(self) -> EncoderSize:
        """What of it can be dealt to ranks."""
        return EncoderSize(
            num_heads=self.num_heads, num_key_heads=self.num_heads, ffn_dim=self.d_ff, vocab_size=self.vocab_size
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As the base's, but keys that are no field are left out.

        Files of transformers also describe the decoder, training and generation, with keys that change by version.
        """
        if data.get("model_type") != "umt5":
            raise InvalidRequest(f"model_type is {data.get('model_type')!r}, but must be 'umt5'", param="model_type")
        known = {field.name for field in fields(cls)}
        return super().from_dict({key: value for key, value in data.items() if key in known})
