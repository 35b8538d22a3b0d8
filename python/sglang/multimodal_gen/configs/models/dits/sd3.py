"""Architecture of the Stable Diffusion 3 transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class SD3TransformerConfig(ModelConfig):
    """Stable Diffusion 3 and 3.5 transformer; the defaults are diffusers'. Source: arXiv:2403.03206.

    `sample_size` is the latent side that the position table was made for; the table itself is in the checkpoint.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise InvalidRequest(
                f"SD3TransformerConfig.qk_norm is {self.qk_norm!r}; accepted are null and 'rms_norm'", param="qk_norm"
            )
        if self.caption_projection_dim != self.hidden_size:
            raise InvalidRequest(
                f"SD3TransformerConfig.caption_projection_dim is {self.caption_projection_dim}; text tokens are as "
                f"wide as image tokens, {self.hidden_size}",
                param="caption_projection_dim",
            )

    @property
    def hidden_size(self) -> int:
        """Width of the token stream: all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_output_channels(self) -> int:
        """Channels of the predicted velocity; published files may leave `out_channels` null."""
        return self.out_channels or self.in_channels
