"""Architecture of the Wan video autoencoder, as published in `vae/config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest

# Per-channel statistics of the published Wan 2.1 latents.
WAN21_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig(ModelConfig):
    """Causal video autoencoder; the defaults are Wan 2.1's, `is_residual` is Wan 2.2's. Source: arXiv:2503.20314."""

    # Wan 2.2's file says `clip_output`, which no implementation reads.
    unused_keys: ClassVar[frozenset[str]] = frozenset({"clip_output"})

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = WAN21_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN21_LATENTS_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8

    def __post_init__(self) -> None:
        if self.attn_scales:
            raise InvalidRequest(
                f"WanVAEConfig.attn_scales is {list(self.attn_scales)}; only an empty list is supported",
                param="attn_scales",
            )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise InvalidRequest(
                f"WanVAEConfig.temperal_downsample has {len(self.temperal_downsample)} entries; "
                f"dim_mult {self.dim_mult} wants {len(self.dim_mult) - 1}",
                param="temperal_downsample",
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise InvalidRequest(
                    f"WanVAEConfig.{name} has {len(getattr(self, name))} values; z_dim wants {self.z_dim}", param=name
                )

    @property
    def temporal_ratio(self) -> int:
        """Video frames per latent frame; the first latent frame holds one video frame only."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent cell along height and width."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)
