"""`PicturePipelineBase`: what families with an AutoencoderKL have in common."""

from __future__ import annotations

from typing import Any

from sglang.multimodal_gen.runtime.models.vaes.library_vae import LibraryAutoencoder
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import InitialImageStage


class PicturePipelineBase(ComposedPipelineBase):
    """A pipeline whose component `vae` is an AutoencoderKL."""

    vae: Any

    def autoencoder(self) -> LibraryAutoencoder:
        """The autoencoder, as the stages use it."""
        return LibraryAutoencoder.of_scaled_pictures(self.vae)

    def decoder_memory(self) -> DecoderMemory:
        """What it takes for one picture, in either direction."""
        return DecoderMemory.of_pictures(self.vae.config, self.autoencoder().dtype.itemsize)

    def initial_image(self, *, default_strength: float = 0.6) -> InitialImageStage:
        """A picture to start from."""
        autoencoder = self.autoencoder()
        return InitialImageStage(
            autoencoder,
            memory=self.decoder_memory(),
            device=self.device,
            dtype=autoencoder.dtype,
            samples=True,
            default_strength=default_strength,
        )

    def decoding(self, geometry: VideoGeometry) -> DecodingStage:
        """Latents to pixels."""
        autoencoder = self.autoencoder()
        return DecodingStage(
            autoencoder,
            geometry=geometry,
            memory=self.decoder_memory(),
            free_bytes=self.free_bytes,
            dtype=autoencoder.dtype,
        )
