"""Architecture of the Wan video transformer, as published in `transformer/config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName, foreign
from sglang.multimodal_gen.configs.transformer_shape import BlockRun, TransformerShape, time_embedding_parameters
from sglang.multimodal_gen.errors import InvalidRequest

_BLOCK, _EMBED = "blocks.{}.", "condition_embedder."
FOREIGN_NAMES = (
    *(
        foreign(f"{theirs}.{name}", f"{ours}.{own}", inside=_BLOCK, within=_BLOCK)
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, own in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    ),
    foreign("cross_attn.k_img", "attn2.add_k_proj", inside=_BLOCK, within=_BLOCK),
    foreign("cross_attn.v_img", "attn2.add_v_proj", inside=_BLOCK, within=_BLOCK),
    *(
        foreign(f"{theirs}.{name}", f"{ours}.{name}", inside=_BLOCK, within=_BLOCK)
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name in ("norm_q", "norm_k")
    ),
    foreign("cross_attn.norm_k_img", "attn2.norm_added_k", inside=_BLOCK, within=_BLOCK),
    foreign("norm3", "norm2", inside=_BLOCK, within=_BLOCK),
    foreign("modulation", "scale_shift_table", inside=_BLOCK, within=_BLOCK),
    foreign("ffn.0", "ffn.net.0.proj", inside=_BLOCK, within=_BLOCK),
    foreign("ffn.2", "ffn.net.2", inside=_BLOCK, within=_BLOCK),
    foreign("time_projection.1", "time_proj", within=_EMBED),
    foreign("time_embedding.0", "time_embedder.linear_1", within=_EMBED),
    foreign("time_embedding.2", "time_embedder.linear_2", within=_EMBED),
    foreign("text_embedding.0", "text_embedder.linear_1", within=_EMBED),
    foreign("text_embedding.2", "text_embedder.linear_2", within=_EMBED),
    foreign("img_emb.emb_pos", "image_embedder.pos_embed", within=_EMBED),
    foreign("img_emb.proj.0", "image_embedder.norm1", within=_EMBED),
    foreign("img_emb.proj.1", "image_embedder.ff.net.0.proj", within=_EMBED),
    foreign("img_emb.proj.3", "image_embedder.ff.net.2", within=_EMBED),
    foreign("img_emb.proj.4", "image_embedder.norm2", within=_EMBED),
    foreign("head.modulation", "scale_shift_table"),
    foreign("head.head", "proj_out"),
)
"""Of https://github.com/Wan-Video/Wan2.1."""


@dataclass(frozen=True, kw_only=True)
class WanTransformerConfig(TransformerConfig):
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

    @property
    def foreign_names(self) -> tuple[ForeignName, ...]:
        """See TransformerConfig."""
        return FOREIGN_NAMES

    @property
    def shape(self) -> TransformerShape:
        """See TransformerConfig."""
        dim, added = self.hidden_size, self.added_kv_proj_dim or 0
        block = BlockRun(
            count=self.num_layers,
            image_weights=6 * dim**2 + 2 * dim * self.ffn_dim,
            text_weights=2 * dim**2 + 2 * added * dim,
            other_parameters=21 * dim + self.ffn_dim,
            attentions=("image",),
            crosses=True,
            sums=("image", "image", "image"),
            norm_sums=3,
            launches=16,
            launches_apart=3,
            traffic=39,
        )
        image_dim, patch = self.image_dim or 0, math.prod(self.patch_size)
        return TransformerShape(
            num_heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            runs=(block,),
            outside_parameters=patch * (self.in_channels + self.num_output_channels) * dim
            + time_embedding_parameters(self.freq_dim, dim)
            + time_embedding_parameters(self.text_dim, dim)
            + 6 * dim**2
            + image_dim * (image_dim + dim + (self.pos_embed_seq_len or 0)),
            patch=self.patch_size,
            text_is_dealt=False,
        )
