"""Architecture of the Qwen-Image transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.transformer_shape import TransformerShape, dual_stream_run, time_embedding_parameters
from sglang.multimodal_gen.errors import InvalidRequest

# Options of other models of the architecture: of none that is published, and of Qwen-Image-Layered.
_NOT_IMPLEMENTED = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")


@dataclass(frozen=True, kw_only=True)
class QwenImageTransformerConfig(TransformerConfig):
    """Qwen-Image transformer; the defaults are Qwen-Image, `zero_cond_t` is Qwen-Image-Edit-2511.

    Source: arXiv:2508.02324.
    """

    # Published files carry it although no text is pooled.
    unused_keys: ClassVar[frozenset[str]] = frozenset({"pooled_projection_dim"})

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    def __post_init__(self) -> None:
        for name in _NOT_IMPLEMENTED:
            if getattr(self, name):
                raise InvalidRequest(
                    f"QwenImageTransformerConfig.{name} is True; only False is implemented: models of layers of "
                    "pictures and guidance-distilled ones are not",
                    param=name,
                )
        if len(self.axes_dims_rope) != 3 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise InvalidRequest(
                f"QwenImageTransformerConfig.axes_dims_rope is {list(self.axes_dims_rope)}; it must be three numbers, "
                f"together attention_head_dim, {self.attention_head_dim}",
                param="axes_dims_rope",
            )

    @property
    def hidden_size(self) -> int:
        """Width of the token stream: all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_output_channels(self) -> int:
        """Channels of a predicted token, which is a patch of latent cells."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)

    @property
    def shape(self) -> TransformerShape:
        """See TransformerConfig."""
        dim = self.hidden_size
        return TransformerShape(
            num_heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            runs=(dual_stream_run(self.num_layers, dim, ffn_dim=4 * dim),),
            outside_parameters=(self.in_channels + self.joint_attention_dim + self.num_output_channels) * dim
            + 2 * dim**2
            + time_embedding_parameters(256, dim),
            patch=(1, self.patch_size, self.patch_size),
            text_is_dealt=True,
        )
