"""Video autoencoder of LTX-Video: whole clips, and where memory is short in tiles.

Its decoder may be told how noisy the latents are, and removes what noise there is. Source: arXiv:2501.00103,
https://github.com/Lightricks/LTX-Video. Parameter names are those of the published diffusers checkpoints.

Shapes: B batch, T, H, W video frames, height, width; Z latent channels, t, h, w latent frames, height, width. A clip of
1 + k·(t - 1) frames has t latent frames: the first holds one video frame, each other k (8 as published).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.vaes.ltx import LTXVideoVAEConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.models.vaes.channels_last import settle_convolutions
from sglang.multimodal_gen.runtime.models.vaes.distribution import LatentDistribution
from sglang.multimodal_gen.runtime.models.vaes.ltx_vae_blocks import (
    Blocks,
    Coder,
    EndConv3d,
    FoldedStage,
    StridedStage,
    TimeEmbedder,
    Told,
    Upsample,
    UpStage,
    scale_shifts,
)
from sglang.multimodal_gen.runtime.models.vaes.patches import patchify, unpatchify
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling


class LTXVideoEncoder(nn.Module):
    """Patches of video to the parameters of the latent distribution: [B, 3·p·p, T, H/p, W/p] -> [B, Z + 1, t, h, w],
    the means and one logarithm of a variance for all channels."""

    def __init__(self, config: LTXVideoVAEConfig, strips: StripSharding) -> None:
        super().__init__()
        coder = Coder(config.resnet_norm_eps, config.encoder_causal, strips)
        widths = config.encoder_widths
        self.conv_in = EndConv3d(config.in_channels * config.patch_size**2, widths[0], coder)
        self.down_blocks = nn.ModuleList()
        for (before, after), count, strides in zip(
            pairwise(widths), config.layers_per_block[:-1], config.down_strides, strict=True
        ):
            if config.is_folded:
                assert strides is not None, "as the config checks"
                self.down_blocks.append(FoldedStage(before, after, count, coder, strides=strides))
            else:
                self.down_blocks.append(StridedStage(before, after, count, coder, strides=strides is not None))
        self.mid_block = Blocks(widths[-1], config.layers_per_block[-1], coder)
        self.conv_out = EndConv3d(widths[-1], config.latent_channels + 1, coder)

    def forward(self, frames: Tensor) -> Tensor:
        frames, told = self.conv_in(frames), Told()
        for block in (*self.down_blocks, self.mid_block):
            frames = block(frames, told)
        return self.conv_out.after_norm(frames)


class LTXVideoDecoder(nn.Module):
    """Latents to patches of video: [B, Z, t, h, w] -> [B, 3·p·p, T, H/p, W/p]."""

    def __init__(self, config: LTXVideoVAEConfig, strips: StripSharding) -> None:
        super().__init__()
        coder, is_timed = Coder(config.resnet_norm_eps, config.decoder_causal, strips), config.timestep_conditioning
        mid_count, *counts = reversed(config.decoder_layers_per_block)
        mid_noise, *noises = reversed(config.decoder_inject_noise)
        width = config.decoder_block_out_channels[-1]
        self.conv_in = EndConv3d(config.latent_channels, width, coder)
        self.mid_block = Blocks(width, mid_count, coder, is_timed=is_timed, is_noisy=mid_noise)
        self.up_blocks = nn.ModuleList()
        for (before, after), strides, factor, has_residual, count, is_noisy in zip(
            config.decoder_widths,
            config.up_strides,
            reversed(config.upsample_factor),
            reversed(config.upsample_residual),
            counts,
            noises,
            strict=True,
        ):
            upsample = None
            if strides is not None:
                upsample = Upsample(after * factor, coder, factor=factor, has_residual=has_residual)
            self.up_blocks.append(
                UpStage(before, after, count, coder, upsample=upsample, is_timed=is_timed, is_noisy=is_noisy)
            )
            width = after
        self.conv_out = EndConv3d(width, config.out_channels * config.patch_size**2, coder)
        self.timestep_scale_multiplier = self.time_embedder = self.scale_shift_table = None
        if is_timed:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.time_embedder = TimeEmbedder(2 * width)
            self.scale_shift_table = nn.Parameter(torch.zeros(2, width))

    def forward(self, latents: Tensor, told: Told) -> Tensor:
        if self.timestep_scale_multiplier is not None:
            assert told.timesteps is not None, "a decoder with timestep_conditioning is told a timestep"
            timesteps = told.timesteps.float().expand(latents.shape[0]) * self.timestep_scale_multiplier.float()
            told = Told(timesteps, told.generator)
        frames = self.conv_in(latents)
        for block in (self.mid_block, *self.up_blocks):
            frames = block(frames, told)
        modulation = None
        if self.time_embedder is not None and self.scale_shift_table is not None:
            [modulation] = scale_shifts(self.time_embedder(told), self.scale_shift_table)
        return self.conv_out.after_norm(frames, modulation)


@dataclass(frozen=True)
class LTXClip:
    """What decoding a clip depends on beside its latents; a clip is decoded at once, so that nothing is remembered.

    `timesteps` [1] or [B]: how noisy the latents are, from 0 to 1, for a decoder that is told. `seed`: of the random
    numbers of a decoder that draws some.
    """

    tiling: Tiling | None = None
    timesteps: Tensor | None = None
    seed: int | None = None


class AutoencoderKLLTXVideo(nn.Module):
    """Encodes video in [-1, 1] to latents and back."""

    keep_in_fp32: ClassVar[tuple[str, ...]] = ("latents_mean", "latents_std", "timestep_scale_multiplier")
    decodes_whole_clips: ClassVar[bool] = True
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: LTXVideoVAEConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        strips = LayerContext().strips if context is None else context.strips
        if config.injects_noise and strips.axis.size > 1:
            strips = StripSharding(why_whole="its decoder draws random numbers for the whole picture")
        self.config = config
        self.strips = strips
        self.encoder = LTXVideoEncoder(config, strips)
        self.decoder = LTXVideoDecoder(config, strips)
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))

    @property
    def dtype(self) -> torch.dtype:
        """Of what encoder and decoder take."""
        return self.decoder.conv_in.conv.weight.dtype

    def settle_weights(self) -> None:
        """See `load_module`."""
        settle_convolutions(self)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents [B, Z, t, h, w] of the encoder -> what the transformer works on, in fp32."""
        return (latents.float() - self._per_channel(self.latents_mean, latents)) / self._per_channel(
            self.latents_std, latents
        )

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`; `decode` takes its result."""
        return latents.float() * self._per_channel(self.latents_std, latents) + self._per_channel(
            self.latents_mean, latents
        )

    def to_latents(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] -> latents [B, Z, t, h, w] as the transformer has them.

        The most likely ones, or with a generator of the CPU a sample.
        """
        return self.normalise(self.encode(video).chosen(generator))

    def encode(self, video: Tensor) -> LatentDistribution:
        """Video [B, 3, T, H, W] in [-1, 1] -> latent distribution.

        Raises:
            InvalidRequest: T is not 1 + a multiple of the temporal ratio, or H or W not a multiple of the spatial one.
        """
        self._check_video(video)
        patches = patchify(video, self.config.patch_size).contiguous(memory_format=torch.channels_last_3d)
        ratio = self.config.spatial_ratio // self.config.patch_size
        found = self.strips.over_whole(self.encoder, patches, ratio=ratio)
        mean, logvar = found[:, :-1], found[:, -1:]
        return LatentDistribution(mean, logvar.clamp(-30.0, 20.0).expand_as(mean))

    def decode(
        self,
        latents: Tensor,
        timesteps: Tensor | None = None,
        *,
        tiling: Tiling | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Latents [B, Z, t, h, w] -> video [B, 3, T, H, W] in about [-1, 1]. See LTXClip for what else is told."""
        return self.decode_next(latents, LTXClip(tiling, timesteps, seed))

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> LTXClip:
        """For a new clip."""
        assert not carry, "such an autoencoder is given whole clips"
        return LTXClip(tiling)

    def decode_next(self, latents: Tensor, state: LTXClip) -> Tensor:
        """The whole clip [B, Z, t, h, w] of the decoder -> [B, 3, T, H, W] in about [-1, 1].

        Of several ranks each gets its strip, of the whole picture or put together from strips of tiles.
        """
        generator = None
        if self.config.injects_noise and state.seed is not None:
            # On the decoder's device, as torch's own generator would be with this seed.
            generator = torch.Generator(latents.device).manual_seed(state.seed)
        decode = partial(self._decode_tile, told=Told(state.timesteps, generator))
        if state.tiling is None:
            return self.strips.over_strip(decode, latents)
        (height, width), ratio = latents.shape[-2:], self.config.spatial_ratio
        tiles = [
            self.strips.over_whole(decode, latents[..., rows, columns])
            for rows, columns in state.tiling.scaled(ratio).split(height, width)
        ]
        return self.strips.own(state.tiling.join(tiles, height * ratio, width * ratio), height, width)

    def _decode_tile(self, latents: Tensor, told: Told) -> Tensor:
        patches = self.decoder(latents.contiguous(memory_format=torch.channels_last_3d), told)
        return unpatchify(patches, self.config.patch_size)

    def _check_video(self, video: Tensor) -> None:
        num_frames, height, width = video.shape[2:]
        config = self.config
        if (num_frames - 1) % config.temporal_ratio:
            raise InvalidRequest(
                f"a clip of {num_frames} frames cannot be encoded; the autoencoder takes 1 plus a multiple of "
                f"{config.temporal_ratio}",
                param="num_frames",
            )
        if height % config.spatial_ratio or width % config.spatial_ratio:
            raise InvalidRequest(
                f"{height}x{width} pixels cannot be encoded; the autoencoder takes multiples of {config.spatial_ratio}",
                param="height" if height % config.spatial_ratio else "width",
            )

    @staticmethod
    def _per_channel(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device, torch.float32).view(-1, 1, 1, 1)
