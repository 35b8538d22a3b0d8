"""What benchmarks run of a Z-Image checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.zimage import ZImageTransformerConfig
from sglang.multimodal_gen.runtime.layers.embedded import Embedded
from sglang.multimodal_gen.runtime.pipelines_core.workload import (
    Drawing,
    Inputs,
    PictureDecoding,
    PictureEncoding,
    Workload,
    WorkSize,
)

_MIDDLE_TIME = 0.5


class ZImageDenoising(Workload):
    """One velocity prediction for each row; every caption is as long as the size says."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Latents [B, C, 1, H, W], times [B], captions [B, L, cap_feat_dim]."""
        config = configs[self.component]
        assert isinstance(config, ZImageTransformerConfig), "the component of a Z-Image pipeline"
        return (
            draw.normal(size.batch_size, *size.latent_shape),
            draw.full(_MIDDLE_TIME, size.batch_size),
            draw.normal(size.batch_size, size.num_text_tokens, config.cap_feat_dim),
        )

    def embed_steps(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_steps(inputs[1])  # type: ignore[operator]

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_text(inputs[2], _lengths(inputs[2]))  # type: ignore[operator]

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, C, 1, H, W]."""
        latents, times, captions, *embedded = inputs
        return module(latents, times, captions, _lengths(captions), Embedded(*embedded))

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, C, 1, H, W]."""
        latents, times, captions = inputs
        return torch.stack(module(list(latents), times, list(captions), return_dict=False)[0])


def _lengths(captions: Tensor) -> list[int]:
    return [captions.shape[1]] * captions.shape[0]


Z_IMAGE_WORKLOADS: Mapping[str, Workload] = {
    "dit": ZImageDenoising("transformer"),
    "vae_decode": PictureDecoding("vae"),
    "vae_encode": PictureEncoding("vae"),
}
