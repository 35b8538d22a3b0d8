"""Architecture of the FLUX.1 image transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.transformer_shape import (
    TransformerShape,
    dual_stream_run,
    single_stream_run,
    time_embedding_parameters,
)
from sglang.multimodal_gen.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class FluxTransformerConfig(TransformerConfig):
    """FLUX.1 image transformer; the defaults are FLUX.1-schnell. Source: https://github.com/black-forest-labs/flux"""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise InvalidRequest(
                f"FluxTransformerConfig.axes_dims_rope is {list(self.axes_dims_rope)}; together they must be "
                f"attention_head_dim, {self.attention_head_dim}",
                param="axes_dims_rope",
            )

    @property
    def hidden_size(self) -> int:
        """Width of the token stream: all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_output_channels(self) -> int:
        """Channels of a predicted token; published files may leave `out_channels` null."""
        return self.out_channels or self.in_channels

    @property
    def shape(self) -> TransformerShape:
        """See TransformerConfig."""
        dim = self.hidden_size
        return TransformerShape(
            num_heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            runs=(
                dual_stream_run(self.num_layers, dim, ffn_dim=4 * dim),
                single_stream_run(self.num_single_layers, dim, ffn_dim=4 * dim),
            ),
            outside_parameters=(self.in_channels + self.joint_attention_dim + self.num_output_channels) * dim
            + 2 * dim**2
            + (1 + self.guidance_embeds) * time_embedding_parameters(256, dim)
            + time_embedding_parameters(self.pooled_projection_dim, dim),
            patch=(1, 2, 2),
            text_is_dealt=True,
        )
