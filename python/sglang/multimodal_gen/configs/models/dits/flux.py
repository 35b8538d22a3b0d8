"""Architecture of the FLUX.1 image transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName, foreign, swapped
from sglang.multimodal_gen.configs.transformer_shape import (
    TransformerShape,
    dual_stream_run,
    single_stream_run,
    time_embedding_parameters,
)
from sglang.multimodal_gen.errors import InvalidRequest

_BLOCK, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_EMBED = "time_text_embed."
FOREIGN_NAMES = (
    foreign("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_attn.proj", "attn.to_out.0", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_mlp.0", "ff.net.0.proj", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_mlp.2", "ff.net.2", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_mod.lin", "norm1.linear", inside="double_blocks.{}.", within=_BLOCK),
    foreign(
        "txt_attn.qkv",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        inside="double_blocks.{}.",
        within=_BLOCK,
    ),
    foreign("txt_attn.proj", "attn.to_add_out", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_mlp.0", "ff_context.net.0.proj", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_mlp.2", "ff_context.net.2", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_mod.lin", "norm1_context.linear", inside="double_blocks.{}.", within=_BLOCK),
    foreign("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", inside="single_blocks.{}.", within=_SINGLE),
    foreign("linear2", "proj_out", inside="single_blocks.{}.", within=_SINGLE),
    foreign("modulation.lin", "norm.linear", inside="single_blocks.{}.", within=_SINGLE),
    foreign("img_attn.norm.query_norm.scale", "attn.norm_q.weight", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_attn.norm.key_norm.scale", "attn.norm_k.weight", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight", inside="double_blocks.{}.", within=_BLOCK),
    foreign("norm.query_norm.scale", "attn.norm_q.weight", inside="single_blocks.{}.", within=_SINGLE),
    foreign("norm.key_norm.scale", "attn.norm_k.weight", inside="single_blocks.{}.", within=_SINGLE),
    foreign("img_in", "x_embedder"),
    foreign("txt_in", "context_embedder"),
    foreign("time_in.in_layer", "timestep_embedder.linear_1", within=_EMBED),
    foreign("time_in.out_layer", "timestep_embedder.linear_2", within=_EMBED),
    foreign("vector_in.in_layer", "text_embedder.linear_1", within=_EMBED),
    foreign("vector_in.out_layer", "text_embedder.linear_2", within=_EMBED),
    foreign("guidance_in.in_layer", "guidance_embedder.linear_1", within=_EMBED),
    foreign("guidance_in.out_layer", "guidance_embedder.linear_2", within=_EMBED),
    foreign("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    # XLabs keeps its adapters in attention processors.
    foreign("qkv_lora1", "to_q", "to_k", "to_v", inside="double_blocks.{}.processor.", within=f"{_BLOCK}attn."),
    foreign("proj_lora1", "to_out.0", inside="double_blocks.{}.processor.", within=f"{_BLOCK}attn."),
    foreign(
        *("qkv_lora2", "add_q_proj", "add_k_proj", "add_v_proj"),
        inside="double_blocks.{}.processor.",
        within=f"{_BLOCK}attn.",
    ),
    foreign("proj_lora2", "to_add_out", inside="double_blocks.{}.processor.", within=f"{_BLOCK}attn."),
    foreign("qkv_lora", "to_q", "to_k", "to_v", inside="single_blocks.{}.processor.", within=f"{_SINGLE}attn."),
    foreign("proj_lora", "proj_out", inside="single_blocks.{}.processor.", within=_SINGLE),
)
"""Of https://github.com/black-forest-labs/flux, and of XLabs."""


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
    def foreign_names(self) -> tuple[ForeignName, ...]:
        """See TransformerConfig."""
        return FOREIGN_NAMES

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
