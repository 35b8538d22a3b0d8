"""Tiny Z-Image transformers beside their diffusers counterparts, and whole checkpoints, all with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from sglang.multimodal_gen.configs.models.dits.zimage import ZImageTransformerConfig
from sglang.multimodal_gen.runtime.models.dits.zimage import ZImageTransformer2DModel
from sglang.multimodal_gen.test.tiny_parts import tiny_picture_vae, tiny_word_tokenizer
from sglang.multimodal_gen.test.tiny_wan import randomised

TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 20,
    "axes_dims": [8, 8, 8],
    "axes_lens": [160, 32, 48],
}


def tiny_transformer(seed: int = 0, **changes: Any) -> nn.Module:
    """diffusers' transformer with all parameters redrawn, learnt padding included."""
    return randomised(diffusers.ZImageTransformer2DModel(**(TINY_TRANSFORMER | changes)), seed)


def transformer_pair(seed: int = 0, **changes: Any) -> tuple[nn.Module, ZImageTransformer2DModel]:
    """diffusers' transformer and ours, equal weights."""
    reference = tiny_transformer(seed, **changes)
    ours = ZImageTransformer2DModel(ZImageTransformerConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def padded_rows(texts: list[torch.Tensor], length: int) -> torch.Tensor:
    """Texts [l, D] -> [B, length, D], rubbish behind the end of each."""
    rows = torch.full((len(texts), length, texts[0].shape[1]), 7.0)
    for row, text in enumerate(texts):
        rows[row, : len(text)] = text
    return rows


WORDS = ("user", "assistant", "thinking", "red", "green", "blue", "circle", "square", "star", "moving", "small", "and")
# Says whether it was asked to think, and where the conversation goes on.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    "{% if enable_thinking %}thinking{% endif %}"
)
DYNAMIC_SHIFT = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


@dataclass(frozen=True, kw_only=True)
class TinyZImage:
    """What differs between the random checkpoints."""

    seed: int = 0
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=lambda: {"shift": 6.0})
    text_encoder: str = "Qwen3Model"


TINY_Z_IMAGES = {
    "base": TinyZImage(),
    "turbo": TinyZImage(seed=1, scheduler={"shift": 3.0}, text_encoder="Qwen3ForCausalLM"),
    "dynamic": TinyZImage(
        seed=2,
        transformer={"dim": 72, "n_heads": 3, "n_kv_heads": 3, "n_layers": 1, "n_refiner_layers": 2},
        scheduler=DYNAMIC_SHIFT,
    ),
    "shallow_vae": TinyZImage(
        seed=3,
        transformer={"in_channels": 8},
        vae={
            "latent_channels": 8,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
    ),
}


def tiny_chat_tokenizer() -> Any:
    """Whole words, and a template."""
    tokenizer = tiny_word_tokenizer(WORDS, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_qwen3(class_name: str, seed: int) -> Any:
    """A language model for that tokenizer."""
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=TINY_TRANSFORMER["cap_feat_dim"],
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    return randomised(getattr(transformers, class_name)(config), seed)


def save_tiny_zimage(directory: Path, recipe: TinyZImage) -> Path:
    """Write the checkpoint that diffusers' own pipeline saves."""
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**recipe.scheduler),
        vae=tiny_picture_vae(recipe.seed + 100, **recipe.vae),
        text_encoder=tiny_qwen3(recipe.text_encoder, recipe.seed + 200),
        tokenizer=tiny_chat_tokenizer(),
        transformer=tiny_transformer(recipe.seed, **recipe.transformer),
    )
    pipeline.save_pretrained(directory)
    return directory
