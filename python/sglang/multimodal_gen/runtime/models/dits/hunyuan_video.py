"""HunyuanVideo transformer: text to video, and image to video through more channels or a given first frame.

Source: arXiv:2412.03603, https://github.com/Tencent/HunyuanVideo. Parameter names are those of the published diffusers
checkpoints.

Shapes: B batch, C latent channels, T, H, W latent frames, height, width; S video tokens (one per patch), L text tokens,
D hidden_size, E head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.hunyuan_video import TOKEN_REPLACE, HunyuanVideoTransformerConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.attention.padding import trim_padding
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.embeddings import TimestepTextEmbedding, sinusoidal_embedding
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.modulation import AdaLayerNormContinuous, PartedEmbedding
from sglang.multimodal_gen.runtime.layers.rotary import grid_positions, rotary_table
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding, StepTable
from sglang.multimodal_gen.runtime.layers.stream_blocks import DualStreamBlock, SingleStreamBlock
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache
from sglang.multimodal_gen.runtime.layers.token_refiner import TokenRefiner


class HunyuanVideoPatchEmbed(nn.Module):
    """Patches of latents to tokens: [B, C, T, H, W] -> [B, S, D]. Key: `proj`."""

    def __init__(self, in_channels: int, hidden_size: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2).contiguous()


class HunyuanVideoConditionEmbedding(TimestepTextEmbedding):
    """Timestep, pooled text and guidance as one vector; and the vector of a given first frame."""

    def first_frame(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Timestep 0 and the pooled text, without guidance: [B], [B, P] -> [B, D]."""
        frequencies = sinusoidal_embedding(torch.zeros_like(timestep), self.frequency_dim)
        return self.timestep_embedder(frequencies.to(pooled.dtype)) + self.text_embedder(pooled)


class HunyuanVideoTransformer3DModel(nn.Module):
    """Predicts the flow velocity of video latents."""

    keep_unquantized: ClassVar[tuple[str, ...]] = (
        "context_embedder",
        "time_text_embed",
        "*.norm",
        "*.norm1",
        "*.norm1_context",
        "norm_out",
        "proj_out",
    )
    """Linear layers within these names keep their weights; `*` is any text."""

    def __init__(self, config: HunyuanVideoTransformerConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.tokens, self.adapters = context.tokens, context.adapters
        self.block_runner = BlockRunner(
            context, num_blocks=config.num_layers + config.num_single_layers, changes_text=True
        )
        dim, heads, head_dim = config.hidden_size, config.num_attention_heads, config.attention_head_dim
        self.x_embedder = HunyuanVideoPatchEmbed(config.in_channels, dim, config.patch)
        self.context_embedder = TokenRefiner(
            config.text_embed_dim,
            heads,
            head_dim,
            context.for_whole_sequences(),
            num_layers=config.num_refiner_layers,
        )
        self.time_text_embed = HunyuanVideoConditionEmbedding(
            dim, pooled_dim=config.pooled_projection_dim, guidance=config.guidance_embeds
        )
        self.transformer_blocks = nn.ModuleList(
            [
                DualStreamBlock(dim, heads, head_dim, context, ffn_dim=config.ffn_dim, text_first=False, mask=True)
                for _ in range(config.num_layers)
            ]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [
                SingleStreamBlock(dim, heads, head_dim, context, ffn_dim=config.ffn_dim, mask=True)
                for _ in range(config.num_single_layers)
            ]
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim)
        self.proj_out = ReplicatedLinear(dim, math.prod(config.patch) * config.num_output_channels)
        self.step_table = StepTable(dim, self.transformer_blocks, self.single_transformer_blocks, [self.norm_out])
        self.text_width = dim

    def embed_steps(self, timestep: Tensor, pooled_projections: Tensor, guidance: Tensor | None = None) -> Tensor:
        """What forwards make of timesteps [T], pooled text [T, P] and guidance [T], as `embedded`: [T, V] fp32."""
        return self.step_table.rows(self.time_text_embed(timestep, pooled_projections, guidance))

    def embed_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """What forwards make of texts [B, L, text_embed_dim] before the timestep refines them, as `embedded`:
        [B, L, D]."""
        return self.context_embedder.proj_in(encoder_hidden_states)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_lengths: Sequence[int],
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        embedded: Embedded = NOTHING,
    ) -> Tensor:
        """Latents [B, C, T, H, W], timesteps [B] in 0 … 1000 -> velocity [B, C_out, T, H, W].

        Text [B, L, text_embed_dim], of which row b has `text_lengths[b]` tokens and then padding; pooled text
        [B, pooled_projection_dim]; `guidance` [B] is the scale times 1000, for models that are told it. `embedded`
        is what `embed_steps` made of the rows' steps, which models that are given the first frame do not take, and
        `embed_text` of the text.

        Raises:
            InvalidRequest: the latents do not divide into patches.
        """
        grid = self.patch_grid(hidden_states)
        # Nothing attends to padding, so that rows of one length need no mask.
        text, text_mask = trim_padding(encoder_hidden_states, text_lengths)
        num_tokens, num_text_tokens = math.prod(grid), text.shape[1]
        mask = None if text_mask is None else nn.functional.pad(text_mask, (num_tokens, 0), value=True)
        self.tokens.begin(num_tokens, num_text_tokens)
        freqs_cis = with_unrotated(self.rotary_table(grid, hidden_states.device), num_text_tokens)
        freqs_cis = self.tokens.deal_joined(freqs_cis)
        step, single_step, last_step = self.step_table.embeddings(
            embedded.steps, lambda: self.time_text_embed(timestep, pooled_projections, guidance), hidden_states.dtype
        )
        parted: PartedEmbedding | None = None
        if self.config.image_condition_type == TOKEN_REPLACE:
            first_frame = self.time_text_embed.first_frame(timestep, pooled_projections)
            size = self.tokens.num_held(num_tokens // grid[0], num_tokens)
            parted = PartedEmbedding(first_frame, step.temb, size=size)
        projected = None if embedded.text is None else embedded.text[:, :num_text_tokens]
        text = self.tokens.deal(self.context_embedder(text, timestep, text_mask, projected))
        hidden_states = self.block_runner.run(
            (self.tokens.deal(self.x_embedder(hidden_states)), text),
            BlockRun(
                blocks=self.transformer_blocks,
                given=(parted or step, freqs_cis, mask),
                named={"text_step": step if parted else None},
            ),
            BlockRun(
                blocks=self.single_transformer_blocks,
                given=(parted or single_step, freqs_cis, mask),
                enter=lambda streams: (torch.cat(streams, dim=1),),
                tokens=slice(self.tokens.share(num_tokens)),
            ),
            num_tokens=num_tokens,
            signal=lambda _, tokens: self._first_modulated(tokens, parted or step),
        )
        tokens = self.tokens.gather(self.proj_out(self.norm_out(hidden_states, last_step)), num_tokens)
        return self.unpatchify(tokens, grid)

    def _first_modulated(self, tokens: Tensor, step: StepEmbedding | PartedEmbedding) -> Tensor:
        block = cast(DualStreamBlock, self.transformer_blocks[0])
        return block.modulated(tokens, step.of_layer(0) if isinstance(step, StepEmbedding) else step)

    def patch_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Patches of [B, C, T, H, W] along time, height and width."""
        sizes, patch = tuple(latents.shape[2:]), self.config.patch
        if any(size % side for size, side in zip(sizes, patch, strict=True)):
            raise InvalidRequest(f"latents of {sizes} (frames, height, width) do not divide into patches of {patch}")
        frames, height, width = (size // side for size, side in zip(sizes, patch, strict=True))
        return frames, height, width

    def rotary_table(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """Table of the video tokens: [1, S, 1, E/2, 2]."""
        return video_rotary_table(grid, self.config.rope_axes_dim, self.config.rope_theta, device)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, S, C·p_t·p_h·p_w] -> [B, C, T, H, W]."""
        patches = tokens.unflatten(2, (-1, *self.config.patch)).unflatten(1, grid)
        # [B, T', H', W', C, p_t, p_h, p_w]: each patch axis moves behind its grid axis
        return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


# A 720p clip of 129 frames takes 61 MB; a handful of shapes is alive at a time.
@table_cache(4)
def video_rotary_table(
    grid: tuple[int, int, int], axes_dim: tuple[int, ...], theta: float, device: torch.device
) -> Tensor:
    """Table for tokens on a (frames, height, width) grid, in raster order: [1, F·H·W, 1, E/2, 2]."""
    # A table made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        return rotary_table(grid_positions(*grid, device=device), axes_dim, theta=theta, precision=torch.float32)


def with_unrotated(table: Tensor, num_tokens: int) -> Tensor:
    """The table [1, S, 1, E/2, 2], then that many tokens which it leaves as they are."""
    size = (1, num_tokens, *table.shape[2:-1])
    identity = torch.stack((table.new_ones(size), table.new_zeros(size)), dim=-1)
    return torch.cat((table, identity), dim=1)
