"""Architecture of the HunyuanVideo autoencoder, as published in `vae/config.json`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest

_DOWN_BLOCK, _UP_BLOCK = "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D"


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoVAEConfig(ModelConfig):
    """Causal video autoencoder of HunyuanVideo. Source: arXiv:2412.03603."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    down_block_types: tuple[str, ...] = (_DOWN_BLOCK,) * 4
    up_block_types: tuple[str, ...] = (_UP_BLOCK,) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        num_stages = len(self.block_out_channels)
        for name, accepted in (
            ("down_block_types", (_DOWN_BLOCK,) * num_stages),
            ("up_block_types", (_UP_BLOCK,) * num_stages),
            ("act_fn", "silu"),
            ("temporal_compression_ratio", 4),
        ):
            if (value := getattr(self, name)) != accepted:
                raise InvalidRequest(
                    f"HunyuanVideoVAEConfig.{name} is {value!r}; accepted for {num_stages} stages: {accepted!r}",
                    param=name,
                )
        ratios = [2**count for count in range(1, num_stages + 1)]
        if self.spatial_compression_ratio not in ratios:
            raise InvalidRequest(
                f"HunyuanVideoVAEConfig.spatial_compression_ratio is {self.spatial_compression_ratio}; "
                f"accepted for {num_stages} stages: {', '.join(map(str, ratios))}",
                param="spatial_compression_ratio",
            )
        if num_stages < 3:
            raise InvalidRequest(
                f"HunyuanVideoVAEConfig.block_out_channels has {num_stages} stages; a temporal ratio of 4 wants 3",
                param="block_out_channels",
            )

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """How much each stage shrinks (encoder) or grows (decoder) time and space, in the order of its stages."""
        last = len(self.block_out_channels) - 1
        num_spatial = self.spatial_compression_ratio.bit_length() - 1
        return tuple(
            (2 if last - 2 <= stage < last else 1, 2 if stage < num_spatial else 1) for stage in range(last + 1)
        )
