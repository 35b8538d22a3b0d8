"""Encoder and decoder of the Wan autoencoder, 2.1 and (`is_residual`) 2.2.

Source: arXiv:2503.20314, https://github.com/Wan-Video/Wan2.2.

Shapes: B batch, C channels, T, H, W video frames, height and width in patches; t, h, w latent ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.fused_frames import sum_frames
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import CausalConv3d, ChannelRMSNorm, TemporalState
from sglang.multimodal_gen.runtime.models.vaes.wan_vae_blocks import (
    AverageDown,
    Downsample,
    DuplicateUp,
    MidBlock,
    ResidualBlock,
    Upsample,
)


def residual_blocks(
    in_channels: int, out_channels: int, count: int, dropout: float, strips: StripSharding
) -> list[nn.Module]:
    """`count` blocks, of which the first changes the number of channels."""
    widths = [in_channels] + [out_channels] * count
    return [ResidualBlock(before, after, dropout, strips) for before, after in pairwise(widths)]


class ShortcutDownStage(nn.Module):
    """One resolution of the Wan 2.2 encoder: residual blocks and downsampling beside an averaging shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: WanVAEConfig,
        downsample: bool | None,
        strips: StripSharding,
    ) -> None:
        super().__init__()
        self.avg_shortcut = AverageDown(
            out_channels, time_factor=2 if downsample else 1, space_factor=1 if downsample is None else 2
        )
        self.resnets = nn.ModuleList(
            residual_blocks(in_channels, out_channels, config.num_res_blocks, config.dropout, strips)
        )
        self.downsampler = None
        if downsample is not None:
            self.downsampler = Downsample(out_channels, temporal=downsample, strips=strips)

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:
        shortcut = self.avg_shortcut(frames)
        for block in self.resnets:
            frames = block(frames, state)
        if self.downsampler is not None:
            frames = self.downsampler(frames, state)
        return frames + shortcut


class UpStage(nn.Module):
    """One resolution of the Wan 2.1 decoder; the upsampling also halves the channels."""

    def __init__(
        self, in_channels: int, out_channels: int, config: WanVAEConfig, upsample: bool | None, strips: StripSharding
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            residual_blocks(in_channels, out_channels, config.num_res_blocks + 1, config.dropout, strips)
        )
        self.upsamplers = nn.ModuleList()
        if upsample is not None:
            self.upsamplers.append(Upsample(out_channels, out_channels // 2, temporal=upsample, strips=strips))

    def layers(self) -> Iterator[ResidualBlock | Upsample]:
        """In the order in which frames pass through them."""
        yield from (*self.resnets, *self.upsamplers)  # type: ignore[misc]


class ShortcutUpStage(nn.Module):
    """One resolution of the Wan 2.2 decoder: residual blocks and upsampling beside a duplicating shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, config: WanVAEConfig, upsample: bool | None, strips: StripSharding
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            residual_blocks(in_channels, out_channels, config.num_res_blocks + 1, config.dropout, strips)
        )
        self.avg_shortcut: DuplicateUp | None = None
        self.upsampler: Upsample | None = None
        if upsample is not None:
            time_factor = 2 if upsample else 1
            self.avg_shortcut = DuplicateUp(in_channels, out_channels, time_factor=time_factor, space_factor=2)
            self.upsampler = Upsample(out_channels, out_channels, temporal=upsample, strips=strips)

    def layers(self) -> Iterator[ShortcutUpStage]:
        """The stage as a whole."""
        yield self

    def through(self, frames: Tensor, state: TemporalState, bias: None) -> tuple[Tensor, None]:
        """As `ResidualBlock.through`, behind another of its kind."""
        start = frames
        for block in self.resnets:
            frames = block(frames, state)
        if self.upsampler is None or self.avg_shortcut is None:
            return frames, None
        frames, added = self.upsampler(frames, state)
        return sum_frames(frames, self.avg_shortcut(start, state), bias=added), None


class WanEncoder(nn.Module):
    """Video to the parameters of the latent distribution: [B, C, T, H, W] -> [B, 2·z_dim, t, h, w]."""

    def __init__(self, config: WanVAEConfig, context: LayerContext) -> None:
        super().__init__()
        widths, strips = [config.base_dim * multiple for multiple in (1, *config.dim_mult)], context.strips
        self.conv_in = CausalConv3d(config.in_channels, widths[0], 3, strips=strips)
        self.down_blocks = nn.ModuleList()
        # After each resolution but the last: downsampling, in time as well where True.
        for (before, after), downsample in zip(pairwise(widths), (*config.temperal_downsample, None), strict=True):
            if config.is_residual:
                self.down_blocks.append(ShortcutDownStage(before, after, config, downsample, strips))
                continue
            self.down_blocks.extend(residual_blocks(before, after, config.num_res_blocks, config.dropout, strips))
            if downsample is not None:
                self.down_blocks.append(Downsample(after, temporal=downsample, strips=strips))
        self.mid_block = MidBlock(widths[-1], config.dropout, context)
        self.norm_out = ChannelRMSNorm(widths[-1], num_trailing=3)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, 3, strips=strips)

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:
        frames = self.conv_in(frames, state)
        for block in (*self.down_blocks, self.mid_block):
            frames = block(frames, state)
        return self.conv_out.after(self.norm_out, frames, state)


class WanDecoder(nn.Module):
    """Latents to video: [B, z_dim, t, h, w] -> [B, C, T, H, W]."""

    def __init__(self, config: WanVAEConfig, context: LayerContext) -> None:
        super().__init__()
        base = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        strips = context.strips
        widths = [base * multiple for multiple in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], 3, strips=strips)
        self.mid_block = MidBlock(widths[0], config.dropout, context)
        self.up_blocks = nn.ModuleList()
        upsampling = (*reversed(config.temperal_downsample), None)
        for index, ((before, after), upsample) in enumerate(zip(pairwise(widths), upsampling, strict=True)):
            if config.is_residual:
                self.up_blocks.append(ShortcutUpStage(before, after, config, upsample, strips))
            else:
                self.up_blocks.append(UpStage(before // 2 if index else before, after, config, upsample, strips))
        self.norm_out = ChannelRMSNorm(widths[-1], num_trailing=3)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, 3, strips=strips)

    def forward(self, frames: Tensor, state: TemporalState) -> Tensor:
        frames, bias = self.mid_block(self.conv_in(frames, state), state), None
        # Layer by layer, so that nobody holds what came before: at full size that is a fifth of the peak.
        for layer in (layer for stage in self.up_blocks for layer in stage.layers()):  # type: ignore[operator]
            frames, bias = layer.through(frames, state, bias)
        return self.conv_out.after(self.norm_out, frames, state)
