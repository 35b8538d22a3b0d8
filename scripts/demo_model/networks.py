"""The three networks of the demo model, at full size and at a size for a quick trial of the training script."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.runtime.layers.attention.dispatch import FixedKernel
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan, LayerContext
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import TemporalState
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan, unpatchify

# Text rows at inference: `max_sequence_length` of the Wan pipelines.
TEXT_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Everything that decides the shapes of the three networks."""

    transformer: WanTransformerConfig
    vae: WanVAEConfig
    text_dim: int
    text_layers: int
    text_heads: int
    text_length: int  # tokens of a training caption; longer ones are cut


def full_sizes() -> ModelSizes:
    """The embedded model: 8.0 M transformer, 2.6 M autoencoder, 0.4 M text encoder."""
    return _sizes(heads=4, head_dim=64, ffn=1024, layers=7, base_dim=32, text_dim=128, text_layers=2, text_heads=4)


def trial_sizes() -> ModelSizes:
    """Thousands of parameters: proves the script, learns nothing."""
    return _sizes(heads=2, head_dim=16, ffn=64, layers=2, base_dim=4, text_dim=32, text_layers=1, text_heads=2)


def _sizes(
    *,
    heads: int,
    head_dim: int,
    ffn: int,
    layers: int,
    base_dim: int,
    text_dim: int,
    text_layers: int,
    text_heads: int,
) -> ModelSizes:
    return ModelSizes(
        transformer=WanTransformerConfig(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            ffn_dim=ffn,
            num_layers=layers,
            text_dim=text_dim,
        ),
        vae=WanVAEConfig(
            base_dim=base_dim,
            dim_mult=(1, 2, 2),
            num_res_blocks=1,
            temperal_downsample=(True, True),
            patch_size=2,
            in_channels=12,
            out_channels=12,
            latents_mean=(0.0,) * 16,
            latents_std=(1.0,) * 16,
        ),
        text_dim=text_dim,
        text_layers=text_layers,
        text_heads=text_heads,
        text_length=64,
    )


class PaddedTextAttention:
    """Attention to the text rows of inference, most of which are equal, at the price of those that differ.

    The pipelines pad the encoder's output with zero rows to 512 and attend to all of them. Equal rows have equal keys
    and values, so n of them weigh as one whose logit is larger by log(n). The last key stands for `repeats` rows.
    """

    name: ClassVar[str] = "padded_text"

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """[B, S, H, E], [B, L, H, E], [B, L, H, E] -> [B, S, H, E]."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        last = torch.arange(key.shape[2], device=key.device) == key.shape[2] - 1
        bias = (last * math.log(self.repeats)).to(query.dtype).expand(1, 1, query.shape[2], -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(1, 2)


def build_transformer(sizes: ModelSizes, *, folded_text: bool) -> WanTransformer3DModel:
    """With `folded_text` it takes `text_length` text rows, the last of which stands for all the padding."""
    if not folded_text:
        return WanTransformer3DModel(sizes.transformer)
    repeats = TEXT_ROWS - sizes.text_length + 1
    folded = FixedKernel(role="cross", fixed=PaddedTextAttention(repeats))
    return WanTransformer3DModel(sizes.transformer, LayerContext(cross_attention=AttentionPlan(source=folded)))


def build_vae(sizes: ModelSizes, statistics: dict[str, list[float]] | None = None) -> AutoencoderKLWan:
    """`statistics`: `latents_mean` and `latents_std`, measured after the autoencoder's training."""
    if statistics is None:
        return AutoencoderKLWan(sizes.vae)
    mean, std = (tuple(statistics[key]) for key in ("latents_mean", "latents_std"))
    return AutoencoderKLWan(dataclasses.replace(sizes.vae, latents_mean=mean, latents_std=std))


def build_text_encoder(sizes: ModelSizes, vocabulary_size: int) -> UMT5EncoderModel:
    """UMT5 with gated-GELU layers, as Wan's but narrow."""
    config = UMT5Config(
        vocab_size=-(-vocabulary_size // 64) * 64,
        d_model=sizes.text_dim,
        d_kv=sizes.text_dim // sizes.text_heads,
        d_ff=2 * sizes.text_dim,
        num_layers=sizes.text_layers,
        num_heads=sizes.text_heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    model = UMT5EncoderModel(config)
    # The other kernels look at the mask's values, and so make the host wait for the device in every step.
    model.set_attn_implementation("eager")
    # Releases of transformers differ in when they tie these two; training must never part them.
    model.encoder.embed_tokens = model.shared
    # The default of 1 would let words that training never meets outshout those that it does.
    nn.init.normal_(model.shared.weight, std=0.1)
    return model


def encode_text(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids and mask [B, L] -> hidden states [B, L, D], zero where there is no token.

    The last row is always zero: it stands for the padding (`PaddedTextAttention`).
    """
    hidden_states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    keep = mask.bool() & (torch.arange(mask.shape[1], device=mask.device) < mask.shape[1] - 1)
    return hidden_states * keep.unsqueeze(-1)


def autoencode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Video [B, 3, T, H, W] -> reconstruction from one latent draw, not clamped, and the draw's mean and logvar."""
    latents = vae.encode(video)
    state = TemporalState(carry=False)
    patches = vae.decode_tile(latents.sample(), state)
    return unpatchify(patches, vae.config.patch_size or 1), latents.mean, latents.logvar
