"""Z-Image transformer: one stream of image and caption tokens, refined apart before they meet.

Source: https://github.com/Tongyi-MAI/Z-Image. Parameter names are those of the published diffusers checkpoints.

Captions and images are padded to multiples of 32 tokens with learnt tokens, which take part in attention like others.
Rows of a batch whose captions then still differ in length are padded once more, and that padding is masked out.

Shapes: B batch, C latent channels, T, H, W latent frames, height, width; S image tokens (one per 2x2 cells), L caption
tokens, both padded; D hidden size, M modulation size, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.zimage import ZImageTransformerConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.embeddings import sinusoidal_embedding
from sglang.multimodal_gen.runtime.layers.fused import sum_norm
from sglang.multimodal_gen.runtime.layers.joint_attention import SelfAttention
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.mlp import SwiGLU
from sglang.multimodal_gen.runtime.layers.norm import RMSNorm
from sglang.multimodal_gen.runtime.layers.rotary import grid_positions, rotary_table
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding, StepTable
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache

TOKEN_MULTIPLE = 32
"""Captions and images are padded to a multiple of so many tokens."""
_ANY_GRID = (1, 1, 1)
_MODULATION_SIZE = 256
_TIME_HIDDEN_SIZE = 1024
_ATTENTION_EPS = 1e-5


def padded_length(num_tokens: int) -> int:
    """`num_tokens` rounded up to the multiple that the model was trained with."""
    return -(-num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Where the tokens of a batch lie: rotary tables and masks of image, caption and both, the image first.

    Tables are [1 or B, tokens, 1, E/2, 2], masks [B, 1, 1, tokens] or None where all rows are equally long.
    """

    num_image_tokens: int
    table: Tensor
    caption_mask: Tensor | None
    joint_mask: Tensor | None

    @property
    def image_table(self) -> Tensor:
        """The table of the image tokens alone."""
        return self.table[:, : self.num_image_tokens]

    @property
    def caption_table(self) -> Tensor:
        """The table of the caption tokens alone."""
        return self.table[:, self.num_image_tokens :]


# A row of 1024x1024 with 512 caption tokens takes 2.4 MB; a handful of shapes is alive at a time.
@table_cache(16)
def token_layout(
    grid: tuple[int, int, int],
    caption_lengths: tuple[int, ...],
    axes_dims: tuple[int, ...],
    theta: float,
    device: torch.device,
) -> TokenLayout:
    """The layout of images of `grid` (frames, height, width) tokens beside captions of these padded lengths."""
    lengths = caption_lengths[:1] if len(set(caption_lengths)) == 1 else caption_lengths
    # Tensors made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        cells = grid_positions(*grid)
        num_image_tokens = padded_length(len(cells))
        positions = torch.zeros(len(lengths), num_image_tokens + max(lengths), 3, dtype=torch.int64)
        for row, length in enumerate(lengths):
            # Padding of the image stays at the origin; the caption's padding has positions like its text, from 1 on.
            positions[row, : len(cells)] = cells + torch.tensor([length + 1, 0, 0])
            positions[row, num_image_tokens : num_image_tokens + length, 0] = torch.arange(1, length + 1)
        table = rotary_table(positions, axes_dims, theta=theta, rounded_to=torch.float32).to(device)
        mask = None
        if len(lengths) > 1:
            mask = torch.arange(max(lengths)) < torch.tensor(lengths).view(-1, 1, 1, 1)
        return TokenLayout(
            num_image_tokens=num_image_tokens,
            table=table,
            caption_mask=None if mask is None else mask.to(device),
            joint_mask=None if mask is None else F.pad(mask, (num_image_tokens, 0), value=True).to(device),
        )


@table_cache(32)
def text_places(lengths: tuple[int, ...], num_tokens: int, device: torch.device) -> Tensor:
    """Which of `num_tokens` are text, of rows with so many of it: [B, L, 1]."""
    # A mask made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        is_text = torch.arange(num_tokens) < torch.tensor(lengths).unsqueeze(1)
        return is_text.unsqueeze(-1).to(device)


class TimestepEmbedder(nn.Module):
    """Timesteps [B] in 0 … `t_scale` -> [B, M]."""

    def __init__(self, out_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            ReplicatedLinear(_MODULATION_SIZE, _TIME_HIDDEN_SIZE),
            nn.SiLU(),
            ReplicatedLinear(_TIME_HIDDEN_SIZE, out_size),
        )

    def forward(self, timestep: Tensor) -> Tensor:
        """Computes in the dtype of its own weights."""
        weight = next(self.mlp.parameters())
        return self.mlp(sinusoidal_embedding(timestep, _MODULATION_SIZE).to(weight.dtype))


class ZImageTransformerBlock(nn.Module):
    """Attention and gated MLP, normed before and after; scales and gates come from the timestep where it is modulated.

    A norm's weight and the modulation are one vector for each sample, which is its factor.
    """

    def __init__(self, config: ZImageTransformerConfig, context: LayerContext, *, modulation: bool = True) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = SelfAttention(
            dim, config.n_heads, config.head_dim, context, eps=_ATTENTION_EPS, bias=False, mask=True
        )
        self.feed_forward = SwiGLU(dim, config.ffn_dim, axis=context.parallel.tp)
        self.attention_norm1 = RMSNorm(dim, eps)
        self.ffn_norm1 = RMSNorm(dim, eps)
        self.attention_norm2 = RMSNorm(dim, eps)
        self.ffn_norm2 = RMSNorm(dim, eps)
        if modulation:
            self.adaLN_modulation = nn.Sequential(ReplicatedLinear(min(dim, _MODULATION_SIZE), 4 * dim))

    def forward(
        self, hidden_states: Tensor, freqs_cis: Tensor, mask: Tensor | None, step: StepEmbedding | None = None
    ) -> Tensor:
        """[B, S, D], the table and mask of its tokens, the step for this block if modulated -> [B, S, D]."""
        before_attention, after_attention, before_mlp, after_mlp = self._factors(step)
        update = self.attention(self.attention_norm1(hidden_states, before_attention), freqs_cis, mask)
        hidden_states, normed = self.attention_norm2.add_normed_and_norm(
            hidden_states, update, after_attention, self.ffn_norm1, before_mlp
        )
        return self.ffn_norm2.add_normed(hidden_states, self.feed_forward(normed), after_mlp)

    def modulated(self, hidden_states: Tensor, step: StepEmbedding) -> Tensor:
        """What its attention sees: [B, S, D], the step for this block -> [B, S, D]."""
        return self.attention_norm1(hidden_states, self._factors(step)[0])

    @property
    def step_width(self) -> int:
        """See Modulated."""
        return cast(nn.Linear, self.adaLN_modulation[0]).out_features

    def step_values(self, temb: Tensor) -> Tensor:
        """See Modulated: the factors of the norms before and after attention and MLP, side by side."""
        attn_scale, attn_gate, mlp_scale, mlp_gate = self.adaLN_modulation(temb).float().chunk(4, dim=-1)
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        modulations = (1 + attn_scale, attn_gate.tanh(), 1 + mlp_scale, mlp_gate.tanh())
        return torch.cat([norm.weight * each for norm, each in zip(norms, modulations, strict=True)], dim=1)

    def _factors(self, step: StepEmbedding | None) -> tuple[Tensor | None, ...]:
        """Those of the four norms, [B, 1, D] each in fp32; all None without modulation."""
        if step is None:
            return None, None, None, None
        values = self.step_values(step.temb) if step.values is None else step.values
        return values.unsqueeze(1).chunk(4, dim=-1)


class FinalLayer(nn.Module):
    """Norm, scale from the timestep, projection to the channels of a token."""

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(config.dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), ReplicatedLinear(min(config.dim, _MODULATION_SIZE), config.dim)
        )

    @property
    def step_width(self) -> int:
        """See Modulated."""
        return cast(nn.Linear, self.adaLN_modulation[1]).out_features

    def step_values(self, temb: Tensor) -> Tensor:
        """See Modulated."""
        return self.adaLN_modulation(temb)

    def forward(self, hidden_states: Tensor, step: StepEmbedding) -> Tensor:
        """[B, S, D], the step -> [B, S, 4·C]."""
        values = self.step_values(step.temb) if step.values is None else step.values
        return self.linear(sum_norm(hidden_states, scale=values.float().unsqueeze(1))[1])


class ZImageTransformer2DModel(nn.Module):
    """Predicts the velocity of image latents, from noise to data."""

    keep_unquantized: ClassVar[tuple[str, ...]] = (
        "all_x_embedder",
        "all_final_layer",
        "t_embedder",
        "cap_embedder",
        "*.adaLN_modulation",
    )
    """Linear layers within these names keep their weights; `*` is any text."""

    def __init__(self, config: ZImageTransformerConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.tokens, self.adapters = context.tokens, context.adapters
        self.block_runner = BlockRunner(context, num_blocks=config.n_layers, changes_text=True)
        patch = f"{config.patch_size}-{config.all_f_patch_size[0]}"
        self.all_x_embedder = nn.ModuleDict(
            {patch: ReplicatedLinear(config.patch_size**2 * config.in_channels, config.dim)}
        )
        self.all_final_layer = nn.ModuleDict({patch: FinalLayer(config)})

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList([ZImageTransformerBlock(config, context) for _ in range(count)])

        self.noise_refiner = blocks(config.n_refiner_layers)
        whole = context.for_whole_sequences()
        self.context_refiner = nn.ModuleList(
            [ZImageTransformerBlock(config, whole, modulation=False) for _ in range(config.n_refiner_layers)]
        )
        self.t_embedder = TimestepEmbedder(min(config.dim, _MODULATION_SIZE))
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), ReplicatedLinear(config.cap_feat_dim, config.dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.layers = blocks(config.n_layers)
        (final_layer,) = self.all_final_layer.values()
        self.step_table = StepTable(
            min(config.dim, _MODULATION_SIZE), self.noise_refiner, self.layers, [cast(FinalLayer, final_layer)]
        )
        self.text_width = config.dim

    def embed_steps(self, timestep: Tensor) -> Tensor:
        """What forwards make of timesteps [T], as `embedded`: [T, V] fp32."""
        return self.step_table.rows(self._embed(timestep, self.x_pad_token.dtype))

    def _embed(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.t_embedder(timestep * self.config.t_scale).to(dtype)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_lengths: Sequence[int],
        embedded: Embedded = NOTHING,
    ) -> Tensor:
        """Latents [B, C, T, H, W], timesteps [B] from 0 (noise) to 1 (data) -> velocity [B, C, T, H, W].

        Captions [B, L, cap_feat_dim]: row b has `text_lengths[b]` tokens, at least one; what lies behind is not read.
        `embedded` is what `embed_steps` made of the timesteps, and `embed_text` of the captions.

        Raises:
            InvalidRequest: the latents do not divide into patches, or they or a caption have no positions.
        """
        grid = self.patch_grid(hidden_states)
        layout = self._layout(grid, text_lengths, hidden_states.device)
        refiner_step, step, last_step = self.step_table.embeddings(
            embedded.steps, lambda: self._embed(timestep, hidden_states.dtype), hidden_states.dtype
        )
        (embed,), (final_layer,) = self.all_x_embedder.values(), self.all_final_layer.values()
        image = self._padded_image(embed(self.patchify(hidden_states)), layout.num_image_tokens)
        self.tokens.begin(layout.num_image_tokens)
        image, image_table = self.tokens.deal(image), self.tokens.deal(layout.image_table)
        for layer, block in enumerate(self.noise_refiner):
            image = block(image, image_table, None, refiner_step.of_layer(layer))
        caption = (
            self._refined_caption(encoder_hidden_states, text_lengths, layout)
            if embedded.text is None
            else embedded.text
        )
        self.tokens.begin(layout.num_image_tokens, caption.shape[1])
        table = self.tokens.deal_joined(layout.table)
        first_block = cast(ZImageTransformerBlock, self.layers[0])
        image = self.block_runner.run(
            (torch.cat((image, self.tokens.deal(caption)), dim=1),),
            BlockRun(
                blocks=self.layers,
                given=(table, layout.joint_mask, step),
                tokens=slice(image.shape[1]),
            ),
            num_tokens=layout.num_image_tokens,
            signal=lambda _, tokens: first_block.modulated(tokens, step.of_layer(0)),
        )
        return self.unpatchify(self.tokens.gather(final_layer(image, last_step), grid[0] * grid[1] * grid[2]), grid)

    def embed_text(self, encoder_hidden_states: Tensor, text_lengths: Sequence[int]) -> Tensor:
        """What forwards make of captions, as `embedded`: [B, l, D], l as long as the longest is with its padding.

        Arguments as in `forward`. The positions of a caption do not depend on the picture. Raises as `forward` does.
        """
        layout = self._layout(_ANY_GRID, text_lengths, encoder_hidden_states.device)
        return self._refined_caption(encoder_hidden_states, text_lengths, layout)

    def _refined_caption(self, embeds: Tensor, text_lengths: Sequence[int], layout: TokenLayout) -> Tensor:
        caption = self._caption(embeds, text_lengths)
        for block in self.context_refiner:
            caption = block(caption, layout.caption_table, layout.caption_mask)
        return caption

    def _layout(self, grid: tuple[int, int, int], text_lengths: Sequence[int], device: torch.device) -> TokenLayout:
        lengths = tuple(padded_length(length) for length in text_lengths)
        self.check_positions(grid, max(lengths))
        return token_layout(grid, lengths, self.config.axes_dims, self.config.rope_theta, device)

    def _padded_image(self, tokens: Tensor, num_tokens: int) -> Tensor:
        """[B, F·H·W, D] -> [B, S, D], learnt padding behind."""
        missing = num_tokens - tokens.shape[1]
        if missing == 0:
            return tokens
        return torch.cat((tokens, self.x_pad_token.to(tokens.dtype).expand(tokens.shape[0], missing, -1)), dim=1)

    def _caption(self, embeds: Tensor, text_lengths: Sequence[int]) -> Tensor:
        """[B, at least the longest text, cap_feat_dim] -> [B, L, D]; from a text's end on there is learnt padding."""
        num_tokens = padded_length(max(text_lengths))
        tokens = self.cap_embedder(embeds[:, :num_tokens])
        tokens = F.pad(tokens, (0, 0, 0, num_tokens - tokens.shape[1]))
        return torch.where(
            text_places(tuple(text_lengths), num_tokens, embeds.device), tokens, self.cap_pad_token.to(tokens.dtype)
        )

    def patch_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens of [B, C, T, H, W] along time, height and width. Raises InvalidRequest."""
        frames, height, width = latents.shape[2:]
        side = self.config.patch_size
        if height % side or width % side:
            raise InvalidRequest(f"latents of {height}x{width} do not divide into patches of {side}x{side}")
        return frames, height // side, width // side

    def check_positions(self, grid: tuple[int, int, int], caption_length: int) -> None:
        """Raises InvalidRequest when image tokens behind a caption of this padded length lie outside `axes_lens`."""
        needed = (caption_length + 1 + grid[0], grid[1], grid[2])
        if any(size > limit for size, limit in zip(needed, self.config.axes_lens, strict=True)):
            raise InvalidRequest(
                f"{grid[0]}x{grid[1]}x{grid[2]} image tokens behind {caption_length} of caption need "
                f"{list(needed)} positions; the model has {list(self.config.axes_lens)}"
            )

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T·H/2·W/2, 4·C], the channels of a cell side by side."""
        side = self.config.patch_size
        cells = latents.unflatten(4, (-1, side)).unflatten(3, (-1, side))
        # [B, C, T, H', p, W', p] -> [B, T, H', W', p, p, C]
        return cells.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, T·H/2·W/2, 4·C] -> [B, C, T, H, W]."""
        side = self.config.patch_size
        cells = tokens.unflatten(2, (side, side, -1)).unflatten(1, grid)
        return cells.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
