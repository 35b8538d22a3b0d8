"""Architecture of the Wan video transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class WanTransformerConfig(ModelConfig):
    """Wan 2.1 and 2.2 video transformer; the defaults are Wan2.1-T2V-14B. Source: arXiv:2503.20314."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm_across_heads":
            raise InvalidRequest(
                f"WanTransformerConfig.qk_norm is {self.qk_norm!r}; only 'rms_norm_across_heads' exists",
                param="qk_norm",
            )

    @property
    def hidden_size(self) -> int:
        """Width of the token stream: all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_output_channels(self) -> int:
        """Channels of the predicted velocity; published files may leave `out_channels` null."""
        return self.out_channels or self.in_channels
