"""What benchmarks run of an LTX-Video checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.ltx import LTXVideoTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.ltx import LTXVideoVAEConfig
from sglang.multimodal_gen.runtime.layers.embedded import Embedded
from sglang.multimodal_gen.runtime.pipelines.ltx_denoiser import ClipGrid, causal_positions, table_of
from sglang.multimodal_gen.runtime.pipelines_core.workload import (
    Drawing,
    Inputs,
    WholeDecoding,
    WholeEncoding,
    Workload,
    WorkSize,
)

_MIDDLE_TIMESTEP = 500.0
_FPS = 25
_DECODE_TIMESTEP = 0.05
_SEED = 0


class LTXDenoising(Workload):
    """One velocity prediction for each row."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Tokens [B, S, C], timesteps [B], text [B, L, D_text], rotary table [1, S, N, E/2, 2], positions [B, 3, S]."""
        config = configs[self.component]
        assert isinstance(config, LTXVideoTransformerConfig), "the component of an LTX pipeline"
        channels, frames, height, width = size.latent_shape
        stride = size.height // height
        strides = (max(1, (size.num_frames - 1) // max(1, frames - 1)), stride, stride)
        positions = causal_positions(ClipGrid((frames, height, width), strides, _FPS))
        table = table_of(positions, config.hidden_size, config.num_attention_heads)
        return (
            draw.normal(size.batch_size, frames * height * width, channels),
            draw.full(_MIDDLE_TIMESTEP, size.batch_size),
            draw.normal(size.batch_size, size.num_text_tokens, config.caption_channels),
            table.to(draw.device),
            torch.stack(positions).expand(size.batch_size, -1, -1).to(draw.device),
        )

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, S, C]."""
        tokens, timesteps, text, table, _, *embedded = inputs
        return module(tokens, timesteps, text, table, _lengths(text), Embedded(None, *embedded))

    def embed_text(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """See Workload."""
        return module.embed_text(inputs[2], _lengths(inputs[2]))  # type: ignore[operator]

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, S, C]."""
        tokens, timesteps, text, _, positions = inputs
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return module(tokens, text, timesteps, mask, video_coords=positions, return_dict=False)[0]


def _lengths(texts: Tensor) -> list[int]:
    return [texts.shape[1]] * texts.shape[0]


class ClipDecoding(WholeDecoding):
    """Latents to pixels, a whole clip at a time."""

    def inputs(self, configs: Mapping[str, ModelConfig], size: WorkSize, draw: Drawing) -> Inputs:
        """Latents [B, C, T, H, W], and timesteps [B] for a decoder that is told them."""
        config, (latents,) = configs[self.component], super().inputs(configs, size, draw)
        assert isinstance(config, LTXVideoVAEConfig), "the component of an LTX pipeline"
        if not config.timestep_conditioning:
            return (latents,)
        return latents, draw.full(_DECODE_TIMESTEP, size.batch_size)

    def forward(self, module: nn.Module, inputs: Inputs, size: WorkSize) -> Tensor:
        """[B, 3, T, H, W]."""
        return module.decode(*inputs, seed=_SEED)  # type: ignore[operator]

    def reference_forward(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """[B, 3, T, H, W]."""
        noise: Sequence[bool] = module.config.decoder_inject_noise  # type: ignore[union-attr, assignment]
        if not any(noise):
            return module.decode(*inputs, return_dict=False)[0]  # type: ignore[operator]
        # It draws from torch's own generator: the same numbers as ours.
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            return module.decode(*inputs, return_dict=False)[0]  # type: ignore[operator]


LTX_WORKLOADS: Mapping[str, Workload] = {
    "dit": LTXDenoising("transformer"),
    "vae_decode": ClipDecoding("vae"),
    "vae_encode": WholeEncoding("vae"),
}
