"""Tiny random checkpoints in diffusers layout, every parameter redrawn, for tests of loader and pipelines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import transformers

from sglang.multimodal_gen.test.tiny_wan import TINY_PATCHED_VAE, TINY_TRANSFORMER, TINY_VAE, randomised

TEXT_WIDTH = TINY_TRANSFORMER["text_dim"]
FLOW_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
WORDS = (
    "a",
    "the",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "moving",
    "left",
    "right",
    "small",
    "on",
    "and",
)


@dataclass(frozen=True, kw_only=True)
class TinyWan:
    """What differs between the random checkpoints; all else is `tiny_wan`'s."""

    seed: int = 0
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=lambda: TINY_VAE)
    scheduler: tuple[str, dict[str, Any]] = ("UniPCMultistepScheduler", FLOW_UNIPC)
    text_layers: int = 2
    text: dict[str, Any] = field(default_factory=dict)


# The shapes that a real family has in other sizes: heads, layers, strides, patches and samplers all differ.
TINY_WANS = {
    "plain": TinyWan(),
    "one_head": TinyWan(seed=1, transformer={"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 1}),
    "deep": TinyWan(seed=2, transformer={"num_layers": 4, "ffn_dim": 24}, text_layers=1),
    "patched_vae": TinyWan(seed=3, vae=TINY_PATCHED_VAE),
    "euler": TinyWan(seed=4, scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 5.0})),
    "dpmpp": TinyWan(seed=5, scheduler=("DPMSolverMultistepScheduler", {**FLOW_UNIPC, "flow_shift": 2.0})),
    "no_cross_norm": TinyWan(seed=6, transformer={"cross_attn_norm": False, "num_attention_heads": 3}),
    "wide": TinyWan(seed=7, transformer={"num_attention_heads": 4, "attention_head_dim": 12, "freq_dim": 32}),
}


def save_tiny_wan(directory: Path, recipe: TinyWan | None = None) -> Path:
    """Write the checkpoint that diffusers' own WanPipeline saves."""
    recipe = recipe or TinyWan()
    pipeline = diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(recipe),
        transformer=randomised(diffusers.WanTransformer3DModel(**(TINY_TRANSFORMER | recipe.transformer)), recipe.seed),
        vae=randomised(diffusers.AutoencoderKLWan(**recipe.vae), recipe.seed + 100),
        scheduler=getattr(diffusers, recipe.scheduler[0])(**recipe.scheduler[1]),
    )
    pipeline.save_pretrained(directory)
    return directory


def tiny_text_encoder(recipe: TinyWan) -> transformers.UMT5EncoderModel:
    """An encoder for the tiny tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": recipe.text_layers,
        "num_heads": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    }
    config = transformers.UMT5Config(**(sizes | recipe.text))
    return randomised(transformers.UMT5EncoderModel(config), recipe.seed + 200)


def tiny_tokenizer() -> transformers.T5Tokenizer:
    """Whole words and single letters, in T5's layout: pad 0, end 1, unknown 2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
