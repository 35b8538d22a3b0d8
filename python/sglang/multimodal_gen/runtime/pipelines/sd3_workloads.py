"""What benchmarks run of a Stable Diffusion 3 checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.sd3 import CLIP_TOKENS, SD3TransformerConfig
from sglang.multimodal_gen.runtime.layers.embedded import Embedded
from sglang.multimodal_gen.runtime.pipelines_core.workload import (
    Drawing,
    Inputs,
    PictureDecoding,
    PictureEncoding,
    TextEncoding,
    Workload,
    WorkSize,
)

_MIDDLE_TIMESTEP = 500.0


class SD3Denoising(Workload):
    """One velocity prediction for each row."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Latents [B, C, H, W], timesteps [B], text [B, L, D_text], pooled [B, P]."""
        config = configs[self.component]
        assert isinstance(config, SD3TransformerConfig), "the component of such a pipeline"
        channels, _, height, width = size.latent_shape
        return (
            draw.normal(size.batch_size, channels, height, width),
            draw.full(_MIDDLE_TIMESTEP, size.batch_size),
            draw.normal(size.batch_size, CLIP_TOKENS + size.num_text_tokens, config.joint_attention_dim),
            draw.normal(size.batch_size, config.pooled_projection_dim),
        )

    def embed_steps(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        _, timesteps, _, pooled = inputs
        return module.embed_steps(timesteps, pooled)  # type: ignore[operator]

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_text(inputs[2])  # type: ignore[operator]

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, C, H, W]."""
        latents, timesteps, text, pooled, *embedded = inputs
        return module(latents, timesteps, text, pooled, (), Embedded(*embedded))

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, C, H, W]."""
        latents, timesteps, text, pooled = inputs
        return module(latents, text, pooled, timesteps, return_dict=False)[0]


SD3_WORKLOADS: Mapping[str, Workload] = {
    "dit": SD3Denoising("transformer"),
    "vae_decode": PictureDecoding("vae"),
    "vae_encode": PictureEncoding("vae"),
    "encoder": TextEncoding("text_encoder_3"),
}
