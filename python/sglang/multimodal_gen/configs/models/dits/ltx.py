"""Architecture of the LTX-Video transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest

_IMPLEMENTED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
}


@dataclass(frozen=True, kw_only=True)
class LTXVideoTransformerConfig(ModelConfig):
    """LTX-Video transformer; the defaults are the 2B models. Source: arXiv:2501.00103."""

    in_channels: int = 128
    out_channels: int | None = 128
    patch_size: int = 1
    patch_size_t: int = 1
    num_attention_heads: int = 32
    attention_head_dim: int = 64
    cross_attention_dim: int = 2048
    num_layers: int = 28
    activation_fn: str = "gelu-approximate"
    qk_norm: str = "rms_norm_across_heads"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    caption_channels: int = 4096
    attention_bias: bool = True
    attention_out_bias: bool = True

    def __post_init__(self) -> None:
        for name, only in {**_IMPLEMENTED, "cross_attention_dim": self.hidden_size}.items():
            value = getattr(self, name)
            if value != only:
                raise InvalidRequest(f"LTXVideoTransformerConfig.{name} is {value!r}; only {only!r} exists", param=name)

    @property
    def hidden_size(self) -> int:
        """Width of the token stream: all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_output_channels(self) -> int:
        """Channels of a predicted token; published files may leave `out_channels` null."""
        return self.out_channels or self.in_channels
