"""Wan video transformer, 2.1 and 2.2: text to video, image to video, per-token timesteps.

Source: arXiv:2503.20314, https://github.com/Wan-Video/Wan2.1. Parameter names are those of the published diffusers
checkpoints.

Shapes: B batch, C latent channels, T, H, W latent frames, height, width; S video tokens (one per patch), L text tokens,
I image tokens, D hidden_size, N heads of this rank, E head_dim, G groups of tokens with a timestep of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.attention.padding import fold_padding
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.embedded import NOTHING, Embedded
from sglang.multimodal_gen.runtime.layers.embeddings import TextProjection, TimestepEmbedding, sinusoidal_embedding
from sglang.multimodal_gen.runtime.layers.fused import sum_norm
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.mlp import FeedForward
from sglang.multimodal_gen.runtime.layers.modulation import split_modulations
from sglang.multimodal_gen.runtime.layers.norm import FP32LayerNorm, RMSNorm
from sglang.multimodal_gen.runtime.layers.rotary import rotary_table_3d
from sglang.multimodal_gen.runtime.layers.wide_attention import (
    KeysValues,
    LayeredKeysValues,
    WideNormAttention,
    WideNormSelfAttention,
    stack_keys_values,
)

# What a cache can watch before the first block: the embedding of the timestep, or what is made of it for the blocks.
_TIME_SIGNAL, _MODULATION_SIGNAL = "timestep", "modulation"


class WanCrossAttention(WideNormAttention):
    """Video tokens attend to the text, and apart from it to the first frame's image tokens where the model has them."""

    def __init__(self, config: WanTransformerConfig, context: LayerContext) -> None:
        dim, axis = config.hidden_size, context.parallel.tp
        mask = folds_text_padding(config, context)
        super().__init__(dim, config.num_attention_heads, context, context.cross_attention, eps=config.eps, mask=mask)
        if config.added_kv_proj_dim is not None:
            self.add_k_proj = ColumnParallelLinear(config.added_kv_proj_dim, dim, axis=axis)
            self.add_v_proj = ColumnParallelLinear(config.added_kv_proj_dim, dim, axis=axis)
            self.norm_added_k = RMSNorm(dim, config.eps, axis=axis)

    def image_keys_values(self, image: Tensor | KeysValues) -> KeysValues:
        """What tokens attend to of an image [B, I, D], unless it has been made of it already."""
        if isinstance(image, KeysValues):
            return image
        return KeysValues(self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image))

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor | KeysValues,
        text_mask: Tensor | None,
        image: Tensor | KeysValues | None,
    ) -> Tensor:
        """[B, S, D], a text [B, L, D], its mask [B, 1, 1, L] or None, an image [B, I, D] or None -> [B, S, D].

        Text and image may also be what `keys_values` and `image_keys_values` made of them.
        """
        query = self.split_heads(self.norm_q(self.to_q(hidden_states)))
        key, value = map(self.split_heads, self.keys_values(text))
        attended = self.attention(query, key, value, text_mask)
        if image is not None:
            key, value = map(self.split_heads, self.image_keys_values(image))
            attended = attended + self.attention(query, key, value)
        return self.to_out[0](attended.flatten(2))


def folds_text_padding(config: WanTransformerConfig, context: LayerContext) -> bool:
    """Whether the text's padding is attended to as one token: where the fastest kernel takes the mask for that."""
    return context.cross_attention.takes_mask(config.attention_head_dim)


class WanBlock(nn.Module):
    """Self-attention, text cross-attention and MLP; the first and the last under AdaLN-zero."""

    def __init__(self, config: WanTransformerConfig, context: LayerContext) -> None:
        super().__init__()
        dim = config.hidden_size
        self.eps = config.eps
        self.attn1 = WideNormSelfAttention(dim, config.num_attention_heads, context, eps=config.eps)
        self.norm2 = FP32LayerNorm(dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.attn2 = WanCrossAttention(config, context)
        self.ffn = FeedForward(dim, config.ffn_dim, dim, axis=context.parallel.tp)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor | KeysValues,
        text_mask: Tensor | None,
        image: Tensor | KeysValues | None,
        temb: Tensor,
        freqs_cis: Tensor,
    ) -> Tensor:
        """[B, S, D]; text, mask and image as WanCrossAttention; [B, G, 6, D]; the rotary table -> [B, S, D]."""
        attn_mod, mlp_mod = split_modulations(self.scale_shift_table, temb)
        update = self.attn1(attn_mod.normed(hidden_states, eps=self.eps), freqs_cis)
        if isinstance(self.norm2, FP32LayerNorm):
            hidden_states, normed = self.norm2.of_sum(hidden_states, update, attn_mod.gate)
        else:
            hidden_states = normed = attn_mod.add_gated(hidden_states, update)
        update = self.attn2(normed, text, text_mask, image)
        hidden_states, normed = sum_norm(hidden_states, update, scale=mlp_mod.scale, shift=mlp_mod.shift, eps=self.eps)
        return mlp_mod.add_gated(hidden_states, self.ffn(normed))


class WanImageEmbedding(nn.Module):
    """Projects the image encoder's tokens; with `pos_embed`, first and last frame arrive as two rows per sample."""

    def __init__(self, image_dim: int, hidden_size: int, num_positions: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, hidden_size, approximate="none")
        self.norm2 = FP32LayerNorm(hidden_size)
        self.pos_embed = None if num_positions is None else nn.Parameter(torch.zeros(1, num_positions, image_dim))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """[B, I, image_dim] (with `pos_embed`: [2·B, I/2, image_dim]) -> [B, I, D]."""
        if self.pos_embed is not None:
            image_embeds = image_embeds.reshape(-1, *self.pos_embed.shape[1:]) + self.pos_embed
        return self.norm2(self.ff(self.norm1(image_embeds)))


class WanConditionEmbedder(nn.Module):
    """Timesteps, text and image tokens, each brought to the width of the video tokens."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.freq_dim = config.freq_dim
        self.time_embedder = TimestepEmbedding(config.freq_dim, dim)
        self.time_proj = ReplicatedLinear(dim, 6 * dim)
        self.text_embedder = TextProjection(config.text_dim, dim)
        self.image_embedder = (
            None if config.image_dim is None else WanImageEmbedding(config.image_dim, dim, config.pos_embed_seq_len)
        )

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, G] -> the embedding [B, G, D] and the blocks' modulation [B, G, 6, D]."""
        temb = self.time_embedder(sinusoidal_embedding(timestep, self.freq_dim)).to(dtype)
        return temb, self.time_proj(nn.functional.silu(temb)).unflatten(-1, (6, -1))

    def embed_conditions(self, prompt_embeds: Tensor, image_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """-> text [B, L, D], image [B, I, D] or None."""
        image = None
        if image_embeds is not None:
            if self.image_embedder is None:
                raise InvalidRequest("this Wan transformer takes no image: its config has no image_dim", param="image")
            image = self.image_embedder(image_embeds)
        return self.text_embedder(prompt_embeds), image


class WanTransformer3DModel(nn.Module):
    """Predicts the flow velocity of video latents."""

    keep_in_fp32: ClassVar[tuple[str, ...]] = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    """A parameter stays in fp32 when one of these is a part of its dotted name."""

    keep_unquantized: ClassVar[tuple[str, ...]] = ("condition_embedder", "proj_out")
    """Linear layers within these names keep their weights; `*` is any text."""

    def __init__(self, config: WanTransformerConfig, context: LayerContext | None = None) -> None:
        super().__init__()
        context = LayerContext() if context is None else context
        self.config = config
        self.tokens, self.adapters = context.tokens, context.adapters
        self.block_runner = BlockRunner(
            context,
            num_blocks=config.num_layers,
            changes_text=False,
            signals=(_TIME_SIGNAL, _MODULATION_SIGNAL),
        )
        self.folds_text_padding = folds_text_padding(config, context)
        dim, patch_size = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanConditionEmbedder(config)
        self.blocks = nn.ModuleList([WanBlock(config, context) for _ in range(config.num_layers)])
        self.proj_out = ReplicatedLinear(dim, config.num_output_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.text_width = 2 * config.num_layers * context.parallel.tp.share(dim, "channels")

    def embed_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        text_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """What forwards make of these, as `embedded`: the keys and values of all blocks [B, Y, 2, I + L, N·E], those of
        the image first. Arguments as in `forward`."""
        if text_lengths is not None and self.folds_text_padding:
            encoder_hidden_states, _ = fold_padding(encoder_hidden_states, text_lengths)
        text, image = self.condition_embedder.embed_conditions(encoder_hidden_states, encoder_hidden_states_image)
        attentions = [cast(WanBlock, block).attn2 for block in self.blocks]
        of_text = stack_keys_values(attention.keys_values(text) for attention in attentions)
        if image is None:
            return of_text
        of_image = stack_keys_values(attention.image_keys_values(image) for attention in attentions)
        return torch.cat((of_image, of_text), dim=3)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        text_lengths: Sequence[int] | None = None,
        embedded: Embedded = NOTHING,
    ) -> Tensor:
        """Latents [B, C, T, H, W], timesteps in 0 … 1000 -> velocity [B, C_out, T, H, W].

        `timestep` is [B], or [B, G] for G groups of neighbouring tokens, one for each latent frame (Wan2.2 5B: those of
        a given picture are at 0) or for each token. Text [B, L, text_dim], image [B, I, image_dim].
        `text_lengths`: from there on a row of text is padding, all zeros; it counts all the same, computed once.
        `embedded` is what `embed_text` made of texts and images.

        Raises:
            InvalidRequest: the latents do not divide into patches or exceed the rotary table.
        """
        grid = self.patch_grid(hidden_states)
        text_mask = None
        if text_lengths is not None and self.folds_text_padding:
            encoder_hidden_states, text_mask = fold_padding(encoder_hidden_states, text_lengths)
        num_tokens = math.prod(grid)
        self.tokens.begin(num_tokens)
        freqs_cis = self.tokens.deal(rotary_table_3d(grid, self.config.attention_head_dim, hidden_states.device))
        temb, modulation = self.condition_embedder.embed_time(
            self.tokens.deal_groups(timestep if timestep.ndim == 2 else timestep.unsqueeze(1), num_tokens),
            encoder_hidden_states.dtype,
        )
        text, image = self._conditions(encoder_hidden_states, encoder_hidden_states_image, embedded.text)
        hidden_states = self.block_runner.run(
            (self.tokens.deal(self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()),),
            BlockRun(blocks=self.blocks, given=(text, text_mask, image, modulation, freqs_cis)),
            num_tokens=num_tokens,
            signal=lambda name, _: temb if name == _TIME_SIGNAL else modulation.flatten(2),
        )
        shift, scale = (self.scale_shift_table.float() + temb.float().unsqueeze(2)).unbind(2)
        _, normed = sum_norm(hidden_states, scale=scale, shift=shift, eps=self.config.eps)
        return self.unpatchify(self.tokens.gather(self.proj_out(normed), num_tokens), grid)

    def _conditions(
        self, text: Tensor, image: Tensor | None, embedded: Tensor | None
    ) -> tuple[Tensor | LayeredKeysValues, Tensor | LayeredKeysValues | None]:
        """What blocks attend to of the text and of the image."""
        if embedded is None:
            return self.condition_embedder.embed_conditions(text, image)
        if image is None:
            return LayeredKeysValues(embedded), None
        num_image = math.prod(image.shape[:2]) // embedded.shape[0]  # two pictures of a row are two rows here
        of_image, of_text = embedded.tensor_split([num_image], dim=3)
        return LayeredKeysValues(of_text), LayeredKeysValues(of_image)

    def patch_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Patches of [B, C, T, H, W] along time, height and width."""
        sizes, patch, limit = tuple(latents.shape[2:]), self.config.patch_size, self.config.rope_max_seq_len
        if any(size % side for size, side in zip(sizes, patch, strict=True)):
            raise InvalidRequest(f"latents of {sizes} (frames, height, width) do not divide into patches of {patch}")
        frames, height, width = (size // side for size, side in zip(sizes, patch, strict=True))
        if max(frames, height, width) > limit:
            raise InvalidRequest(f"{frames}x{height}x{width} patches; the model has positions for {limit} on each axis")
        return frames, height, width

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, S, p_t·p_h·p_w·C] -> [B, C, T, H, W]."""
        patches = tokens.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)
        # [B, T', H', W', p_t, p_h, p_w, C]: each patch axis moves behind its grid axis
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
