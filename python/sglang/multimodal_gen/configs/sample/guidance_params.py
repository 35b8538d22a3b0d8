"""Guidance beyond one scale, and what only some models have: a second expert, a shift that follows the size, a decoder
that takes a timestep."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.declare import FROM_MODEL, arg


@dataclass(frozen=True, kw_only=True)
class GuidanceParams:
    """Each is used by the models that have it."""

    true_cfg_scale: float | None = arg(
        None,
        help="Classifier-free guidance of models whose guidance scale is an input of the transformer; 1 or less "
        "switches it off.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1000.0,
        recorded=True,
    )
    guidance_scale_2: float | None = arg(
        None,
        help="Guidance scale of the second transformer, which runs at low noise.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1000.0,
        recorded=True,
    )
    cfg_normalization: float | None = arg(
        None,
        help="How far the guided prediction's norm may exceed the conditional one's, as a factor; 0 leaves it alone.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1000.0,
        recorded=True,
    )
    cfg_truncation: float | None = arg(
        None,
        help="Normalised time after which classifier-free guidance stops; 1 never stops it.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    cfg_interval_start: float | None = arg(
        None,
        help="Share of the steps before classifier-free guidance begins (arXiv:2404.07724).",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    cfg_interval_end: float | None = arg(
        None,
        help="Share of the steps after which classifier-free guidance ends; not below the start.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    skip_guidance_layers: tuple[int, ...] | None = arg(
        None,
        help="Layers of the transformer, counted from 0, that a further forward of the prompt leaves out; guided steps "
        "move away from what it predicts (skip layer guidance).",
        group="denoising",
        unset="no such forward",
        minimum=0,
        maximum=1000,
        recorded=True,
    )
    skip_layer_guidance_scale: float | None = arg(
        None,
        help="How far steps move away from the prediction without those layers; 0 switches it off.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1000.0,
        recorded=True,
    )
    skip_layer_guidance_start: float | None = arg(
        None,
        help="Share of the steps after which that begins; less than the stop.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    skip_layer_guidance_stop: float | None = arg(
        None,
        help="Share of the steps before which that ends.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    mu: float | None = arg(
        None,
        help="Timestep shift of models that derive theirs from the size, as they count it: for most the logarithm of "
        "`flow_shift`.",
        group="denoising",
        unset="derived from the size",
        minimum=-10.0,
        maximum=10.0,
        recorded=True,
    )
    boundary_ratio: float | None = arg(
        None,
        help="Noise level, as a share of the training timesteps, below which the second transformer takes over.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    decode_timestep: float | None = arg(
        None,
        help="Timestep that the decoder is given, of VAEs that take one.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    decode_noise_scale: float | None = arg(
        None,
        help="Noise that is added to the latents before such a VAE decodes them.",
        group="denoising",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
