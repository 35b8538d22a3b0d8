"""What benchmarks run of a Wan checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.runtime.layers.embedded import Embedded
from sglang.multimodal_gen.runtime.pipelines_core.workload import (
    Drawing,
    Inputs,
    TextEncoding,
    VideoDecoding,
    VideoEncoding,
    Workload,
    WorkSize,
)

_MIDDLE_TIMESTEP = 500.0
_IMAGE_TOKENS = 257
"""Of one picture, as the published image encoder gives them."""


class WanDenoising(Workload):
    """One velocity prediction for each row."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Latents [B, C, T, H, W], timesteps [B], text [B, L, text_dim], and for models with an image encoder its
        tokens [B, I, image_dim], of two pictures [2·B, I, image_dim]."""
        config = configs[self.component]
        assert isinstance(config, WanTransformerConfig), "the component of a Wan pipeline"
        inputs = (
            draw.normal(size.batch_size, config.in_channels, *size.latent_shape[1:]),
            draw.full(_MIDDLE_TIMESTEP, size.batch_size),
            draw.normal(size.batch_size, size.num_text_tokens, config.text_dim),
        )
        if config.image_dim is None:
            return inputs
        num_pictures = 1 if config.pos_embed_seq_len is None else 2
        return (*inputs, draw.normal(num_pictures * size.batch_size, _IMAGE_TOKENS, config.image_dim))

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, C, T, H, W]."""
        latents, timesteps, *conditions = inputs
        num_conditions = 1 if module.config.image_dim is None else 2  # type: ignore[union-attr]
        embedded = Embedded(None, *conditions[num_conditions:])
        return module(latents, timesteps, *conditions[:num_conditions], embedded=embedded)

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload; of images too."""
        return module.embed_text(*inputs[2:])  # type: ignore[operator]

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, C, T, H, W]."""
        return module(*inputs, return_dict=False)[0]


WAN_WORKLOADS: Mapping[str, Workload] = {
    "dit": WanDenoising("transformer"),
    "vae_decode": VideoDecoding("vae"),
    "vae_encode": VideoEncoding("vae"),
    "encoder": TextEncoding("text_encoder"),
}
