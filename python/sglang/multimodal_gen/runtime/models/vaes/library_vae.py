"""Autoencoders of the diffusers library behind the interface of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling


@dataclass(frozen=True)
class WholeClip:
    """A clip that is decoded at once has nothing to remember but how it is cut into tiles.

    `arguments`: what the library's decoder is told besides the latents of a tile.
    """

    tiling: Tiling | None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class LibraryAutoencoder:
    """A diffusers autoencoder of pictures or clips, with latents [B, C, T, h, w] on the transformer's side.

    `mean` and `std` say where the decoder's latents lie, in all or by channel: scaled ones have mean `shift_factor` and
    std 1 / `scaling_factor`. `is_video` False: the library's class takes [B, C, H, W], and T is 1.
    """

    decodes_whole_clips: ClassVar[bool] = True

    def __init__(
        self,
        vae: Any,
        *,
        mean: float | Sequence[float] | Tensor = 0.0,
        std: float | Sequence[float] | Tensor = 1.0,
        spatial_ratio: int,
        is_video: bool,
    ) -> None:
        self.vae = vae
        self.strips: StripSharding = getattr(vae, "strips", None) or StripSharding()
        self.dtype, self.device = next(vae.parameters()).dtype, compute_device(vae)
        self.mean, self.std = (torch.as_tensor(value).float().reshape(-1, 1, 1, 1) for value in (mean, std))
        self.spatial_ratio = spatial_ratio
        self.is_video = is_video

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> WholeClip:
        """For a new clip."""
        assert not carry, "such an autoencoder is given whole clips"
        return WholeClip(tiling)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of the encoder -> what the transformer works on."""
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents * self.std.to(latents) + self.mean.to(latents)

    def to_latents(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> latents [B, C, t, h, w] as the transformer has them.

        The most likely ones, or with a generator of the CPU a sample.
        """
        video = video.to(self.device, self.dtype)
        distribution = self._distribution(video if self.is_video else video.squeeze(2))
        latents = distribution.mode() if generator is None else distribution.sample(generator)
        return self.normalise(latents if self.is_video else latents.unsqueeze(2))

    def _distribution(self, pixels: Tensor) -> Any:
        """The library's, of the parameters that all ranks' strips have together."""
        kinds = []

        def parameters(strip: Tensor) -> Tensor:
            found: Any = self.vae.encode(strip).latent_dist
            kinds.append(type(found))
            return found.parameters

        whole = self.strips.over_whole(parameters, pixels, ratio=self.spatial_ratio)
        return kinds[0](whole)

    def decode_next(self, latents: Tensor, state: WholeClip) -> Tensor:
        """The whole clip [B, C, t, h, w] of the decoder -> [B, 3, T, H, W] in about [-1, 1].

        Of several ranks each gets its strip, of the whole picture or put together from strips of tiles.
        """
        decode = partial(self.decode, arguments=state.arguments)
        if state.tiling is None:
            return self.strips.over_strip(decode, latents)
        height, width = latents.shape[-2:]
        tiling = state.tiling.scaled(self.spatial_ratio)
        tiles = [
            self.strips.over_whole(decode, latents[..., rows, columns]) for rows, columns in tiling.split(height, width)
        ]
        joined = state.tiling.join(tiles, height * self.spatial_ratio, width * self.spatial_ratio)
        return self.strips.own(joined, height, width)

    def decode(self, latents: Tensor, arguments: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        """One tile, or all: [B, C, t, h, w] -> [B, 3, T, H, W]."""
        if self.is_video:
            return self.vae.decode(latents, **arguments, return_dict=False)[0]
        return self.vae.decode(latents.squeeze(2), **arguments, return_dict=False)[0].unsqueeze(2)
