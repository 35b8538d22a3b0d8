"""Transformer blocks over an image and a text stream, and over both as one sequence, under AdaLN-zero.

Parameter names are those of published diffusers checkpoints. Source: arXiv:2403.03206, arXiv:2302.05442 (parallel MLP).

Shapes: B batch, S image or video tokens, L text tokens, D hidden_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.attention.layouts import arrived
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.joint_attention import JointAttention, SelfAttention
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.multimodal_gen.runtime.layers.mlp import FeedForward
from sglang.multimodal_gen.runtime.layers.modulation import (
    AdaLayerNormZero,
    Modulation,
    PartedEmbedding,
    PartedModulation,
)
from sglang.multimodal_gen.runtime.layers.side_stream import side_by_side
from sglang.multimodal_gen.runtime.layers.step_embedding import StepEmbedding


class Stream(NamedTuple):
    """One stream in a dual-stream block: tokens [B, S, D], the modulations of attention and MLP, and the MLP."""

    hidden_states: Tensor
    attn_mod: Modulation | PartedModulation
    mlp_mod: Modulation | PartedModulation
    mlp: nn.Module

    def after_attention(self, update: Tensor) -> Tensor:
        """The tokens with the attention's update and then the MLP's."""
        # Both modulations are of one kind: they come from one embedding.
        hidden_states, normed = self.attn_mod.add_gated_normed(self.hidden_states, update, self.mlp_mod)  # type: ignore[arg-type]
        return self.mlp_mod.add_gated(hidden_states, self.mlp(normed))


def joint_update(
    attn: JointAttention, image: Stream, text: Stream, freqs_cis: Tensor | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both streams attend to both, then each to its own MLP -> image [B, S, D], text [B, L, D]."""
    of_image, of_text = attn.joint_attend(
        image.attn_mod.normed(image.hidden_states), text.attn_mod.normed(text.hidden_states), freqs_cis, mask
    )
    new_text, new_image = side_by_side(
        lambda: text.after_attention(attn.to_add_out(of_text)),
        lambda: image.after_attention(attn.to_out[0](of_image)),
    )
    return new_image, new_text


class DualStreamBlock(nn.Module):
    """Image and text tokens with weights of their own, joined in attention."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        context: LayerContext,
        *,
        ffn_dim: int,
        text_first: bool = True,
        mask: bool = False,
    ) -> None:
        super().__init__()
        axis = context.parallel.tp
        self.norm1 = AdaLayerNormZero(hidden_size, num_modulations=2)
        self.norm1_context = AdaLayerNormZero(hidden_size, num_modulations=2)
        self.attn = JointAttention(hidden_size, num_heads, head_dim, context, text_first=text_first, mask=mask)
        self.ff = FeedForward(hidden_size, ffn_dim, hidden_size, axis=axis)
        self.ff_context = FeedForward(hidden_size, ffn_dim, hidden_size, axis=axis)

    @property
    def step_width(self) -> int:
        """See Modulated."""
        return self.norm1.step_width + self.norm1_context.step_width

    def step_values(self, temb: Tensor) -> Tensor:
        """See Modulated."""
        return torch.cat((self.norm1.step_values(temb), self.norm1_context.step_values(temb)), dim=1)

    def modulated(self, hidden_states: Tensor, step: StepEmbedding | PartedEmbedding) -> Tensor:
        """What the attention sees of the image: [B, S, D], the step for this block -> [B, S, D]."""
        of_image, _ = self._steps(step, None)
        return self.norm1(of_image)[0].normed(hidden_states)

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor,
        step: StepEmbedding | PartedEmbedding,
        freqs_cis: Tensor | None,
        mask: Tensor | None = None,
        *,
        text_step: StepEmbedding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, L, D], the step, the table and mask [B, 1, 1, S + L] of both -> [B, S, D], [B, L, D].

        `text_step` is the text's where it has another than the image; of neither anything is known before then.
        """
        of_image, of_text = self._steps(step, text_step)
        attn_mod, mlp_mod = self.norm1(of_image)
        text_attn_mod, text_mlp_mod = self.norm1_context(of_text)
        return joint_update(
            self.attn,
            Stream(hidden_states, attn_mod, mlp_mod, self.ff),
            Stream(text, text_attn_mod, text_mlp_mod, self.ff_context),
            freqs_cis,
            mask,
        )

    def _steps(
        self, step: StepEmbedding | PartedEmbedding, text_step: StepEmbedding | None
    ) -> tuple[StepEmbedding | PartedEmbedding, StepEmbedding | PartedEmbedding]:
        if isinstance(step, PartedEmbedding):
            return step, step if text_step is None else text_step
        of_image, of_text = step.divided(self.norm1.linear, self.norm1_context.linear)
        return of_image, of_text if text_step is None else text_step


class SingleStreamBlock(nn.Module):
    """One sequence of image and text tokens; attention and MLP side by side."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        context: LayerContext,
        *,
        ffn_dim: int,
        mask: bool = False,
    ) -> None:
        super().__init__()
        axis, inner = context.parallel.tp, num_heads * head_dim
        self.norm = AdaLayerNormZero(hidden_size, num_modulations=1)
        self.attn = SelfAttention(hidden_size, num_heads, head_dim, context, projects_out=False, mask=mask)
        self.num_mlp_parts = 1 if context.parallel.ulysses.size == 1 else 2
        self.proj_mlp = ColumnParallelLinear(hidden_size, ffn_dim, axis=axis)
        self.proj_out = RowParallelLinear(inner + ffn_dim, hidden_size, axis=axis, blocks=(inner, ffn_dim))

    @property
    def step_width(self) -> int:
        """See Modulated."""
        return self.norm.step_width

    def step_values(self, temb: Tensor) -> Tensor:
        """See Modulated."""
        return self.norm.step_values(temb)

    def forward(
        self,
        hidden_states: Tensor,
        step: StepEmbedding | PartedEmbedding,
        freqs_cis: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D], the step, table and mask [B, 1, 1, S] of these tokens -> [B, S, D]."""
        [modulation] = self.norm(step)
        normed = modulation.normed(hidden_states)
        sent = self.attn.project(normed, freqs_cis)
        # With exchanges a part of the MLP for each of them, to be computed meanwhile.
        later = self.proj_out.fuses_gelu
        parts = self.proj_mlp.output_parts(normed, self.num_mlp_parts, gelu=not later)
        mlp = [next(parts)]
        attended = self.attn.begin_attending(*sent, mask)
        update = self.proj_out.of_parts(arrived(attended).flatten(2), *mlp, *parts, gelu_from=1 if later else None)
        return modulation.add_gated(hidden_states, update)
