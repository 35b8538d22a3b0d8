"""LTX-Video transformer: text to video, and image to video through timesteps that differ between frames.

Source: arXiv:2501.00103, https://github.com/Lightricks/LTX-Video. Parameter names are those of the published diffusers
checkpoints.

Shapes: B batch, S video tokens (one per latent cell), G groups of tokens with one timestep each, L text tokens, C token
channels, D hidden_size, N heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.ltx import LTXVideoTransformerConfig
from sglang.multimodal_gen.runtime.layers.attention.padding import drop_padding
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.embeddings import TextProjection
from sglang.multimodal_gen.runtime.layers.fused import sum_norm
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.mlp import FeedForward
from sglang.multimodal_gen.runtime.layers.modulation import AdaLayerNormSingle, split_modulations
from sglang.multimodal_gen.runtime.layers.wide_attention import (
    KeysValues,
    LayeredKeysValues,
    WideNormCrossAttention,
    WideNormSelfAttention,
    stack_keys_values,
)

_MLP_RATIO = 4
_QK_NORM_EPS = 1e-5
_NORM_OUT_EPS = 1e-6


class LTXVideoTransformerBlock(nn.Module):
    """Self-attention, text cross-attention and MLP; the first and the last under AdaLN-single."""

    def __init__(self, config: LTXVideoTransformerConfig, context: LayerContext) -> None:
        super().__init__()
        dim, heads, biases = config.hidden_size, config.num_attention_heads, _biases(config)
        self.eps = config.norm_eps
        self.attn1 = WideNormSelfAttention(dim, heads, context, eps=_QK_NORM_EPS, **biases)
        self.attn2 = WideNormCrossAttention(
            dim, heads, context, eps=_QK_NORM_EPS, key_size=config.cross_attention_dim, **biases
        )
        self.ff = FeedForward(dim, _MLP_RATIO * dim, dim, axis=context.parallel.tp)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def modulated(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """What its self-attention sees: [B, S, D], [B, G, 6, D] -> [B, S, D]."""
        return split_modulations(self.scale_shift_table, temb)[0].normed(hidden_states, eps=self.eps, rms=True)

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor | KeysValues,
        text_mask: Tensor | None,
        temb: Tensor,
        freqs_cis: Tensor,
    ) -> Tensor:
        """[B, S, D]; text and mask as WideNormCrossAttention; [B, G, 6, D]; the rotary table -> [B, S, D]."""
        attn_mod, mlp_mod = split_modulations(self.scale_shift_table, temb)
        update = self.attn1(attn_mod.normed(hidden_states, eps=self.eps, rms=True), freqs_cis)
        hidden_states = attn_mod.add_gated(hidden_states, update)
        hidden_states, normed = sum_norm(
            hidden_states,
            self.attn2(hidden_states, text, text_mask),
            scale=mlp_mod.scale,
            shift=mlp_mod.shift,
            rms=True,
            eps=self.eps,
        )
        return mlp_mod.add_gated(hidden_states, self.ff(normed))


class LTXVideoTransformer3DModel(nn.Module):
    """Predicts the flow velocity of packed video latents."""

    keep_unquantized: ClassVar[tuple[str, ...]] = ("proj_in", "time_embed", "caption_projection", "proj_out")
    """Linear layers within these names keep their weights; `*` is any text."""

    def __init__(self, config: LTXVideoTransformerConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.tp = context.parallel.tp
        self.tokens, self.adapters = context.tokens, context.adapters
        self.block_runner = BlockRunner(context, num_blocks=config.num_layers, changes_text=False)
        dim = config.hidden_size
        self.proj_in = ReplicatedLinear(config.in_channels, dim)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.time_embed = AdaLayerNormSingle(dim)
        self.caption_projection = TextProjection(config.caption_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            [LTXVideoTransformerBlock(config, context) for _ in range(config.num_layers)]
        )
        self.proj_out = ReplicatedLinear(dim, config.num_output_channels)
        self.text_width = 2 * config.num_layers * self.tp.share(dim, "channels")

    def embed_text(self, encoder_hidden_states: Tensor, text_lengths: Sequence[int]) -> Tensor:
        """What forwards make of these, as `embedded`: the keys and values of all blocks [B, Y, 2, L, N·E] for as many
        tokens as the longest text has. Arguments as in `forward`."""
        text, _ = drop_padding(encoder_hidden_states, text_lengths)
        text = self.caption_projection(text)
        return stack_keys_values(
            cast(LTXVideoTransformerBlock, block).attn2.keys_values(text) for block in self.transformer_blocks
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        freqs_cis: Tensor,
        text_lengths: Sequence[int],
        embedded: Embedded = NOTHING,
    ) -> Tensor:
        """Tokens [B, S, C], timesteps in 0 … 1000, text [B, L, D_text] -> velocity [B, S, C_out].

        `timestep` is [B], or [B, G] where G equal runs of tokens have one each. `freqs_cis` [1 or B, S, N, E/2, 2] is
        `fractional_rotary_table`'s. `text_lengths`: from there on a row of text is padding, which nothing attends to.
        `embedded` is what `embed_text` made of texts.
        """
        num_tokens = hidden_states.shape[1]
        self.tokens.begin(num_tokens)
        timestep = self.tokens.deal_groups(timestep.unsqueeze(1) if timestep.ndim == 1 else timestep, num_tokens)
        raw_text, text_mask = drop_padding(encoder_hidden_states, text_lengths)
        text = self.caption_projection(raw_text) if embedded.text is None else LayeredKeysValues(embedded.text)
        modulation, temb = self.time_embed(timestep, hidden_states.dtype)
        freqs_cis = self.tokens.deal(self.of_own_heads(freqs_cis))
        first_block = cast(LTXVideoTransformerBlock, self.transformer_blocks[0])
        hidden_states = self.block_runner.run(
            (self.proj_in(self.tokens.deal(hidden_states)),),
            BlockRun(blocks=self.transformer_blocks, given=(text, text_mask, modulation, freqs_cis)),
            num_tokens=num_tokens,
            signal=lambda _, tokens: first_block.modulated(tokens, modulation),
        )
        shift, scale = (self.scale_shift_table.float() + temb.float().unsqueeze(2)).unbind(2)
        _, normed = sum_norm(hidden_states, scale=scale, shift=shift, eps=_NORM_OUT_EPS)
        return self.tokens.gather(self.proj_out(normed), num_tokens)

    def of_own_heads(self, freqs_cis: Tensor) -> Tensor:
        """The table's part for the heads of this rank: each head has rotations of its own."""
        if self.tp.size == 1:
            return freqs_cis
        return freqs_cis.chunk(self.tp.size, dim=2)[self.tp.rank].contiguous()


def _biases(config: LTXVideoTransformerConfig) -> dict[str, bool]:
    return {"bias": config.attention_bias, "out_bias": config.attention_out_bias}
