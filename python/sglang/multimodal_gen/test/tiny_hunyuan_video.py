"""Tiny HunyuanVideo models with random weights, beside their diffusers counterparts with the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import transformers
from torch import nn

from sglang.multimodal_gen.configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.hunyuan_video import HunyuanVideoVAEConfig
from sglang.multimodal_gen.runtime.models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.hunyuan_video_vae import AutoencoderKLHunyuanVideo
from sglang.multimodal_gen.test.tiny_checkpoints import WORDS
from sglang.multimodal_gen.test.tiny_parts import tiny_clip, tiny_clip_tokenizer
from sglang.multimodal_gen.test.tiny_wan import randomised

TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 3.0,
    "text_embed_dim": 20,
    "pooled_projection_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}

TINY_VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (4, 8, 8, 12),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.6,
}

SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
)
PICTURE_SIDE, PICTURE_PATCH = 48, 2
"""576 patches, as many as the published image encoder has."""


@dataclass(frozen=True, kw_only=True)
class TinyHunyuanVideo:
    """What differs between the random checkpoints."""

    seed: int = 0
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    shift: float = 7.0
    pipeline: str = "HunyuanVideoPipeline"
    text: dict[str, Any] = field(default_factory=dict)


TINY_HUNYUAN_VIDEOS = {
    "t2v": TinyHunyuanVideo(),
    "no_guidance": TinyHunyuanVideo(
        seed=1, transformer={"guidance_embeds": False, "num_attention_heads": 3, "num_layers": 1}, shift=17.0
    ),
    "wide": TinyHunyuanVideo(
        seed=2,
        transformer={"attention_head_dim": 24, "rope_axes_dim": (4, 8, 12), "num_refiner_layers": 2},
        vae={"layers_per_block": 2, "block_out_channels": (8, 8, 16, 16), "scaling_factor": 1.3},
    ),
    "i2v": TinyHunyuanVideo(
        seed=3, transformer={"image_condition_type": "token_replace"}, pipeline="HunyuanVideoImageToVideoPipeline"
    ),
    "i2v_33ch": TinyHunyuanVideo(
        seed=4,
        transformer={"image_condition_type": "latent_concat", "in_channels": 9, "guidance_embeds": False},
        pipeline="HunyuanVideoImageToVideoPipeline",
    ),
    "skyreels": TinyHunyuanVideo(
        seed=5, transformer={"in_channels": 8}, pipeline="HunyuanSkyreelsImageToVideoPipeline"
    ),
}


def save_tiny_hunyuan_video(directory: Path, recipe: TinyHunyuanVideo) -> Path:
    """Write the checkpoint that diffusers' own pipeline saves."""
    seed, width = recipe.seed, TINY_TRANSFORMER["text_embed_dim"]
    components: dict[str, Any] = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=recipe.shift),
        "tokenizer": tiny_llama_tokenizer(),
        "text_encoder_2": tiny_clip(seed + 300, width=TINY_TRANSFORMER["pooled_projection_dim"]),
        "tokenizer_2": tiny_clip_tokenizer(),
        "transformer": randomised(
            diffusers.HunyuanVideoTransformer3DModel(**(TINY_TRANSFORMER | recipe.transformer)), seed
        ),
        "vae": randomised(diffusers.AutoencoderKLHunyuanVideo(**(TINY_VAE | recipe.vae)), seed + 100),
    }
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    llama = transformers.LlamaConfig(**(sizes | recipe.text))
    if recipe.pipeline == "HunyuanVideoImageToVideoPipeline":
        side = {"height": PICTURE_SIDE, "width": PICTURE_SIDE}
        components["image_processor"] = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": PICTURE_SIDE}, crop_size=side
        )
        components["text_encoder"] = randomised(tiny_llava(llama), seed + 200)
    else:
        components["text_encoder"] = randomised(transformers.LlamaModel(llama), seed + 200)
    getattr(diffusers, recipe.pipeline)(**components).save_pretrained(directory)
    return directory


def tiny_llava(llama: transformers.LlamaConfig) -> Any:
    """LLaVA with an image encoder that has as many patches as the published one."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=PICTURE_SIDE,
        patch_size=PICTURE_PATCH,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=llama,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
    )
    return transformers.LlavaForConditionalGeneration(config)


def tiny_llama_tokenizer() -> Any:
    """Whole words, with as many tokens in the prompts' templates as the published tokenizer makes, or one more."""
    pieces = [*SPECIAL_TOKENS, "<unk>", "\n\n", *WORDS, "video", "objects", "relation", "ships", ".", ","]
    model = tokenizers.models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"relation|\n\n|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        padding_side="right",
    )


def transformer_pair(seed: int = 0, **changes: Any) -> tuple[nn.Module, HunyuanVideoTransformer3DModel]:
    """diffusers' transformer and ours, equal weights."""
    reference = randomised(diffusers.HunyuanVideoTransformer3DModel(**(TINY_TRANSFORMER | changes)), seed)
    ours = HunyuanVideoTransformer3DModel(HunyuanVideoTransformerConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def vae_pair(seed: int = 0, **changes: Any) -> tuple[nn.Module, AutoencoderKLHunyuanVideo]:
    """diffusers' autoencoder and ours, equal weights."""
    reference = randomised(diffusers.AutoencoderKLHunyuanVideo(**(TINY_VAE | changes)), seed)
    ours = AutoencoderKLHunyuanVideo(HunyuanVideoVAEConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours
