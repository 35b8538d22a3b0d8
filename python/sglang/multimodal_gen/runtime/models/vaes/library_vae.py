"""Autoencoders of the diffusers library behind the interface of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling


@dataclass(frozen=True)
class WholePicture:
    """What is decoded at once has nothing to remember but how it is cut into tiles."""

    tiling: Tiling | None


class LibraryAutoencoder:
    """A diffusers autoencoder of pictures, with latents [B, C, 1, h, w] on the transformer's side.

    `mean` and `std` say where the decoder's latents lie: scaled ones have mean `shift_factor` and std
    1 / `scaling_factor`.
    """

    decodes_whole_clips: ClassVar[bool] = True

    def __init__(self, vae: Any, *, mean: float, std: float, spatial_ratio: int) -> None:
        self.vae = vae
        self.strips: StripSharding = getattr(vae, "strips", None) or StripSharding()
        self.dtype, self.device = next(vae.parameters()).dtype, compute_device(vae)
        self.mean, self.std = (torch.as_tensor(value).float().reshape(-1, 1, 1, 1) for value in (mean, std))
        self.spatial_ratio = spatial_ratio

    @classmethod
    def of_scaled_pictures(cls, vae: Any) -> LibraryAutoencoder:
        """An AutoencoderKL with its config's `scaling_factor` and `shift_factor`."""
        config: Any = vae.config
        return cls(
            vae,
            mean=config.shift_factor or 0.0,
            std=1 / config.scaling_factor,
            spatial_ratio=spatial_ratio_of(config),
        )

    def new_state(self, tiling: Tiling | None, *, carry: bool) -> WholePicture:
        """For a new clip."""
        assert not carry, "such an autoencoder is given whole pictures"
        return WholePicture(tiling)

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
        distribution = self._distribution(video.squeeze(2))
        latents = distribution.mode() if generator is None else distribution.sample(generator)
        return self.normalise(latents.unsqueeze(2))

    def _distribution(self, pixels: Tensor) -> Any:
        """The library's, of the parameters that all ranks' strips have together."""
        kinds = []

        def parameters(strip: Tensor) -> Tensor:
            found: Any = self.vae.encode(strip).latent_dist
            kinds.append(type(found))
            return found.parameters

        whole = self.strips.over_whole(parameters, pixels, ratio=self.spatial_ratio)
        return kinds[0](whole)

    def decode_next(self, latents: Tensor, state: WholePicture) -> Tensor:
        """The decoder's latents [B, C, 1, h, w] -> [B, 3, 1, H, W] in about [-1, 1].

        Of several ranks each gets its strip, of the whole picture or put together from strips of tiles.
        """
        if state.tiling is None:
            return self.strips.over_strip(self.decode, latents)
        height, width = latents.shape[-2:]
        tiling = state.tiling.scaled(self.spatial_ratio)
        tiles = [
            self.strips.over_whole(self.decode, latents[..., rows, columns])
            for rows, columns in tiling.split(height, width)
        ]
        joined = state.tiling.join(tiles, height * self.spatial_ratio, width * self.spatial_ratio)
        return self.strips.own(joined, height, width)

    def decode(self, latents: Tensor) -> Tensor:
        """One tile, or all: [B, C, 1, h, w] -> [B, 3, 1, H, W]."""
        return self.vae.decode(latents.squeeze(2), return_dict=False)[0].unsqueeze(2)


def spatial_ratio_of(config: Any) -> int:
    """Pixels per latent cell along each side, for an AutoencoderKL."""
    return 2 ** (len(config.block_out_channels) - 1)
