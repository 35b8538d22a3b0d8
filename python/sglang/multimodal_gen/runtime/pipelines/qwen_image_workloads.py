"""What benchmarks run of a Qwen-Image checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.runtime.layers.embedded import Embedded
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import pack
from sglang.multimodal_gen.runtime.pipelines_core.workload import (
    Drawing,
    Inputs,
    VideoDecoding,
    VideoEncoding,
    Workload,
    WorkSize,
)

_MIDDLE_TIMESTEP = 500.0


class QwenImageDenoising(Workload):
    """One velocity prediction for each row, without pictures."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Latents [B, C, 1, H, W], timesteps [B], text [B, L, D_text]."""
        config = configs[self.component]
        assert isinstance(config, QwenImageTransformerConfig), "the component of a Qwen-Image pipeline"
        return (
            draw.normal(size.batch_size, *size.latent_shape),
            draw.full(_MIDDLE_TIMESTEP, size.batch_size),
            draw.normal(size.batch_size, size.num_text_tokens, config.joint_attention_dim),
        )

    def embed_steps(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_steps(inputs[1])  # type: ignore[operator]

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_text(inputs[2])  # type: ignore[operator]

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, S, C]."""
        latents, timesteps, text, *embedded = inputs
        return module(pack(latents), timesteps, text, (_grid(latents),), None, Embedded(*embedded))

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, S, C]."""
        latents, timesteps, text = inputs
        return module(
            hidden_states=pack(latents),
            timestep=timesteps / 1000,
            encoder_hidden_states=text,
            img_shapes=[[_grid(latents)]] * len(latents),
            return_dict=False,
        )[0]


def _grid(latents: Tensor) -> tuple[int, int, int]:
    """(frames, height, width) in tokens."""
    frames, height, width = latents.shape[2:]
    return frames, height // 2, width // 2


QWEN_IMAGE_WORKLOADS: Mapping[str, Workload] = {
    "dit": QwenImageDenoising("transformer"),
    "vae_decode": VideoDecoding("vae"),
    "vae_encode": VideoEncoding("vae"),
}
