"""Qwen-Image transformer: text to image, and editing of pictures whose latents follow as further tokens.

Source: arXiv:2508.02324, https://github.com/QwenLM/Qwen-Image. Parameter names are those of the published diffusers
checkpoints.

Shapes: B batch, S image tokens (one per 2x2 latent cells; of the image and then of the pictures that it is made from),
L text tokens, C token channels, D hidden_size, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.runtime.layers.attention.padding import text_mask
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from sglang.multimodal_gen.runtime.layers.joint_attention import JointAttention
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.mlp import FeedForward
from sglang.multimodal_gen.runtime.layers.modulation import (
    AdaLayerNormContinuous,
    Modulation,
    PartedModulation,
    modulations_of,
)
from sglang.multimodal_gen.runtime.layers.norm import RMSNorm
from sglang.multimodal_gen.runtime.layers.rotary import grid_positions, rotary_table
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding, StepTable
from sglang.multimodal_gen.runtime.layers.stream_blocks import Stream, joint_update
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache

ImageShapes = tuple[tuple[int, int, int], ...]
"""(frames, height, width) in tokens, of the image and then of each picture that it is made from."""

_MLP_RATIO = 4
_FREQUENCY_DIM = 256
_EPS = 1e-6


class QwenTimestepEmbedding(nn.Module):
    """Key: `timestep_embedder`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_FREQUENCY_DIM, hidden_size)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps [B] in 0 … 1000 -> [B, D]."""
        # The published model scales the angles, not the timesteps, and the two round differently.
        frequencies = sinusoidal_embedding(timestep / 1000, _FREQUENCY_DIM, scale=1000.0)
        return self.timestep_embedder(frequencies.to(dtype))


class QwenImageTransformerBlock(nn.Module):
    """Image and text tokens with weights of their own, joined in attention."""

    def __init__(self, config: QwenImageTransformerConfig, context: LayerContext) -> None:
        super().__init__()
        axis, dim = context.parallel.tp, config.hidden_size
        self.img_mod = nn.Sequential(nn.SiLU(), ReplicatedLinear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), ReplicatedLinear(dim, 6 * dim))
        self.attn = JointAttention(
            dim, config.num_attention_heads, config.attention_head_dim, context, eps=_EPS, mask=True
        )
        self.img_mlp = FeedForward(dim, _MLP_RATIO * dim, dim, axis=axis)
        self.txt_mlp = FeedForward(dim, _MLP_RATIO * dim, dim, axis=axis)

    @property
    def step_width(self) -> int:
        """See Modulated."""
        return sum(layer.out_features for layer in self._step_layers())

    def step_values(self, temb: Tensor) -> Tensor:
        """See Modulated."""
        return torch.cat((self.img_mod(temb), self.txt_mod(temb)), dim=1)

    def _step_layers(self) -> tuple[nn.Linear, nn.Linear]:
        return cast(nn.Linear, self.img_mod[1]), cast(nn.Linear, self.txt_mod[1])

    def image_modulations(
        self, step: StepEmbedding, num_noise_tokens: int | None
    ) -> tuple[Modulation | PartedModulation, Modulation | PartedModulation]:
        """Those of the image's attention and MLP; see `forward`."""
        of_image, _ = step.divided(*self._step_layers())
        values = self.img_mod(of_image.temb) if of_image.values is None else of_image.values
        attn_mod, mlp_mod = (_parted(mod, num_noise_tokens) for mod in modulations_of(values, 2))
        return attn_mod, mlp_mod

    def text_modulations(self, step: StepEmbedding) -> tuple[Modulation, Modulation]:
        """Those of the text's attention and MLP."""
        _, of_text = step.divided(*self._step_layers())
        values = self.txt_mod(of_text.temb) if of_text.values is None else of_text.values
        attn_mod, mlp_mod = modulations_of(values, 2)
        return attn_mod, mlp_mod

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor,
        step: StepEmbedding,
        freqs_cis: Tensor,
        mask: Tensor | None = None,
        *,
        num_noise_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, L, D], the step, the table and mask [B, 1, 1, L + S] of both -> [B, S, D], [B, L, D].

        With `num_noise_tokens`, the step has B further rows, for the image tokens behind so many.
        """
        attn_mod, mlp_mod = self.image_modulations(step, num_noise_tokens)
        text_attn_mod, text_mlp_mod = self.text_modulations(step.at(slice(text.shape[0])))
        return joint_update(
            self.attn,
            Stream(hidden_states, attn_mod, mlp_mod, self.img_mlp),
            Stream(text, text_attn_mod, text_mlp_mod, self.txt_mlp),
            freqs_cis,
            mask,
        )


def _parted(modulation: Modulation, size: int | None) -> Modulation | PartedModulation:
    return modulation if size is None else PartedModulation.of_rows(modulation, size)


class QwenImageTransformer2DModel(nn.Module):
    """Predicts the flow velocity of packed image latents."""

    keep_unquantized: ClassVar[tuple[str, ...]] = (
        "img_in",
        "txt_in",
        "time_text_embed",
        "*.img_mod",
        "*.txt_mod",
        "norm_out",
        "proj_out",
    )
    """Linear layers within these names keep their weights; `*` is any text."""

    def __init__(self, config: QwenImageTransformerConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.tokens, self.adapters = context.tokens, context.adapters
        self.block_runner = BlockRunner(context, num_blocks=config.num_layers, changes_text=True)
        dim = config.hidden_size
        self.time_text_embed = QwenTimestepEmbedding(dim)
        self.txt_norm = RMSNorm(config.joint_attention_dim, _EPS)
        self.img_in = ReplicatedLinear(config.in_channels, dim)
        self.txt_in = ReplicatedLinear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [QwenImageTransformerBlock(config, context) for _ in range(config.num_layers)]
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, eps=_EPS)
        self.proj_out = ReplicatedLinear(dim, config.num_output_channels)
        self.step_table = StepTable(dim, self.transformer_blocks, [self.norm_out])
        self.text_width = dim

    def embed_steps(self, timestep: Tensor) -> Tensor:
        """What forwards make of timesteps [T], as `embedded`: [T, V] fp32."""
        return self.step_table.rows(self.time_text_embed(timestep, self.proj_out.weight.dtype))

    def embed_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """What forwards make of texts [B, L, D_text], as `embedded`: [B, L, D]."""
        return self.txt_in(self.txt_norm(encoder_hidden_states))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        image_shapes: ImageShapes,
        text_lengths: Sequence[int] | None = None,
        embedded: Embedded = NOTHING,
    ) -> Tensor:
        """Tokens [B, S, C], timesteps [B] in 0 … 1000, text [B, L, D_text] -> velocity [B, S, C_out].

        `image_shapes` are those of every row, S tokens in all. What lies behind a row's `text_lengths` is padding.
        `embedded` is what `embed_steps` made of the timesteps, with `zero_cond_t` [2·B, V], the second half for
        timestep 0, and `embed_text` of the text.
        """
        num_text, num_image = encoder_hidden_states.shape[1], hidden_states.shape[1]
        assert sum(map(prod, image_shapes)) == num_image, "the shapes are those of the tokens"
        self.tokens.begin(num_text, num_image)
        freqs_cis = joint_table(image_shapes, num_text, self.config.axes_dims_rope, hidden_states.device)
        freqs_cis = self.tokens.deal_joined(freqs_cis)
        mask = text_mask(tuple(text_lengths), num_text, num_image, hidden_states.device) if text_lengths else None
        num_noise_tokens = None
        if self.config.zero_cond_t:
            # The pictures that the image is made from are without noise.
            num_noise_tokens = self.tokens.num_held(prod(image_shapes[0]), num_image)
            timestep = torch.cat((timestep, torch.zeros_like(timestep)))
        step, last_step = self.step_table.embeddings(
            embedded.steps, lambda: self.time_text_embed(timestep, hidden_states.dtype), hidden_states.dtype
        )
        text = (
            self.embed_text(self.tokens.deal(encoder_hidden_states))
            if embedded.text is None
            else self.tokens.deal(embedded.text)
        )
        first_block = cast(QwenImageTransformerBlock, self.transformer_blocks[0])
        hidden_states = self.block_runner.run(
            (self.img_in(self.tokens.deal(hidden_states)), text),
            BlockRun(
                blocks=self.transformer_blocks,
                given=(step, freqs_cis, mask),
                named={"num_noise_tokens": num_noise_tokens},
            ),
            num_tokens=num_image,
            signal=lambda _, tokens: first_block.image_modulations(step.of_layer(0), num_noise_tokens)[0].normed(
                tokens
            ),
        )
        last_step = last_step.at(slice(hidden_states.shape[0]))
        return self.tokens.gather(self.proj_out(self.norm_out(hidden_states, last_step)), num_image)


def joint_table(
    image_shapes: ImageShapes, num_text_tokens: int, axes_dim: tuple[int, ...], device: torch.device
) -> Tensor:
    """Table of the text and then the image tokens: [1, L + S, 1, E/2, 2].

    Text stands on the diagonal right behind the largest image, so that its length moves no image token.
    """
    images = _image_table(image_shapes, axes_dim, device)
    first = max(side // 2 for shape in image_shapes for side in shape[1:])
    text = _text_table(first, num_text_tokens, axes_dim, device)
    return torch.cat((text, images), dim=1)


# 2048x2048 with three pictures takes 15 MB.
@table_cache(8)
def _image_table(image_shapes: ImageShapes, axes_dim: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions of height and width are centred on each image; picture i lies i frames behind the image."""
    positions = []
    for index, (frames, height, width) in enumerate(image_shapes):
        origin = torch.tensor([index, -(height - height // 2), -(width - width // 2)])
        positions.append(grid_positions(frames, height, width, device=torch.device("cpu")) + origin)
    return _table(torch.cat(positions), axes_dim, device)


@table_cache(32)
def _text_table(first: int, num_tokens: int, axes_dim: tuple[int, ...], device: torch.device) -> Tensor:
    return _table(torch.arange(first, first + num_tokens, device="cpu").unsqueeze(-1).expand(-1, 3), axes_dim, device)


def _table(positions: Tensor, axes_dim: tuple[int, ...], device: torch.device) -> Tensor:
    # A table made under inference mode could never again take part in training.
    with torch.inference_mode(False):
        return rotary_table(positions, axes_dim, precision=torch.float32).to(device)
