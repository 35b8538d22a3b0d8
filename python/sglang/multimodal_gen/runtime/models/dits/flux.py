"""FLUX.1 transformer: text to image, and image to image through more channels or more tokens.

Source: https://github.com/black-forest-labs/flux. Parameter names are those of the published diffusers checkpoints.

Shapes: B batch, S image tokens (one per 2x2 latent cells), L text tokens, C token channels, D hidden_size, E head_dim.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.flux import FluxTransformerConfig
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.embeddings import TimestepTextEmbedding
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.modulation import AdaLayerNormContinuous
from sglang.multimodal_gen.runtime.layers.step_embedding import StepTable
from sglang.multimodal_gen.runtime.layers.stream_blocks import DualStreamBlock, SingleStreamBlock

_MLP_RATIO = 4


class FluxTransformer2DModel(nn.Module):
    """Predicts the flow velocity of packed image latents."""

    keep_unquantized: ClassVar[tuple[str, ...]] = (
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "*.norm",
        "*.norm1",
        "*.norm1_context",
        "norm_out",
        "proj_out",
    )
    """Linear layers within these names keep their weights; `*` is any text."""

    def __init__(self, config: FluxTransformerConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.tokens, self.adapters = context.tokens, context.adapters
        self.block_runner = BlockRunner(
            context, num_blocks=config.num_layers + config.num_single_layers, changes_text=True
        )
        dim, heads, head_dim = config.hidden_size, config.num_attention_heads, config.attention_head_dim
        self.time_text_embed = TimestepTextEmbedding(
            dim, pooled_dim=config.pooled_projection_dim, guidance=config.guidance_embeds
        )
        self.context_embedder = ReplicatedLinear(config.joint_attention_dim, dim)
        self.x_embedder = ReplicatedLinear(config.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            [DualStreamBlock(dim, heads, head_dim, context, ffn_dim=_MLP_RATIO * dim) for _ in range(config.num_layers)]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [
                SingleStreamBlock(dim, heads, head_dim, context, ffn_dim=_MLP_RATIO * dim)
                for _ in range(config.num_single_layers)
            ]
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim)
        self.proj_out = ReplicatedLinear(dim, config.patch_size**2 * config.num_output_channels)
        self.step_table = StepTable(dim, self.transformer_blocks, self.single_transformer_blocks, [self.norm_out])
        self.text_width = dim

    def embed_steps(self, timestep: Tensor, pooled_projections: Tensor, guidance: Tensor | None = None) -> Tensor:
        """What forwards make of these, for T steps of one request or of several, as `embedded`: [T, V] fp32.

        Timesteps and guidance [T], pooled text [T, P], as in `forward`.
        """
        return self.step_table.rows(self.time_text_embed(timestep, pooled_projections, guidance))

    def embed_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """What forwards make of texts [B, L, D_text], as `embedded`: [B, L, D]."""
        return self.context_embedder(encoder_hidden_states)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        freqs_cis: Tensor,
        guidance: Tensor | None = None,
        embedded: Embedded = NOTHING,
    ) -> Tensor:
        """Tokens [B, S, C], timesteps [B] in 0 … 1000, text [B, L, D_text], pooled [B, P] -> velocity [B, S, C_out].

        `freqs_cis` [1, L + S, 1, E/2, 2] is the table of the text tokens and then the image tokens. `guidance` [B] is
        the scale times 1000, for models that are told it. `embedded` is what `embed_steps` made of timesteps, pooled
        text and guidance, and `embed_text` of the text.
        """
        step, single_step, last_step = self.step_table.embeddings(
            embedded.steps, lambda: self.time_text_embed(timestep, pooled_projections, guidance), hidden_states.dtype
        )
        text = self.embed_text(encoder_hidden_states) if embedded.text is None else embedded.text
        num_text_tokens, num_tokens = text.shape[1], hidden_states.shape[1]
        self.tokens.begin(num_text_tokens, num_tokens)
        freqs_cis, text = self.tokens.deal_joined(freqs_cis), self.tokens.deal(text)
        hidden_states = self.block_runner.run(
            (self.x_embedder(self.tokens.deal(hidden_states)), text),
            BlockRun(blocks=self.transformer_blocks, given=(step, freqs_cis)),
            BlockRun(
                blocks=self.single_transformer_blocks,
                given=(single_step, freqs_cis),
                enter=lambda streams: (torch.cat((streams[1], streams[0]), dim=1),),
                tokens=slice(text.shape[1], None),
            ),
            num_tokens=num_tokens,
            signal=lambda _, tokens: cast(DualStreamBlock, self.transformer_blocks[0]).modulated(
                tokens, step.of_layer(0)
            ),
        )
        return self.tokens.gather(self.proj_out(self.norm_out(hidden_states, last_step)), num_tokens)
