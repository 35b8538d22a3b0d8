"""What benchmarks run of a HunyuanVideo checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.hunyuan_video import TOKEN_REPLACE, HunyuanVideoTransformerConfig
from sglang.multimodal_gen.runtime.layers.embedded import Embedded
from sglang.multimodal_gen.runtime.pipelines_core.workload import (
    Drawing,
    Inputs,
    WholeDecoding,
    WholeEncoding,
    Workload,
    WorkSize,
)

_MIDDLE_TIMESTEP = 500.0
_GUIDANCE = 6000.0


class HunyuanVideoDenoising(Workload):
    """One velocity prediction for each row."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Latents [B, C, T, H, W], timesteps [B], text [B, L, text_embed_dim], pooled text [B, P], guidance [B]."""
        config = configs[self.component]
        assert isinstance(config, HunyuanVideoTransformerConfig), "the component of a HunyuanVideo pipeline"
        return (
            draw.normal(size.batch_size, config.in_channels, *size.latent_shape[1:]),
            draw.full(_MIDDLE_TIMESTEP, size.batch_size),
            draw.normal(size.batch_size, size.num_text_tokens, config.text_embed_dim),
            draw.normal(size.batch_size, config.pooled_projection_dim),
            draw.full(_GUIDANCE, size.batch_size),
        )

    def embed_steps(self, module: nn.Module, inputs: Inputs) -> Tensor | None:
        """See Workload; None for a transformer that is given the first frame."""
        if module.config.image_condition_type == TOKEN_REPLACE:  # type: ignore[union-attr]
            return None
        _, timesteps, _, pooled, guidance = inputs
        return module.embed_steps(timesteps, pooled, guidance)  # type: ignore[operator]

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_text(inputs[2])  # type: ignore[operator]

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, C, T, H, W]."""
        latents, timesteps, text, pooled, guidance, *embedded = inputs
        lengths = [size.num_text_tokens] * size.batch_size
        given = Embedded(text=embedded[0]) if len(embedded) == 1 else Embedded(*embedded)
        return module(latents, timesteps, text, lengths, pooled, guidance, given)

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, C, T, H, W]."""
        latents, timesteps, text, pooled, guidance = inputs
        mask = torch.ones(text.shape[:2], device=text.device, dtype=text.dtype)
        return module(latents, timesteps, text, mask, pooled, guidance, return_dict=False)[0]


HUNYUAN_VIDEO_WORKLOADS: Mapping[str, Workload] = {
    "dit": HunyuanVideoDenoising("transformer"),
    "vae_decode": WholeDecoding("vae"),
    "vae_encode": WholeEncoding("vae"),
}
