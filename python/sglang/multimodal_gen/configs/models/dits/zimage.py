"""Architecture of the Z-Image transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName, foreign
from sglang.multimodal_gen.configs.transformer_shape import BlockRun, Segment, TransformerShape
from sglang.multimodal_gen.errors import InvalidRequest

_STACKS = ("layers.{}.attention.", "noise_refiner.{}.attention.", "context_refiner.{}.attention.")
FOREIGN_NAMES = (
    *(foreign("qkv", "to_q", "to_k", "to_v", inside=stack, within=stack) for stack in _STACKS),
    *(foreign("out", "to_out.0", inside=stack, within=stack) for stack in _STACKS),
    *(foreign("q_norm", "norm_q", inside=stack, within=stack) for stack in _STACKS),
    *(foreign("k_norm", "norm_k", inside=stack, within=stack) for stack in _STACKS),
    foreign("x_embedder", "all_x_embedder.2-1"),
    foreign("final_layer.linear", "all_final_layer.2-1.linear"),
    foreign("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    foreign("norm_final"),
)
"""Of https://github.com/Tongyi-MAI/Z-Image."""


@dataclass(frozen=True, kw_only=True)
class ZImageTransformerConfig(TransformerConfig):
    """Z-Image transformer; the defaults are diffusers'. Source: https://github.com/Tongyi-MAI/Z-Image

    `axes_dims` are the channels of each head that the three axes of a position rotate, `axes_lens` how many positions
    each axis has: captions lie along the first, images start behind them and extend along the other two.
    """

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    def __post_init__(self) -> None:
        for name, accepted, why in (
            ("all_patch_size", (2,), "patches of another size have weights of their own"),
            ("all_f_patch_size", (1,), "a token holds one frame"),
            ("n_kv_heads", self.n_heads, "keys and values have as many heads as queries, n_heads"),
            ("qk_norm", True, "queries and keys are normed"),
            ("siglip_feat_dim", None, "the variants that read reference images are not implemented"),
        ):
            value = getattr(self, name)
            if value != accepted:
                raise InvalidRequest(
                    f"ZImageTransformerConfig.{name} is {_shown(value)}, accepted is {_shown(accepted)}: {why}",
                    param=name,
                )
        if len(self.axes_dims) != 3 or sum(self.axes_dims) * self.n_heads != self.dim:
            raise InvalidRequest(
                f"ZImageTransformerConfig.axes_dims is {list(self.axes_dims)}; accepted are three numbers that are "
                f"together dim / n_heads, {self.dim / self.n_heads:g}",
                param="axes_dims",
            )
        if len(self.axes_lens) != 3:
            raise InvalidRequest(
                f"ZImageTransformerConfig.axes_lens is {list(self.axes_lens)}; accepted are three numbers",
                param="axes_lens",
            )

    @property
    def patch_size(self) -> int:
        """Side of the square of latent cells that makes a token."""
        return self.all_patch_size[0]

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.n_heads

    @property
    def num_attention_heads(self) -> int:
        """As other families call it."""
        return self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the gated feed-forward layer, rounded as the published weights are."""
        return int(self.dim / 3 * 8)

    @property
    def foreign_names(self) -> tuple[ForeignName, ...]:
        """See TransformerConfig."""
        return FOREIGN_NAMES

    @property
    def shape(self) -> TransformerShape:
        """See TransformerConfig."""
        return TransformerShape(
            num_heads=self.n_heads,
            head_dim=self.head_dim,
            runs=(
                self._run(self.n_refiner_layers, "image"),
                self._run(self.n_refiner_layers, "text"),
                self._run(self.n_layers, "joint"),
            ),
            outside_parameters=(2 * self.patch_size**2 * self.in_channels + self.cap_feat_dim + 256) * self.dim
            + 2 * 256 * 1024,
            patch=(1, self.patch_size, self.patch_size),
            text_is_dealt=True,
        )

    def _run(self, count: int, segment: Segment) -> BlockRun:
        """Blocks over these tokens; those of the text are not modulated by the timestep."""
        weights = 4 * self.dim**2 + 3 * self.dim * self.ffn_dim
        modulated = segment != "text"
        return BlockRun(
            count=count,
            image_weights=weights if segment == "image" else 0,
            text_weights=weights if segment == "text" else 0,
            joint_weights=weights if segment == "joint" else 0,
            sample_weights=4 * min(self.dim, 256) * self.dim if modulated else 0,
            other_parameters=(8 if modulated else 4) * self.dim + 2 * self.head_dim,
            attentions=(segment,),
            sums=(segment, segment),
            once=segment == "text",
            launches=10,
            launches_apart=2,
            traffic=42,
        )


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
