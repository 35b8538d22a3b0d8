"""Architecture of the LTX-Video transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName, foreign
from sglang.multimodal_gen.configs.transformer_shape import BlockRun, TransformerShape, time_embedding_parameters
from sglang.multimodal_gen.errors import InvalidRequest

_IMPLEMENTED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
}


_BLOCK = "transformer_blocks.{}."
FOREIGN_NAMES = (
    *(
        foreign(f"{attention}.{theirs}", f"{attention}.{ours}", inside=_BLOCK, within=_BLOCK)
        for attention in ("attn1", "attn2")
        for theirs, ours in (("q_norm", "norm_q"), ("k_norm", "norm_k"))
    ),
    foreign("patchify_proj", "proj_in"),
    foreign("adaln_single.linear", "time_embed.linear"),
    foreign("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
    foreign("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2"),
)
"""Of https://github.com/Lightricks/LTX-Video, whose other layers have the names that diffusers gave them too."""


@dataclass(frozen=True, kw_only=True)
class LTXVideoTransformerConfig(TransformerConfig):
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

    @property
    def foreign_names(self) -> tuple[ForeignName, ...]:
        """See TransformerConfig."""
        return FOREIGN_NAMES

    @property
    def shape(self) -> TransformerShape:
        """See TransformerConfig."""
        dim = self.hidden_size
        block = BlockRun(
            count=self.num_layers,
            image_weights=14 * dim**2,
            text_weights=2 * self.cross_attention_dim * dim,
            other_parameters=23 * dim,
            attentions=("image",),
            crosses=True,
            sums=("image", "image", "image"),
            norm_sums=3,
            launches=17,
            launches_apart=3,
            traffic=44,
        )
        return TransformerShape(
            num_heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            runs=(block,),
            outside_parameters=(self.in_channels + self.num_output_channels) * dim
            + time_embedding_parameters(256, dim)
            + time_embedding_parameters(self.caption_channels, dim)
            + 6 * dim**2,
            patch=(self.patch_size_t, self.patch_size, self.patch_size),
            text_is_dealt=False,
        )
