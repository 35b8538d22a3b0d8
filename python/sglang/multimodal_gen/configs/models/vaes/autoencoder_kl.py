"""Architecture of the picture autoencoder of latent diffusion, as published in `vae/config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest

_DOWN_BLOCK, _UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(ModelConfig):
    """Convolutional autoencoder of pictures. Source: arXiv:2112.10752."""

    # The tiles of diffusers, where ours follow the free memory, and its advice not to compute in fp16.
    unused_keys: ClassVar[frozenset[str]] = frozenset({"sample_size", "force_upcast"})

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (_DOWN_BLOCK,)
    up_block_types: tuple[str, ...] = (_UP_BLOCK,)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        num_stages, groups = len(self.block_out_channels), self.norm_num_groups
        uneven = groups < 1 or any(width < 1 or width % groups for width in self.block_out_channels)
        for name, refused, accepted in (
            ("block_out_channels", not num_stages, "one width for each resolution"),
            ("norm_num_groups", uneven, f"a divisor of block_out_channels {list(self.block_out_channels)}"),
            ("down_block_types", self.down_block_types != (_DOWN_BLOCK,) * num_stages, f"{num_stages} {_DOWN_BLOCK}"),
            ("up_block_types", self.up_block_types != (_UP_BLOCK,) * num_stages, f"{num_stages} {_UP_BLOCK}"),
            ("act_fn", self.act_fn not in ("silu", "swish"), "silu or swish, which is the same"),
            ("in_channels", self.in_channels != 3, "3, for pictures in colours"),
            ("out_channels", self.out_channels != 3, "3, for pictures in colours"),
            ("layers_per_block", self.layers_per_block < 1, "1 or more"),
            ("latent_channels", self.latent_channels < 1, "1 or more"),
            ("scaling_factor", self.scaling_factor <= 0, "a number above 0"),
            ("latents_mean", self.latents_mean is not None, "null"),
            ("latents_std", self.latents_std is not None, "null"),
        ):
            if refused:
                value: Any = getattr(self, name)
                shown = list(value) if isinstance(value, tuple) else value
                raise InvalidRequest(f"AutoencoderKLConfig.{name} is {shown!r}; accepted is {accepted}", param=name)

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent cell along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)
