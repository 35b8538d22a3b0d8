"""Tiny random components that several families' checkpoints share: text encoders, tokenizers, a picture autoencoder."""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import transformers

from sglang.multimodal_gen.test.tiny_wan import randomised

CLIP_TOKENS = 77


def tiny_clip_tokenizer() -> transformers.CLIPTokenizer:
    """Single letters, in CLIP's layout: a start and an end token, which is padding too."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)


def tiny_clip(seed: int, *, width: int = 24, with_projection: bool = False, **changes: Any) -> Any:
    """An encoder for the tiny CLIP tokenizer."""
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=width,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **changes,
    )
    cls = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    return randomised(cls(config), seed)


def tiny_t5(seed: int, *, width: int = 20, num_heads: int = 3) -> Any:
    """An encoder for `tiny_checkpoints.tiny_tokenizer`."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    return randomised(transformers.T5EncoderModel(config), seed)


def tiny_picture_vae(seed: int, *, latent_channels: int = 4, **changes: Any) -> Any:
    """An AutoencoderKL in FLUX's form: three halvings, no quantisation convolutions."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": latent_channels,
        "scaling_factor": 0.36,
        "shift_factor": 0.12,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return randomised(diffusers.AutoencoderKL(**(config | changes)), seed)


def tiny_word_tokenizer(words: tuple[str, ...], special: tuple[str, ...]) -> Any:
    """A fast tokenizer of whole words and letters, without a form of its own, for chat models.

    `special` tokens come first and are never split; the first of them is padding.
    """
    pieces = [*special, "<unk>", *words, *"abcdefghijklmnopqrstuvwxyz.,:!?"]
    model = tokenizers.models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=special[0],
        unk_token="<unk>",
        additional_special_tokens=list(special[1:]),
    )
