"""Architecture of the Stable Diffusion 3 transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName, foreign, swapped
from sglang.multimodal_gen.configs.transformer_shape import (
    BlockRun,
    Segment,
    TransformerShape,
    time_embedding_parameters,
)
from sglang.multimodal_gen.errors import InvalidRequest

CLIP_TOKENS = 77
"""Tokens of the two CLIP encoders' texts, which stand in front of those of the third."""


_BLOCK, _EMBED = "transformer_blocks.{}.", "time_text_embed."
_IMAGE, _CONTEXT = "joint_blocks.{}.x_block.", "joint_blocks.{}.context_block."
FOREIGN_NAMES = (
    foreign("attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v", inside=_IMAGE, within=_BLOCK),
    foreign("attn.proj", "attn.to_out.0", inside=_IMAGE, within=_BLOCK),
    foreign("attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v", inside=_IMAGE, within=_BLOCK),
    foreign("attn2.proj", "attn2.to_out.0", inside=_IMAGE, within=_BLOCK),
    foreign("mlp.fc1", "ff.net.0.proj", inside=_IMAGE, within=_BLOCK),
    foreign("mlp.fc2", "ff.net.2", inside=_IMAGE, within=_BLOCK),
    foreign("adaLN_modulation.1", "norm1.linear", inside=_IMAGE, within=_BLOCK),
    foreign("attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", inside=_CONTEXT, within=_BLOCK),
    foreign("attn.proj", "attn.to_add_out", inside=_CONTEXT, within=_BLOCK),
    foreign("mlp.fc1", "ff_context.net.0.proj", inside=_CONTEXT, within=_BLOCK),
    foreign("mlp.fc2", "ff_context.net.2", inside=_CONTEXT, within=_BLOCK),
    foreign("adaLN_modulation.1", "norm1_context.linear", inside=_CONTEXT, within=_BLOCK),
    foreign("attn.ln_q", "attn.norm_q", inside=_IMAGE, within=_BLOCK),
    foreign("attn.ln_k", "attn.norm_k", inside=_IMAGE, within=_BLOCK),
    foreign("attn2.ln_q", "attn2.norm_q", inside=_IMAGE, within=_BLOCK),
    foreign("attn2.ln_k", "attn2.norm_k", inside=_IMAGE, within=_BLOCK),
    foreign("attn.ln_q", "attn.norm_added_q", inside=_CONTEXT, within=_BLOCK),
    foreign("attn.ln_k", "attn.norm_added_k", inside=_CONTEXT, within=_BLOCK),
    foreign("x_embedder.proj", "pos_embed.proj"),
    foreign("pos_embed", "pos_embed.pos_embed"),
    foreign("t_embedder.mlp.0", "timestep_embedder.linear_1", within=_EMBED),
    foreign("t_embedder.mlp.2", "timestep_embedder.linear_2", within=_EMBED),
    foreign("y_embedder.mlp.0", "text_embedder.linear_1", within=_EMBED),
    foreign("y_embedder.mlp.2", "text_embedder.linear_2", within=_EMBED),
    foreign("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
"""Of https://github.com/Stability-AI/sd3.5."""


@dataclass(frozen=True, kw_only=True)
class SD3TransformerConfig(TransformerConfig):
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

    @property
    def foreign_names(self) -> tuple[ForeignName, ...]:
        """See TransformerConfig."""
        # The last block's texts go nowhere but into attention: their norm is one of scale and shift alone.
        last = self.num_layers - 1
        theirs = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
        return swapped(theirs, f"transformer_blocks.{last}.norm1_context.linear"), *FOREIGN_NAMES

    @property
    def shape(self) -> TransformerShape:
        """See TransformerConfig."""
        dim = self.hidden_size
        return TransformerShape(
            num_heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            runs=tuple(self._run(layer) for layer in range(self.num_layers)),
            outside_parameters=self.patch_size**2 * (self.in_channels + self.num_output_channels) * dim
            + self.joint_attention_dim * dim
            + 2 * dim**2
            + time_embedding_parameters(256, dim)
            + time_embedding_parameters(self.pooled_projection_dim, dim),
            patch=(1, self.patch_size, self.patch_size),
            text_is_dealt=True,
            extra_text_tokens=CLIP_TOKENS,
        )

    def _run(self, layer: int) -> BlockRun:
        """One block. The last makes nothing of the text, and some let the image attend once more, to itself alone."""
        dim, is_last = self.hidden_size, layer == self.num_layers - 1
        attends_twice = layer in self.dual_attention_layers
        sums: tuple[Segment, ...] = ("image", "image", "image") if attends_twice else ("image", "image")
        if not is_last:
            sums += ("text", "text")
        return BlockRun(
            count=1,
            image_weights=(16 if attends_twice else 12) * dim**2,
            text_weights=(3 if is_last else 12) * dim**2,
            sample_weights=(6 + (2 if is_last else 6) + (3 if attends_twice else 0)) * dim**2,
            other_parameters=30 * dim,
            attentions=("joint", "image") if attends_twice else ("joint",),
            sums=sums,
            launches=(15 if self.qk_norm is None else 17) + (6 if attends_twice else 0),
            launches_apart=(10 if self.qk_norm is None else 6) + (2 if attends_twice else 0),
            traffic=(18 if self.qk_norm is None else 26) + (18 if attends_twice else 0),
        )
