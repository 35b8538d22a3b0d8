"""Architecture of the LTX-Video autoencoder, as published in `vae/config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.errors import InvalidRequest

_STRIDED, _FOLDED = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"
Strides = tuple[int, int, int]
_DOWNSAMPLING: dict[str, Strides] = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}
_BOTH: Strides = (2, 2, 2)
_PARTS = 8
"""Cells that an upsampling makes of one."""


@dataclass(frozen=True, kw_only=True)
class LTXVideoVAEConfig(ModelConfig):
    """Video autoencoder of LTX-Video, 0.9.0 to 0.9.8. Source: arXiv:2501.00103.

    Lists of the decoder are in the order of the encoder: the decoder goes through them from the end.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = (_STRIDED,) * 4
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)
    decoder_layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)
    spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    decoder_inject_noise: tuple[bool, ...] = (False,) * 5
    downsample_type: tuple[str, ...] = ("conv",) * 4
    upsample_residual: tuple[bool, ...] = (False,) * 4
    upsample_factor: tuple[int, ...] = (1,) * 4
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = False
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size_t", "scaling_factor"):
            if getattr(self, name) != 1:
                self._refuse(name, "1")
        self._check_lengths()
        self._check_encoder()
        self._check_decoder()
        for name, axis, pixels in (("spatial", 1, self.patch_size), ("temporal", 0, 1)):
            down, up = (pixels * _product(strides, axis) for strides in (self.down_strides, self.up_strides))
            if down != up:
                self._refuse("decoder_spatio_temporal_scaling", f"what makes the encoder's {name} ratio, {down}")
            if getattr(self, f"{name}_compression_ratio") not in (None, down):
                self._refuse(f"{name}_compression_ratio", f"{down}, which the layers make, or null")

    @property
    def is_folded(self) -> bool:
        """Whether the encoder turns neighbouring cells into channels, as from 0.9.5 on, or has strides."""
        return self.down_block_types[-1:] == (_FOLDED,)

    @property
    def num_down_blocks(self) -> int:
        """Of the encoder: where cells are folded, the first width is that before the first block."""
        return len(self.block_out_channels) - self.is_folded

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels before each of the encoder's blocks and after the last one."""
        widths = self.block_out_channels
        return widths if self.is_folded else (*widths, widths[-1])

    @property
    def down_strides(self) -> tuple[Strides | None, ...]:
        """By how much each of the encoder's blocks shrinks frames, height and width; None where it does not."""
        kinds = zip(self.downsample_type, self.spatio_temporal_scaling, strict=True)
        return tuple(_DOWNSAMPLING.get(kind, _BOTH) if scales else None for kind, scales in kinds)

    @property
    def up_strides(self) -> tuple[Strides | None, ...]:
        """By how much each of the decoder's blocks, in its order, lets them grow."""
        return tuple(_BOTH if scales else None for scales in reversed(self.decoder_spatio_temporal_scaling))

    @property
    def decoder_widths(self) -> tuple[tuple[int, int], ...]:
        """Channels before each of the decoder's blocks, in its order, and behind it."""
        found, before = [], self.decoder_block_out_channels[-1]
        for width, factor in zip(
            reversed(self.decoder_block_out_channels), reversed(self.upsample_factor), strict=True
        ):
            found.append((before, width // factor))
            before = width // factor
        return tuple(found)

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent cell along height and width."""
        return self.patch_size * _product(self.down_strides, 1)

    @property
    def temporal_ratio(self) -> int:
        """Video frames per latent frame; the first latent frame holds one video frame only."""
        return _product(self.down_strides, 0)

    @property
    def injects_noise(self) -> bool:
        """Whether the decoder adds random numbers of its own."""
        return any(self.decoder_inject_noise)

    def _check_lengths(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels", "patch_size"):
            if getattr(self, name) < 1:
                self._refuse(name, "1 or more")
        for name in ("block_out_channels", "decoder_block_out_channels"):
            if min(getattr(self, name), default=0) < 1:
                self._refuse(name, "a width of 1 or more for each block")
        down, up = self.num_down_blocks, len(self.decoder_block_out_channels)
        for number, names in (
            (down, ("down_block_types", "spatio_temporal_scaling", "downsample_type")),
            (down + 1, ("layers_per_block",)),
            (up, ("decoder_spatio_temporal_scaling", "upsample_residual", "upsample_factor")),
            (up + 1, ("decoder_layers_per_block", "decoder_inject_noise")),
        ):
            for name in names:
                if len(getattr(self, name)) != number:
                    self._refuse(name, f"{number} values")

    def _check_encoder(self) -> None:
        if set(self.down_block_types) not in ({_STRIDED}, {_FOLDED}):
            self._refuse("down_block_types", f"{_STRIDED} for every block, or {_FOLDED}")
        if not self.is_folded:
            if set(self.downsample_type) != {"conv"}:
                self._refuse("downsample_type", f"conv for every {_STRIDED}")
            return
        if unknown := set(self.downsample_type) - set(_DOWNSAMPLING):
            self._refuse("downsample_type", f"{', '.join(_DOWNSAMPLING)}, not {', '.join(sorted(unknown))}")
        if not all(self.spatio_temporal_scaling):
            self._refuse("spatio_temporal_scaling", f"true for every {_FOLDED}")
        for (before, after), kind in zip(pairwise(self.block_out_channels), self.downsample_type, strict=True):
            folded = math.prod(_DOWNSAMPLING[kind])
            if after % folded or before * folded % after:
                self._refuse(
                    "block_out_channels", f"widths after which {folded} cells of {before} channels fold evenly"
                )

    def _check_decoder(self) -> None:
        blocks = zip(
            self.decoder_widths,
            reversed(self.decoder_block_out_channels),
            reversed(self.upsample_factor),
            reversed(self.upsample_residual),
            self.up_strides,
            reversed(self.decoder_inject_noise[:-1]),
            strict=True,
        )
        for (before, after), width, factor, has_residual, strides, is_noisy in blocks:
            if factor < 1 or _PARTS % factor or width % factor:
                self._refuse("upsample_factor", f"divisors of {_PARTS} and of the block's width {width}")
            if factor > 1 and (strides is None or before != width):
                self._refuse(
                    "upsample_factor", f"1 where a block does not scale, or gets {before} channels for {width}"
                )
            if has_residual and strides is not None and width % _PARTS:
                self._refuse("decoder_block_out_channels", f"multiples of {_PARTS} where upsample_residual is true")
            if factor == 1 and before != after and (self.timestep_conditioning or is_noisy):
                self._refuse(
                    "decoder_block_out_channels",
                    "equal widths, but for upsample_factor, with decoder_inject_noise or timestep_conditioning",
                )

    def _refuse(self, name: str, accepted: str) -> None:
        value = getattr(self, name)
        shown = list(value) if isinstance(value, tuple) else value
        raise InvalidRequest(f"LTXVideoVAEConfig.{name} is {shown!r}; accepted is {accepted}", param=name)


def _product(strides: tuple[Strides | None, ...], axis: int) -> int:
    return math.prod(each[axis] for each in strides if each is not None)
