"""Causal video autoencoder of HunyuanVideo, in overlapping pieces along time and, where memory is short, in tiles.

Its norms run over all frames that a layer sees, so that the way a clip is cut is part of the model: as diffusers cuts
it by default. Source: arXiv:2412.03603, https://github.com/Tencent/HunyuanVideo. Parameter names are those of the
published diffusers checkpoints.

Shapes: B batch, T, H, W video frames, height, width; Z latent channels, t, h, w latent frames, height, width. A clip of
1 + 4·(t - 1) frames has t latent frames.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.vaes.hunyuan_video import HunyuanVideoVAEConfig
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.strips import StripGroupNorm
from sglang.multimodal_gen.runtime.models.vaes.channels_last import in_order, settle_convolutions
from sglang.multimodal_gen.runtime.models.vaes.distribution import LatentDistribution
from sglang.multimodal_gen.runtime.models.vaes.hunyuan_video_vae_blocks import (
    NORM_EPS,
    DownStage,
    EdgeCausalConv3d,
    MidBlock,
    UpStage,
)
from sglang.multimodal_gen.runtime.models.vaes.tiling import TemporalTiling, Tiling, over_tiles


class HunyuanVideoEncoder(nn.Module):
    """Video to the parameters of the latent distribution: [B, 3, T, H, W] -> [B, 2·Z, t, h, w]."""

    def __init__(self, config: HunyuanVideoVAEConfig, context: LayerContext) -> None:
        super().__init__()
        widths, groups, strips = config.block_out_channels, config.norm_num_groups, context.strips
        self.conv_in = EdgeCausalConv3d(config.in_channels, widths[0], strips=strips)
        self.down_blocks = nn.ModuleList(
            [
                DownStage(before, after, config.layers_per_block, groups, strides, strips)
                for (before, after), strides in zip(pairwise((widths[0], *widths)), config.strides, strict=True)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, context, attention=config.mid_block_add_attention)
        self.conv_norm_out = StripGroupNorm(groups, widths[-1], NORM_EPS, strips=strips)
        self.conv_out = EdgeCausalConv3d(widths[-1], 2 * config.latent_channels, strips=strips)

    def forward(self, frames: Tensor) -> Tensor:
        frames = self.conv_in(frames)
        for block in (*self.down_blocks, self.mid_block):
            frames = block(frames)
        return self.conv_out.after(self.conv_norm_out, frames)


class HunyuanVideoDecoder(nn.Module):
    """Latents to video: [B, Z, t, h, w] -> [B, 3, T, H, W]."""

    def __init__(self, config: HunyuanVideoVAEConfig, context: LayerContext) -> None:
        super().__init__()
        widths, groups, strips = config.block_out_channels[::-1], config.norm_num_groups, context.strips
        self.conv_in = EdgeCausalConv3d(config.latent_channels, widths[0], strips=strips)
        self.mid_block = MidBlock(widths[0], groups, context, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [
                UpStage(before, after, config.layers_per_block + 1, groups, factors, strips)
                for (before, after), factors in zip(pairwise((widths[0], *widths)), config.strides, strict=True)
            ]
        )
        self.conv_norm_out = StripGroupNorm(groups, widths[-1], NORM_EPS, strips=strips)
        self.conv_out = EdgeCausalConv3d(widths[-1], config.out_channels, strips=strips)

    def forward(self, frames: Tensor) -> Tensor:
        frames = self.conv_in(frames)
        for block in (self.mid_block, *self.up_blocks):
            frames = block(frames)
        return self.conv_out.after(self.conv_norm_out, frames)


class PieceState:
    """One request's progress through its clip: the end of the piece before, which the next one is blended with."""

    def __init__(self, tiling: Tiling | None = None) -> None:
        self.tiling = tiling
        self.before: Tensor | None = None


class AutoencoderKLHunyuanVideo(nn.Module):
    """Encodes video in [-1, 1] to latents and back."""

    def __init__(self, config: HunyuanVideoVAEConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.strips = context.strips
        self.encoder = HunyuanVideoEncoder(config, context)
        self.decoder = HunyuanVideoDecoder(config, context)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    def settle_weights(self) -> None:
        """See `load_module`."""
        settle_convolutions(self)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents [B, Z, t, h, w] of the encoder -> what the transformer works on."""
        return latents * self.config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`; `decode` takes its result."""
        return latents / self.config.scaling_factor

    def to_latents(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] -> latents [B, Z, t, h, w] as the transformer has them.

        The most likely ones, or with a generator of the CPU a sample.
        """
        return self.normalise(self.encode(video).chosen(generator))

    def encode(self, video: Tensor, *, tiling: Tiling | None = None) -> LatentDistribution:
        """Video [B, 3, T, H, W] in [-1, 1] -> latent distribution."""
        pieces, config = TemporalTiling(), self.config
        cells = None if tiling is None else tiling.scaled(config.spatial_compression_ratio)
        joining = pieces.scaled(config.temporal_compression_ratio)
        parts, before = [], None
        for frames in (slices := pieces.split(video.shape[2])):
            moments = over_tiles(self._encode_tile, video[:, :, frames], tiling, cells)
            added, before = joining.join_next(moments, before, last=frames is slices[-1])
            parts.append(added)
        return LatentDistribution.of_moments(torch.cat(parts, dim=2))

    def decode(self, latents: Tensor, *, tiling: Tiling | None = None) -> Tensor:
        """Latents [B, Z, t, h, w] -> video [B, 3, T, H, W] in [-1, 1]; of several ranks each gets its strip."""
        pieces = range(len(self.decoder_pieces(latents.shape[2])))
        state = self.new_state(tiling, carry=len(pieces) > 1)
        return torch.cat([self.decode_piece(latents, index, state) for index in pieces], dim=2)

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> PieceState:
        """For a new clip."""
        return PieceState(tiling)

    def decoder_pieces(self, num_frames: int) -> list[slice]:
        """The latent frames of each piece in which a clip of so many is decoded; neighbours overlap."""
        return TemporalTiling().scaled(self.config.temporal_compression_ratio).split(num_frames)

    def decode_piece(self, latents: Tensor, index: int, state: PieceState) -> Tensor:
        """Piece `index` of the whole clip's latents [B, Z, t, h, w] -> its video [B, 3, T, H, W]; pieces in order.

        Of several ranks each gets its strip, of the whole picture or put together from strips of tiles.
        """
        slices, tiling, strips = self.decoder_pieces(latents.shape[2]), state.tiling, self.strips
        if tiling is None:
            piece = strips.over_strip(self._decode_tile, latents[:, :, slices[index]])
        else:
            cells = tiling.scaled(self.config.spatial_compression_ratio)
            decode = partial(strips.over_whole, self._decode_tile)
            piece = strips.own(over_tiles(decode, latents[:, :, slices[index]], cells, tiling), *latents.shape[3:])
        video, state.before = TemporalTiling().join_next(piece, state.before, last=index == len(slices) - 1)
        return video

    def _encode_tile(self, video: Tensor) -> Tensor:
        ratio = self.config.spatial_compression_ratio
        return self.strips.over_whole(self._moments, video, ratio=ratio)

    def _moments(self, video: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(in_order(video)))

    def _decode_tile(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(in_order(latents)))
