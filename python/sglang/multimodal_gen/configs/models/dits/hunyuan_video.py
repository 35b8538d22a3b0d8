"""Architecture of the HunyuanVideo transformer, as published in `transformer/config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName, foreign, swapped
from sglang.multimodal_gen.configs.transformer_shape import (
    BlockRun,
    TransformerShape,
    dual_stream_run,
    single_stream_run,
    time_embedding_parameters,
)
from sglang.multimodal_gen.errors import InvalidRequest

LATENT_CONCAT = "latent_concat"
"""The picture's latents and a mask are further channels of every frame."""
TOKEN_REPLACE = "token_replace"
"""The picture's latents are the first frame, whose tokens have timestep 0."""
_ACCEPTED = {"qk_norm": ("rms_norm",), "image_condition_type": (None, LATENT_CONCAT, TOKEN_REPLACE)}


_BLOCK, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_EMBED, _TEXT = "time_text_embed.", "context_embedder."
_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_REFINED = "context_embedder.token_refiner.refiner_blocks.{}."
FOREIGN_NAMES = (
    foreign("img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_attn_proj", "attn.to_out.0", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_mlp.fc1", "ff.net.0.proj", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_mlp.fc2", "ff.net.2", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_mod.linear", "norm1.linear", inside="double_blocks.{}.", within=_BLOCK),
    foreign(
        "txt_attn_qkv",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        inside="double_blocks.{}.",
        within=_BLOCK,
    ),
    foreign("txt_attn_proj", "attn.to_add_out", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_mlp.fc1", "ff_context.net.0.proj", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_mlp.fc2", "ff_context.net.2", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_mod.linear", "norm1_context.linear", inside="double_blocks.{}.", within=_BLOCK),
    foreign("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", inside="single_blocks.{}.", within=_SINGLE),
    foreign("linear2", "proj_out", inside="single_blocks.{}.", within=_SINGLE),
    foreign("modulation.linear", "norm.linear", inside="single_blocks.{}.", within=_SINGLE),
    foreign("img_attn_q_norm", "attn.norm_q", inside="double_blocks.{}.", within=_BLOCK),
    foreign("img_attn_k_norm", "attn.norm_k", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_attn_q_norm", "attn.norm_added_q", inside="double_blocks.{}.", within=_BLOCK),
    foreign("txt_attn_k_norm", "attn.norm_added_k", inside="double_blocks.{}.", within=_BLOCK),
    foreign("q_norm", "attn.norm_q", inside="single_blocks.{}.", within=_SINGLE),
    foreign("k_norm", "attn.norm_k", inside="single_blocks.{}.", within=_SINGLE),
    foreign("img_in.proj", "x_embedder.proj"),
    foreign("time_in.mlp.0", "timestep_embedder.linear_1", within=_EMBED),
    foreign("time_in.mlp.2", "timestep_embedder.linear_2", within=_EMBED),
    foreign("vector_in.in_layer", "text_embedder.linear_1", within=_EMBED),
    foreign("vector_in.out_layer", "text_embedder.linear_2", within=_EMBED),
    foreign("guidance_in.mlp.0", "guidance_embedder.linear_1", within=_EMBED),
    foreign("guidance_in.mlp.2", "guidance_embedder.linear_2", within=_EMBED),
    foreign("txt_in.input_embedder", "proj_in", within=_TEXT),
    foreign("txt_in.t_embedder.mlp.0", "timestep_embedder.linear_1", within=_TEXT + _EMBED),
    foreign("txt_in.t_embedder.mlp.2", "timestep_embedder.linear_2", within=_TEXT + _EMBED),
    foreign("txt_in.c_embedder.linear_1", "text_embedder.linear_1", within=_TEXT + _EMBED),
    foreign("txt_in.c_embedder.linear_2", "text_embedder.linear_2", within=_TEXT + _EMBED),
    foreign("self_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v", inside=_REFINER, within=_REFINED),
    foreign("self_attn_proj", "attn.to_out.0", inside=_REFINER, within=_REFINED),
    foreign("norm1", "norm1", inside=_REFINER, within=_REFINED),
    foreign("norm2", "norm2", inside=_REFINER, within=_REFINED),
    foreign("mlp.fc1", "ff.net.0.proj", inside=_REFINER, within=_REFINED),
    foreign("mlp.fc2", "ff.net.2", inside=_REFINER, within=_REFINED),
    foreign("adaLN_modulation.1", "norm_out.linear", inside=_REFINER, within=_REFINED),
    foreign("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
"""Of https://github.com/Tencent/HunyuanVideo."""


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoTransformerConfig(TransformerConfig):
    """HunyuanVideo transformer; the defaults are the text-to-video model. Source: arXiv:2412.03603."""

    in_channels: int = 16
    out_channels: int | None = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    image_condition_type: str | None = None

    def __post_init__(self) -> None:
        for name, accepted in _ACCEPTED.items():
            if (value := getattr(self, name)) not in accepted:
                choices = ", ".join("null" if choice is None else repr(choice) for choice in accepted)
                raise InvalidRequest(
                    f"HunyuanVideoTransformerConfig.{name} is {value!r}; accepted: {choices}", param=name
                )
        if len(self.rope_axes_dim) != 3 or sum(self.rope_axes_dim) != self.attention_head_dim:
            raise InvalidRequest(
                f"HunyuanVideoTransformerConfig.rope_axes_dim is {list(self.rope_axes_dim)}; it must have the channels "
                f"of time, height and width, together attention_head_dim, {self.attention_head_dim}",
                param="rope_axes_dim",
            )

    @property
    def hidden_size(self) -> int:
        """Width of the token stream: all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        """Hidden features of a block's MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        """A token's latent frames, rows and columns."""
        return self.patch_size_t, self.patch_size, self.patch_size

    @property
    def num_output_channels(self) -> int:
        """Channels of the predicted velocity; published files may leave `out_channels` null."""
        return self.out_channels or self.in_channels

    @property
    def foreign_names(self) -> tuple[ForeignName, ...]:
        """See TransformerConfig."""
        return FOREIGN_NAMES

    @property
    def shape(self) -> TransformerShape:
        """See TransformerConfig."""
        dim = self.hidden_size
        refiner = BlockRun(
            count=self.num_refiner_layers,
            text_weights=12 * dim**2,
            sample_weights=2 * dim**2,
            other_parameters=15 * dim,
            attentions=("text",),
            sums=("text", "text"),
            launches=14,
            traffic=44,
        )
        return TransformerShape(
            num_heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            runs=(
                refiner,
                dual_stream_run(self.num_layers, dim, ffn_dim=self.ffn_dim),
                single_stream_run(self.num_single_layers, dim, ffn_dim=self.ffn_dim),
            ),
            outside_parameters=math.prod(self.patch) * (self.in_channels + self.num_output_channels) * dim
            + 2 * dim**2
            + (2 + self.guidance_embeds) * time_embedding_parameters(256, dim)
            + time_embedding_parameters(self.pooled_projection_dim, dim)
            + time_embedding_parameters(self.text_embed_dim, dim)
            + self.text_embed_dim * dim,
            patch=self.patch,
            text_is_dealt=True,
        )
