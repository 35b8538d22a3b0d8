"""Stable Diffusion 3 transformer (MMDiT, and MMDiT-X of 3.5 medium): image and text streams joined in attention.

Source: arXiv:2403.03206, https://github.com/Stability-AI/sd3.5. Parameter names are those of the published diffusers
checkpoints.

Shapes: B batch, C latent channels, H, W latent height and width, S image tokens (one per patch), L text tokens,
D hidden_size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.sd3 import SD3TransformerConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner, PerRow, Streams
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.embeddings import TimestepTextEmbedding
from sglang.multimodal_gen.runtime.layers.joint_attention import JointAttention, SelfAttention
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.mlp import FeedForward
from sglang.multimodal_gen.runtime.layers.modulation import AdaLayerNormContinuous, AdaLayerNormZero
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding, StepTable
from sglang.multimodal_gen.runtime.layers.stream_blocks import Stream
from sglang.multimodal_gen.runtime.layers.table_cache import row_index

_MLP_RATIO = 4


class PatchEmbed(nn.Module):
    """Patches of the latents, each with its place in the middle of a square table that the checkpoint holds."""

    pos_embed: Tensor

    def __init__(self, config: SD3TransformerConfig) -> None:
        super().__init__()
        side, dim = config.pos_embed_max_size, config.hidden_size
        self.max_size = side
        self.proj = nn.Conv2d(config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.register_buffer("pos_embed", torch.zeros(1, side * side, dim))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, S, D]."""
        patches = self.proj(latents)
        height, width = patches.shape[2:]
        top, left = (self.max_size - height) // 2, (self.max_size - width) // 2
        table = self.pos_embed.unflatten(1, (self.max_size, self.max_size))
        places = table[:, top : top + height, left : left + width].flatten(1, 2)
        return (patches.flatten(2).transpose(1, 2) + places).to(latents.dtype).contiguous()


class JointTransformerBlock(nn.Module):
    """Both streams attend to both, then each to its own MLP.

    With `dual_attention` the image attends once more, to itself alone. Nothing is made of the text in the `last` block.
    """

    def __init__(
        self, config: SD3TransformerConfig, context: LayerContext, *, dual_attention: bool, last: bool
    ) -> None:
        super().__init__()
        self.adapters = context.adapters
        dim, heads, head_dim = config.hidden_size, config.num_attention_heads, config.attention_head_dim
        axis, qk_norm = context.parallel.tp, config.qk_norm is not None
        self.norm1 = AdaLayerNormZero(dim, num_modulations=3 if dual_attention else 2)
        self.norm1_context = AdaLayerNormContinuous(dim, dim) if last else AdaLayerNormZero(dim, num_modulations=2)
        self.attn = JointAttention(dim, heads, head_dim, context, qk_norm=qk_norm, text_first=False, text_out=not last)
        if dual_attention:
            self.attn2 = SelfAttention(dim, heads, head_dim, context, qk_norm=qk_norm)
        self.ff = FeedForward(dim, _MLP_RATIO * dim, dim, axis=axis)
        if not last:
            self.ff_context = FeedForward(dim, _MLP_RATIO * dim, dim, axis=axis)

    @property
    def step_width(self) -> int:
        """See Modulated."""
        return self.norm1.step_width + self.norm1_context.step_width

    def step_values(self, temb: Tensor) -> Tensor:
        """See Modulated."""
        return torch.cat((self.norm1.step_values(temb), self.norm1_context.step_values(temb)), dim=1)

    def modulated(self, hidden_states: Tensor, step: StepEmbedding) -> Tensor:
        """What the attention sees of the image: [B, S, D], the step for this block -> [B, S, D]."""
        of_image, _ = step.divided(self.norm1.linear, self.norm1_context.linear)
        return self.norm1(of_image)[0].normed(hidden_states)

    def forward(self, hidden_states: Tensor, text: Tensor, step: StepEmbedding) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, L, D], the step for this block -> [B, S, D], [B, L, D]."""
        step, text_step = step.divided(self.norm1.linear, self.norm1_context.linear)
        attn_mod, mlp_mod, *dual_mod = self.norm1(step)
        image = Stream(hidden_states, attn_mod, mlp_mod, self.ff)
        if isinstance(self.norm1_context, AdaLayerNormContinuous):
            of_image, _ = self.attn.joint_forward(
                attn_mod.normed(hidden_states), self.norm1_context(text, text_step), None
            )
        else:
            text_attn, text_mlp = self.norm1_context(text_step)
            text_stream = Stream(text, text_attn, text_mlp, self.ff_context)
            normed_text = text_attn.normed(text)
            of_image, of_text = self.attn.joint_forward(attn_mod.normed(hidden_states), normed_text, None)
            text = text_stream.after_attention(of_text)
        for mod in dual_mod:
            of_self = self.attn2(mod.normed(hidden_states), None)
            image = image._replace(hidden_states=mod.add_gated(hidden_states, of_self))
        return image.after_attention(of_image), text


class SD3Transformer2DModel(nn.Module):
    """Predicts the flow velocity of image latents."""

    keep_unquantized: ClassVar[tuple[str, ...]] = (
        "context_embedder",
        "time_text_embed",
        "*.norm1",
        "*.norm1_context",
        "norm_out",
        "proj_out",
    )
    """Linear layers within these names keep their weights; `*` is any text."""

    def __init__(self, config: SD3TransformerConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.tokens, self.adapters = context.tokens, context.adapters
        self.block_runner = BlockRunner(context, num_blocks=config.num_layers, changes_text=True)
        dim, patch_size = config.hidden_size, config.patch_size
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimestepTextEmbedding(dim, pooled_dim=config.pooled_projection_dim)
        self.context_embedder = ReplicatedLinear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [
                JointTransformerBlock(
                    config,
                    context,
                    dual_attention=layer in config.dual_attention_layers,
                    last=layer == config.num_layers - 1,
                )
                for layer in range(config.num_layers)
            ]
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim)
        self.proj_out = ReplicatedLinear(dim, patch_size**2 * config.num_output_channels)
        self.step_table = StepTable(dim, self.transformer_blocks, [self.norm_out])
        self.text_width = dim

    def embed_steps(self, timestep: Tensor, pooled_projections: Tensor) -> Tensor:
        """What forwards make of timesteps [T] and pooled text [T, P], as `embedded`: [T, V] fp32."""
        return self.step_table.rows(self.time_text_embed(timestep, pooled_projections))

    def embed_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """What forwards make of texts [B, L, D_text], as `embedded`: [B, L, D]."""
        return self.context_embedder(encoder_hidden_states)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        skip_layers: Sequence[Collection[int]] = (),
        embedded: Embedded = NOTHING,
    ) -> Tensor:
        """Latents [B, C, H, W], timesteps [B] in 0 … 1000, text [B, L, D_text], pooled [B, P] -> [B, C_out, H, W].

        `skip_layers`: for each row the blocks that it does not pass; empty when every row passes all of them.
        `embedded` is what `embed_steps` made of timesteps and pooled text, and `embed_text` of the text.

        Raises:
            InvalidRequest: the latents do not divide into patches, or exceed the position table.
        """
        grid = self.patch_grid(hidden_states)
        step, last_step = self.step_table.embeddings(
            embedded.steps, lambda: self.time_text_embed(timestep, pooled_projections), hidden_states.dtype
        )
        text = self.embed_text(encoder_hidden_states) if embedded.text is None else embedded.text
        num_tokens = grid[0] * grid[1]
        self.tokens.begin(num_tokens, text.shape[1])
        given = (step, PerRow(skip_layers or [()] * len(text)))
        first_block = cast(JointTransformerBlock, self.transformer_blocks[0])
        hidden_states = self.block_runner.run(
            (self.tokens.deal(self.pos_embed(hidden_states)), self.tokens.deal(text)),
            BlockRun(blocks=self.transformer_blocks, given=given, call=_call_passed),
            num_tokens=num_tokens,
            signal=lambda _, tokens: first_block.modulated(tokens, step.of_layer(0)),
        )
        tokens = self.tokens.gather(self.proj_out(self.norm_out(hidden_states, last_step)), num_tokens)
        return self.unpatchify(tokens, grid)

    def patch_grid(self, latents: Tensor) -> tuple[int, int]:
        """Patches of [B, C, H, W] along height and width. Raises InvalidRequest."""
        (height, width), side, limit = latents.shape[2:], self.config.patch_size, self.config.pos_embed_max_size
        if height % side or width % side:
            raise InvalidRequest(f"latents of {height}x{width} do not divide into patches of {side}x{side}")
        if max(height, width) > side * limit:
            raise InvalidRequest(f"{height // side}x{width // side} patches; the model has places for {limit}x{limit}")
        return height // side, width // side

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, S, p·p·C] -> [B, C, H, W]."""
        side = self.config.patch_size
        cells = tokens.unflatten(2, (side, side, -1)).unflatten(1, grid)
        # [B, H', W', p, p, C]: each patch axis moves behind its grid axis
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _call_passed(
    layer: int, block: nn.Module, streams: Streams, step: StepEmbedding, skip_layers: Sequence[Collection[int]]
) -> Streams:
    """The streams behind a block, which those rows do not pass that leave it out."""
    step = step.of_layer(layer)
    passing = [row for row, skipped in enumerate(skip_layers) if layer not in skipped]
    if len(passing) == len(skip_layers):
        hidden_states, text = block(*streams, step)
        return hidden_states, text
    if not passing:
        return streams
    # Rows are taken out rather than masked, so that a row that skips costs nothing here.
    rows = row_index(passing, step.temb.device)
    with cast(JointTransformerBlock, block).adapters.only(passing):
        changed = block(*(stream[rows] for stream in streams), step.at(rows))
    return tuple(stream.index_copy(0, rows, part) for stream, part in zip(streams, changed, strict=True))
