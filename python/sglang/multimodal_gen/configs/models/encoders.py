"""Architectures of the text encoders, as published in `text_encoder/config.json`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from sglang.multimodal_gen.configs.encoder_dealing import EncoderSize
from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest

# What the feed-forward layers are -> the activation, as files of transformers call it besides.
_FEED_FORWARD = {"relu": "relu", "gated-gelu": "gelu_new"}


@dataclass(frozen=True, kw_only=True)
class T5EncoderConfig(ModelConfig):
    """The encoder half of T5; the defaults are those of transformers' `T5Config`. Source: arXiv:1910.10683."""

    model_type: ClassVar[str] = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_value(f"{name}.feed_forward_proj", self.feed_forward_proj, _FEED_FORWARD)
        require_positive(f"{name}.num_layers", self.num_layers)

    @property
    def is_gated(self) -> bool:
        """Whether one projection of the feed-forward layers gates another."""
        return self.feed_forward_proj.startswith("gated")

    @property
    def size(self) -> EncoderSize:
        """What of it can be dealt to ranks."""
        return EncoderSize(
            num_heads=self.num_heads, num_key_heads=self.num_heads, ffn_dim=self.d_ff, vocab_size=self.vocab_size
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As the base's, but keys that are no field are left out.

        Files of transformers also describe the decoder, training and generation, with keys that change by version. Two
        of them say again what `feed_forward_proj` does, and must agree.
        """
        config = super().from_dict(known_keys(cls, cls.model_type, data))
        stated = {"dense_act_fn": _FEED_FORWARD[config.feed_forward_proj], "is_gated_act": config.is_gated}
        for key, value in stated.items():
            require_value(f"{cls.__name__}.{key}", data.get(key, value), (value,))
        return config


@dataclass(frozen=True, kw_only=True)
class UMT5EncoderConfig(T5EncoderConfig):
    """The encoder half of UMT5; the defaults are those of transformers' `UMT5Config`. Source: arXiv:2304.09151."""

    model_type: ClassVar[str] = "umt5"
    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(ModelConfig):
    """CLIP's text encoder; the defaults are those of transformers' `CLIPTextConfig`. Source: arXiv:2103.00020."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_positive(f"{name}.num_hidden_layers", self.num_hidden_layers)
        require_value(f"{name}.hidden_act", self.hidden_act, ("quick_gelu", "gelu"))
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise InvalidRequest(
                f"{name}.num_attention_heads is {self.num_attention_heads}, but must divide hidden_size, "
                f"{self.hidden_size}",
                param="num_attention_heads",
            )

    @property
    def size(self) -> str:
        """Why nothing of it is dealt to ranks."""
        return "its layers are small, and are not made to hold parts"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As the base's, of the file of the text encoder or of all of CLIP; keys that are no field are left out."""
        if data.get("model_type") == "clip" and isinstance(data.get("text_config"), Mapping):
            data = {"model_type": "clip_text_model", **data["text_config"]}
        return super().from_dict(known_keys(cls, "clip_text_model", data))


def known_keys(cls: type[ModelConfig], model_type: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file of transformers is a field of the config. Raises InvalidRequest for another `model_type`."""
    require_value("model_type", data.get("model_type"), (model_type,))
    known = {field.name for field in fields(cls)}
    return {key: value for key, value in data.items() if key in known}


def require_value(key: str, value: Any, accepted: Collection[Any]) -> None:
    """Raises InvalidRequest naming key, value and what is accepted, unless it is among that."""
    if value not in accepted:
        choices = " or ".join(map(repr, accepted))
        raise InvalidRequest(f"{key} is {value!r}, but must be {choices}", param=key.rpartition(".")[2])


def require_positive(key: str, value: int) -> None:
    """Raises InvalidRequest naming key and value unless it is at least 1."""
    if value < 1:
        raise InvalidRequest(f"{key} is {value}, but must be at least 1", param=key.rpartition(".")[2])
