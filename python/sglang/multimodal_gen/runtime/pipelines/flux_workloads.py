"""What benchmarks run of a FLUX.1 checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.flux import FluxTransformerConfig
from sglang.multimodal_gen.runtime.layers.embedded import Embedded
from sglang.multimodal_gen.runtime.layers.rotary import grid_positions, rotary_table
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
_GUIDANCE = 3500.0
_PATCH_SIZE = 2


class FluxDenoising(Workload):
    """One velocity prediction for each row."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Tokens [B, S, C], timesteps [B], text [B, L, D], pooled [B, P], positions [L + S, 3], guidance [B]."""
        config = configs[self.component]
        assert isinstance(config, FluxTransformerConfig), "the component of a FLUX pipeline"
        height, width = (side // _PATCH_SIZE for side in size.latent_shape[2:])
        rows, length = size.batch_size, size.num_text_tokens
        text = torch.zeros(length, 3, dtype=torch.long, device=draw.device)
        return (
            draw.normal(rows, height * width, config.in_channels),
            draw.full(_MIDDLE_TIMESTEP, rows),
            draw.normal(rows, length, config.joint_attention_dim),
            draw.normal(rows, config.pooled_projection_dim),
            torch.cat((text, grid_positions(1, height, width, device=draw.device))),
            draw.full(_GUIDANCE, rows),
        )

    def embed_steps(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        _, timestep, _, pooled, _, guidance = inputs
        return module.embed_steps(timestep, pooled, guidance)  # type: ignore[operator]

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_text(inputs[2])  # type: ignore[operator]

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, S, C]."""
        tokens, timestep, text, pooled, positions, guidance, *embedded = inputs
        table = rotary_table(positions, module.config.axes_dims_rope)  # type: ignore[union-attr, arg-type]
        return module(tokens, timestep, text, pooled, table, guidance, Embedded(*embedded))

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, S, C]."""
        tokens, timestep, text, pooled, positions, guidance = inputs
        told = guidance / 1000 if module.config.guidance_embeds else None  # type: ignore[union-attr]
        length = text.shape[1]
        return module(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep / 1000,
            img_ids=positions[length:].float(),
            txt_ids=positions[:length].float(),
            guidance=told,
            return_dict=False,
        )[0]


FLUX_WORKLOADS: Mapping[str, Workload] = {
    "dit": FluxDenoising("transformer"),
    "vae_decode": PictureDecoding("vae"),
    "vae_encode": PictureEncoding("vae"),
    "encoder": TextEncoding("text_encoder_2"),
}
