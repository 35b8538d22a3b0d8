"""Tiny random checkpoints of pipelines that only diffusers has, every parameter redrawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from sglang.multimodal_gen.test.tiny_checkpoints import WORDS, tiny_tokenizer
from sglang.multimodal_gen.test.tiny_wan import randomised

_WIDTH = 16
_TONES = {"cogvideox": 0.02, "mochi": 0.03}
"""What the last layer of the decoder is multiplied by."""
_CLIP_WORDS = ("<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz")


def clip_tokenizer() -> Any:
    """Single letters and a few words of them; id 1 ends a text."""
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(_CLIP_WORDS))}
    vocab |= {f"{letter}</w>": len(vocab) + index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip_encoder(seed: int, *, with_projection: bool = False) -> Any:
    """For `clip_tokenizer`."""
    config = transformers.CLIPTextConfig(
        vocab_size=80,
        hidden_size=_WIDTH,
        intermediate_size=24,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    cls = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    return randomised(cls(config), seed)


def t5_encoder(seed: int, width: int = _WIDTH) -> Any:
    """For `tiny_tokenizer`."""
    config = transformers.T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2, relative_attention_num_buckets=8
    )
    return randomised(transformers.T5EncoderModel(config), seed)


def gemma_encoder(seed: int) -> Any:
    """For `tiny_tokenizer`, whose ids serve any model."""
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=_WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return randomised(transformers.Gemma2Model(config), seed)


def image_vae(seed: int, *, latent_channels: int = 4, blocks: int = 2) -> Any:
    """An autoencoder of images that halves the sides once less than it has blocks."""
    return randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            latent_channels=latent_channels,
            norm_num_groups=4,
            scaling_factor=0.7,
            shift_factor=0.1,
        ),
        seed,
    )


def unet(seed: int, **options: Any) -> Any:
    """A U-Net with one level of cross-attention."""
    return randomised(
        diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            **({"cross_attention_dim": _WIDTH, "attention_head_dim": 4} | options),
        ),
        seed,
    )


def stable_diffusion(seed: int) -> Any:
    """SD 1.5, with the sampler that takes one step more than it is asked for."""
    return diffusers.StableDiffusionPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=clip_encoder(seed),
        unet=unet(seed + 1),
        vae=image_vae(seed + 2),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_pag(seed: int) -> Any:
    """SD 1.5 with a guidance that replaces the attention of the shared U-Net while a call runs."""
    base = stable_diffusion(seed)
    components = {name: value for name, value in base.components.items() if name != "scheduler"}
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPAGPipeline(
        **components, scheduler=scheduler, requires_safety_checker=False, pag_applied_layers="mid"
    )


def stable_diffusion_xl(seed: int) -> Any:
    """SDXL, with a sampler that takes two steps for one."""
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        text_encoder=clip_encoder(seed),
        text_encoder_2=clip_encoder(seed + 1, with_projection=True),
        unet=unet(
            seed + 2,
            cross_attention_dim=2 * _WIDTH,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
        ),
        vae=image_vae(seed + 3),
        scheduler=diffusers.HeunDiscreteScheduler(beta_schedule="scaled_linear"),
    )


def sana(seed: int) -> Any:
    """Sana, which would bin sizes."""
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=_WIDTH,
        sample_size=16,
    )
    return diffusers.SanaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=gemma_encoder(seed),
        transformer=randomised(transformer, seed + 1),
        vae=randomised(vae, seed + 2),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def pixart_sigma(seed: int) -> Any:
    """PixArt-Sigma, which has the old callback and would bin sizes."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=_WIDTH,
        out_channels=8,
        use_additional_conditions=False,
        norm_num_groups=4,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=t5_encoder(seed),
        transformer=randomised(transformer, seed + 1),
        vae=image_vae(seed + 2),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def chroma(seed: int) -> Any:
    """Chroma, which packs its latents and would round sizes."""
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=t5_encoder(seed),
        transformer=randomised(transformer, seed + 1),
        vae=image_vae(seed + 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def lumina2(seed: int) -> Any:
    """Lumina Image 2.0, whose autoencoder has the stride that the pipeline takes for granted."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=_WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=gemma_encoder(seed),
        transformer=randomised(transformer, seed + 1),
        vae=image_vae(seed + 2, blocks=4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def cogvideox(seed: int) -> Any:
    """CogVideoX with dynamic guidance's usual sampler."""
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=_WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=32,
        sample_width=32,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=t5_encoder(seed),
        transformer=randomised(transformer, seed + 1),
        vae=randomised(vae, seed + 2),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def mochi(seed: int) -> Any:
    """Mochi 1."""
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=_WIDTH,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return diffusers.MochiPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=t5_encoder(seed),
        transformer=randomised(transformer, seed + 1),
        vae=randomised(vae, seed + 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


def allegro(seed: int) -> Any:
    """Allegro, which decodes in tiles or not at all."""
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=48,
        sample_width=16,
        sample_height=16,
        sample_frames=6,
        caption_channels=_WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=128
    )
    return diffusers.AllegroPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=t5_encoder(seed),
        transformer=randomised(transformer, seed + 1),
        vae=randomised(vae, seed + 2),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )


def latent_diffusion(seed: int) -> Any:
    """The first latent diffusion, whose call says nothing of its steps and takes a stride of 8 for granted."""
    return diffusers.LDMTextToImagePipeline(
        vqvae=image_vae(seed, blocks=4),
        bert=t5_encoder(seed + 1),
        tokenizer=tiny_tokenizer(),
        unet=unet(seed + 2),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
    )


TINY_FALLBACKS: dict[str, Callable[[int], Any]] = {
    "sd15": stable_diffusion,
    "sd15_pag": stable_diffusion_pag,
    "sdxl": stable_diffusion_xl,
    "sana": sana,
    "pixart_sigma": pixart_sigma,
    "chroma": chroma,
    "lumina2": lumina2,
    "cogvideox": cogvideox,
    "mochi": mochi,
    "allegro": allegro,
    "ldm": latent_diffusion,
}


def save_tiny_fallback(directory: Path, name: str) -> Path:
    """Write the checkpoint as diffusers saves it."""
    pipeline = TINY_FALLBACKS[name](7 * list(TINY_FALLBACKS).index(name))
    vae = pipeline.vqvae if name == "ldm" else pipeline.vae
    with torch.no_grad():  # pixels that are only black and white would tell little
        for parameter in list(vae.decoder.parameters())[-2:]:
            parameter.mul_(_TONES.get(name, 0.3))
    pipeline.save_pretrained(directory)
    return directory
