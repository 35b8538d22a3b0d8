"""Causal video autoencoder of Wan 2.1 and 2.2: whole clips, chunk by chunk, and in tiles.

Source: arXiv:2503.20314, https://github.com/Wan-Video/Wan2.1. Parameter names are those of the published diffusers
checkpoints.

Shapes: B batch, T, H, W video frames, height, width; Z latent channels, t, h, w latent frames, height, width. A clip of
1 + k·(t - 1) frames has t latent frames: the first holds one video frame, each other k (4 as published).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import CausalConv3d, TemporalState
from sglang.multimodal_gen.runtime.models.vaes.channels_last import settle_convolutions
from sglang.multimodal_gen.runtime.models.vaes.distribution import LatentDistribution
from sglang.multimodal_gen.runtime.models.vaes.patches import patchify, unpatchify
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.models.vaes.wan_vae_coders import WanDecoder, WanEncoder


class DecoderState:
    """One request's progress through its clip: what the causal layers remember, for each tile."""

    def __init__(self, tiling: Tiling | None = None, *, carry: bool = True) -> None:
        self.tiling = tiling
        self._carry = carry
        self._tiles: dict[int, TemporalState] = {}

    def tile(self, index: int) -> TemporalState:
        return self._tiles.setdefault(index, TemporalState(carry=self._carry))

    def num_bytes(self) -> int:
        """Memory held between chunks."""
        return sum(tile.num_bytes() for tile in self._tiles.values())


class AutoencoderKLWan(nn.Module):
    """Encodes video in [-1, 1] to latents and back. All chunkings of a clip give the same result."""

    keep_in_fp32: ClassVar[tuple[str, ...]] = ()
    decodes_whole_clips: ClassVar[bool] = False

    def __init__(self, config: WanVAEConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.encoder = WanEncoder(config, context)
        self.strips = context.strips
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1, strips=self.strips)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1, strips=self.strips)
        self.decoder = WanDecoder(config, context)

    def settle_weights(self) -> None:
        """See `load_module`."""
        settle_convolutions(self)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents [B, Z, t, h, w] of the encoder -> what the transformer works on."""
        return (latents - self._per_channel(self.config.latents_mean, latents)) / self._per_channel(
            self.config.latents_std, latents
        )

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`; `decode` takes its result."""
        return latents * self._per_channel(self.config.latents_std, latents) + self._per_channel(
            self.config.latents_mean, latents
        )

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> DecoderState:
        """For a new clip; without `carry` its first chunk is all there is."""
        return DecoderState(tiling, carry=carry)

    def to_latents(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] -> latents [B, Z, t, h, w] as the transformer has them.

        The most likely ones, or with a generator of the CPU a sample.
        """
        return self.normalise(self.encode(video).chosen(generator))

    def encode(
        self, video: Tensor, *, chunk_frames: int | None = None, tiling: Tiling | None = None
    ) -> LatentDistribution:
        """Video [B, 3, T, H, W] in [-1, 1] -> latent distribution, `chunk_frames` latent frames at a time (None: all).

        Raises:
            InvalidRequest: T is not 1 + a multiple of the temporal ratio, or H or W not a multiple of the spatial one.
        """
        self._check_video(video)
        patches = patchify(video, self.config.patch_size or 1)
        if tiling is None:
            moments = self._encode_tile(patches, chunk_frames)
        else:
            # Tiles of the encoder are counted in its own input cells.
            ratio = 2 ** len(self.config.temperal_downsample)
            height, width = patches.shape[3:]
            tiles = [
                self._encode_tile(patches[..., rows, columns], chunk_frames)
                for rows, columns in tiling.split(height, width)
            ]
            moments = tiling.scaled(ratio).join(tiles, height // ratio, width // ratio)
        return LatentDistribution.of_moments(moments)

    def encode_next(self, video: Tensor, state: TemporalState) -> LatentDistribution:
        """The next frames [B, 3, T, H, W] of the clip -> the distribution of their latent frames.

        T is k·t, or 1 + k·(t - 1) at the start of the clip. A new clip wants a new `TemporalState(carry=True)`.
        """
        moments = self._of_strips(partial(self._moments, state=state), patchify(video, self.config.patch_size or 1))
        return LatentDistribution.of_moments(moments)

    def decode(self, latents: Tensor, *, chunk_frames: int | None = None, tiling: Tiling | None = None) -> Tensor:
        """Latents [B, Z, t, h, w] -> video [B, 3, T, H, W] in [-1, 1], `chunk_frames` latent frames at a time.

        Of several ranks each gets its strip.
        """
        return torch.cat(list(self.decode_chunks(latents, chunk_frames=chunk_frames, tiling=tiling)), dim=2)

    def decode_chunks(
        self, latents: Tensor, *, chunk_frames: int | None = None, tiling: Tiling | None = None
    ) -> Iterator[Tensor]:
        """As `decode`, but each chunk's video leaves as soon as it is there."""
        chunks = latents.split(latents.shape[2] if chunk_frames is None else chunk_frames, dim=2)
        state = DecoderState(tiling, carry=len(chunks) > 1)
        for chunk in chunks:
            yield self.decode_next(chunk, state)

    def decode_next(self, latents: Tensor, state: DecoderState) -> Tensor:
        """The next latent frames [B, Z, t, h, w] of the clip -> their video [B, 3, T, H, W] in [-1, 1].

        T is k·t, or 1 + k·(t - 1) at the start of the clip. A new clip wants a new `DecoderState()`. Of several ranks
        each gets its strip, of the whole picture or put together from strips of tiles.
        """
        if state.tiling is None:
            patches = self.strips.over_strip(partial(self.decode_tile, state=state.tile(0)), latents)
            return self.join_tiles([patches], latents, None)
        tiles = [
            self.strips.over_whole(partial(self.decode_tile, state=state.tile(index)), latents[..., rows, columns])
            for index, (rows, columns) in enumerate(self.decoder_tiles(latents, state.tiling))
        ]
        return self.strips.own(self.join_tiles(tiles, latents, state.tiling), *latents.shape[3:])

    def decoder_tiles(self, latents: Tensor, tiling: Tiling) -> list[tuple[slice, slice]]:
        """Rows and columns of latents that `decode_tile` takes one after the other."""
        return tiling.scaled(self.config.spatial_ratio).split(*latents.shape[3:])

    def decode_tile(self, latents: Tensor, state: TemporalState) -> Tensor:
        """One tile's next latent frames -> patches of video [B, 3·p·p, T, H/p, W/p], not yet clamped."""
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
        patches = self.decoder(self.post_quant_conv(latents, state), state)
        state.advance()
        return patches

    def join_tiles(self, tiles: list[Tensor], latents: Tensor, tiling: Tiling | None) -> Tensor:
        """All tiles of one chunk -> its video [B, 3, T, H, W] in [-1, 1]."""
        patch_size = self.config.patch_size or 1
        patches = tiles[0]
        if tiling is not None:
            cells = self.config.spatial_ratio // patch_size
            height, width = (cells * side for side in latents.shape[3:])
            patches = tiling.scaled(patch_size).join(tiles, height, width)
        return unpatchify(patches, patch_size).clamp(-1.0, 1.0)

    def _encode_tile(self, patches: Tensor, chunk_frames: int | None) -> Tensor:
        num_frames, ratio = patches.shape[2], self.config.temporal_ratio
        step = num_frames if chunk_frames is None else chunk_frames * ratio
        # The first latent frame takes one video frame, so every chunk ends one frame after a multiple of the ratio.
        ends = [*range(step - ratio + 1, num_frames, step), num_frames] if chunk_frames else [num_frames]
        state = TemporalState(carry=len(ends) > 1)
        chunks = (patches[:, :, start:end] for start, end in zip([0, *ends], ends, strict=False))
        return torch.cat([self._of_strips(partial(self._moments, state=state), chunk) for chunk in chunks], dim=2)

    def _of_strips(self, network: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """The encoder over this rank's strip, and what all ranks' strips gave."""
        return self.strips.over_whole(network, patches, ratio=2 ** len(self.config.temperal_downsample))

    def _moments(self, patches: Tensor, state: TemporalState) -> Tensor:
        patches = patches.contiguous(memory_format=torch.channels_last_3d)
        moments = self.quant_conv(self.encoder(patches, state), state)
        state.advance()
        return moments

    def _check_video(self, video: Tensor) -> None:
        num_frames, height, width = video.shape[2:]
        if (num_frames - 1) % self.config.temporal_ratio:
            raise InvalidRequest(
                f"a clip of {num_frames} frames cannot be encoded; the autoencoder takes 1 plus a multiple of "
                f"{self.config.temporal_ratio}",
                param="num_frames",
            )
        if height % self.config.spatial_ratio or width % self.config.spatial_ratio:
            raise InvalidRequest(
                f"{height}x{width} pixels cannot be encoded; the autoencoder takes multiples of "
                f"{self.config.spatial_ratio}",
                param="height" if height % self.config.spatial_ratio else "width",
            )

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
