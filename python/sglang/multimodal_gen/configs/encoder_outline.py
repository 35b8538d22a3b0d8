"""What a text encoder's `config.json` tells of its weights before it loads: how many there are of what can be dealt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen.configs.encoder_dealing import EncoderSize, axis_sizes, deal_encoder
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape

_T5_TYPES = ("t5", "umt5")


@dataclass(frozen=True, kw_only=True)
class EncoderOutline:
    """`size` is the reason where nothing of the encoder can be dealt; the counts of parameters are of what can be.
    `num_layers` is 0 where they are not known."""

    name: str
    parameters: int
    size: EncoderSize | str
    heads: int = 0
    features: int = 0
    vocabulary: int = 0
    num_layers: int = 0

    def parameters_on_each(self, shape: ReplicaShape, *, element_bytes: int, wish: str) -> float:
        """How many each rank of the replica holds; `wish` is what `--encoder-parallel` says."""
        if shape.num_ranks == 1:
            return self.parameters
        dealing = deal_encoder(
            self.name, self.size, weight_bytes=self.parameters * element_bytes, shape=shape, wish=wish
        )
        ranks = axis_sizes(shape)
        parts = (
            (self.heads, dealing.heads),
            (self.features, dealing.features),
            (self.vocabulary, dealing.vocabulary),
        )
        elsewhere = sum(count * (1 - 1 / ranks[axis]) for count, axis in parts if axis is not None)
        return self.parameters - elsewhere


def outline_encoder(name: str, config: Mapping[str, Any], parameters: int) -> EncoderOutline:
    """Of the encoder in the directory `name` with this config. Language models are known by their config's keys: T5,
    and those with grouped keys, for which transformers declares how they are dealt; of other encoders nothing is."""
    inner: Mapping[str, Any] = config.get("text_config") or config
    try:
        if inner.get("model_type") in _T5_TYPES:
            return _t5(name, inner, parameters)
        if "num_key_value_heads" in inner:
            return _language_model(name, inner, parameters)
    except (KeyError, TypeError):
        pass  # An unusual config is reckoned with as one of which nothing is dealt.
    return EncoderOutline(name=name, parameters=parameters, size="its config says nothing of what can be dealt")


def _t5(name: str, config: Mapping[str, Any], parameters: int) -> EncoderOutline:
    width, inner, num_layers = config["d_model"], config["num_heads"] * config["d_kv"], config["num_layers"]
    into = 2 if "gated" in config.get("feed_forward_proj", "relu") else 1
    return EncoderOutline(
        name=name,
        parameters=parameters,
        size=EncoderSize(
            num_heads=config["num_heads"],
            num_key_heads=config["num_heads"],
            ffn_dim=config["d_ff"],
            vocab_size=config["vocab_size"],
        ),
        heads=4 * num_layers * width * inner,
        features=(into + 1) * num_layers * width * config["d_ff"],
        vocabulary=config["vocab_size"] * width,
        num_layers=num_layers,
    )


def _language_model(name: str, config: Mapping[str, Any], parameters: int) -> EncoderOutline:
    width, num_layers = config["hidden_size"], config["num_hidden_layers"]
    num_heads, num_key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or width // num_heads
    return EncoderOutline(
        name=name,
        parameters=parameters,
        size=EncoderSize(
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            ffn_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
        ),
        heads=2 * num_layers * width * head_dim * (num_heads + num_key_heads),
        features=3 * num_layers * width * config["intermediate_size"],
        vocabulary=config["vocab_size"] * width,
        num_layers=num_layers,
    )
