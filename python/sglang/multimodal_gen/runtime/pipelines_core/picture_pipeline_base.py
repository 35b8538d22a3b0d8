"""`PicturePipelineBase`: what families with an AutoencoderKL have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.vaes.autoencoder_kl import AutoencoderKLConfig
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl import AutoencoderKL
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.geometry import VideoGeometry
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.initial_image import InitialImageStage


class PicturePipelineBase(ComposedPipelineBase):
    """A pipeline whose component `vae` is an AutoencoderKL."""

    reference_fits_latents: ClassVar[bool] = False
    vae: AutoencoderKL

    @classmethod
    def vae_config(cls, configs: Mapping[str, ModelConfig]) -> AutoencoderKLConfig:
        """The autoencoder's, of those of all native components."""
        config = configs["vae"]
        assert isinstance(config, AutoencoderKLConfig), "as `components` says"
        return config

    @classmethod
    def decoder_memory_of(cls, configs: Mapping[str, ModelConfig], element_size: int) -> DecoderMemory:
        return DecoderMemory.of_pictures(cls.vae_config(configs).block_out_channels, element_size)

    def decoder_memory(self) -> DecoderMemory:
        """What it takes for one picture, in either direction."""
        return self.decoder_memory_of({"vae": self.vae.config}, self.vae.dtype.itemsize)

    def initial_image(self, *, default_strength: float = 0.6) -> InitialImageStage:
        """A picture to start from."""
        return InitialImageStage(
            self.vae,
            memory=self.decoder_memory(),
            device=self.device,
            dtype=self.vae.dtype,
            samples=True,
            default_strength=default_strength,
        )

    def decoding(self, geometry: VideoGeometry) -> DecodingStage:
        """Latents to pixels."""
        return DecodingStage(
            self.vae,
            geometry=geometry,
            memory=self.decoder_memory(),
            free_bytes=self.free_bytes,
            dtype=self.vae.dtype,
        )
