"""Autoencoder of pictures that latent diffusion began with: whole pictures, or tiles where memory is short.

Source: arXiv:2112.10752, https://github.com/CompVis/latent-diffusion. Parameter names are those of the published
diffusers checkpoints; older files call the attention's layers otherwise.

Shapes: B batch, H, W height and width in pixels, Z latent channels, h, w height and width in latent cells. Pictures and
latents are clips of one frame to everybody else: [B, C, 1, H, W].
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.vaes.autoencoder_kl import AutoencoderKLConfig
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl_blocks import (
    CellAttention,
    Conv,
    Features,
    MidBlock,
    Norm,
    Stage,
)
from sglang.multimodal_gen.runtime.models.vaes.channels_last import in_order, settle_convolutions
from sglang.multimodal_gen.runtime.models.vaes.distribution import LatentDistribution
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling, over_tiles

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Encoder(nn.Module):
    """Pictures to the parameters of the latent distribution: [B, 3, H, W] -> [B, 2·Z, h, w]."""

    def __init__(self, config: AutoencoderKLConfig, context: LayerContext) -> None:
        super().__init__()
        widths, groups, strips = config.block_out_channels, config.norm_num_groups, context.strips
        last = len(widths) - 1
        self.conv_in = Conv(config.in_channels, widths[0], strips=strips)
        self.down_blocks = nn.ModuleList(
            [
                Stage(pair, config.layers_per_block, groups, strips, resampling="downsamplers" if at < last else None)
                for at, pair in enumerate(pairwise((widths[0], *widths)))
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, context, attention=config.mid_block_add_attention)
        self.conv_norm_out = Norm(groups, widths[-1], strips=strips)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, strips=strips)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv_in.features(images)
        for layer in (layer for stage in self.down_blocks for layer in stage.layers()):  # type: ignore[operator]
            features = layer(features)
        return self.conv_out(self.conv_norm_out.of(self.mid_block(features)))


class Decoder(nn.Module):
    """Latents to pictures: [B, Z, h, w] -> [B, 3, H, W]."""

    def __init__(self, config: AutoencoderKLConfig, context: LayerContext) -> None:
        super().__init__()
        widths, groups, strips = config.block_out_channels[::-1], config.norm_num_groups, context.strips
        last = len(widths) - 1
        self.conv_in = Conv(config.latent_channels, widths[0], strips=strips)
        self.mid_block = MidBlock(widths[0], groups, context, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [
                Stage(pair, config.layers_per_block + 1, groups, strips, resampling="upsamplers" if at < last else None)
                for at, pair in enumerate(pairwise((widths[0], *widths)))
            ]
        )
        self.conv_norm_out = Norm(groups, widths[-1], strips=strips)
        self.conv_out = Conv(widths[-1], config.out_channels, strips=strips)

    def forward(self, images: Tensor) -> Tensor:
        features: Features = self.mid_block(self.conv_in.features(images))
        # Layer by layer, so that nobody holds what came before: see the Wan decoder.
        for layer in (layer for stage in self.up_blocks for layer in stage.layers()):  # type: ignore[operator]
            features = layer(features)
        return self.conv_out(self.conv_norm_out.of(features))


class PictureState:
    """A picture is decoded at once: there is nothing to remember but how it is cut into tiles."""

    def __init__(self, tiling: Tiling | None = None) -> None:
        self.tiling = tiling


class AutoencoderKL(nn.Module):
    """Encodes pictures in [-1, 1] to latents and back."""

    decodes_whole_clips: ClassVar[bool] = True

    def __init__(self, config: AutoencoderKLConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.strips = context.strips
        self.encoder = Encoder(config, context)
        self.decoder = Decoder(config, context)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else None
        self.key_aliases = {
            f"{name}.{old}.{leaf}": f"{name}.{own}.{leaf}"
            for name, layer in self.named_modules()
            if isinstance(layer, CellAttention)
            for old, own in _OLD_NAMES.items()
            for leaf in ("weight", "bias")
        }
        """See `load_module`."""

    def settle_weights(self) -> None:
        """See `load_module`."""
        settle_convolutions(self)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.decoder.conv_in.weight.dtype

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of the encoder -> what the transformer works on."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`; `decode` takes its result."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)

    def to_latents(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Pictures [B, 3, 1, H, W] in [-1, 1] -> latents [B, Z, 1, h, w] as the transformer has them.

        The most likely ones, or with a generator of the CPU a sample.
        """
        return self.normalise(self.encode(video).chosen(generator))

    def encode(self, video: Tensor, *, tiling: Tiling | None = None) -> LatentDistribution:
        """Pictures [B, 3, 1, H, W] in [-1, 1] -> latent distribution."""
        cells = None if tiling is None else tiling.scaled(self.config.spatial_ratio)
        encode = partial(self.strips.over_whole, self._encode_tile, ratio=self.config.spatial_ratio)
        return LatentDistribution.of_moments(over_tiles(encode, video, tiling, cells))

    def decode(self, latents: Tensor, *, tiling: Tiling | None = None) -> Tensor:
        """Latents [B, Z, 1, h, w] -> pictures [B, 3, 1, H, W] in about [-1, 1]; of several ranks each gets its
        strip."""
        return self.decode_next(latents, self.new_state(tiling, carry=False))

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> PictureState:
        """For a new picture."""
        assert not carry, "a picture is one frame"
        return PictureState(tiling)

    def decode_next(self, latents: Tensor, state: PictureState) -> Tensor:
        """As `decode`, with a strip of the whole picture, or of what was put together from strips of tiles."""
        if state.tiling is None:
            return self.strips.over_strip(self._decode_tile, latents)
        cells = state.tiling.scaled(self.config.spatial_ratio)
        decode = partial(self.strips.over_whole, self._decode_tile)
        return self.strips.own(over_tiles(decode, latents, cells, state.tiling), *latents.shape[-2:])

    def _encode_tile(self, video: Tensor) -> Tensor:
        moments = self.encoder(_pictures(video))
        return (moments if self.quant_conv is None else self.quant_conv(moments)).unsqueeze(2)

    def _decode_tile(self, latents: Tensor) -> Tensor:
        images = _pictures(latents)
        return self.decoder(images if self.post_quant_conv is None else self.post_quant_conv(images)).unsqueeze(2)


def _pictures(video: Tensor) -> Tensor:
    """[B, C, 1, H, W] -> [B, C, H, W]."""
    assert video.shape[2] == 1, "a picture is one frame"
    return in_order(video.squeeze(2))
