"""Published architectures: our modules have exactly diffusers' parameters, without a weight being allocated."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from sglang.multimodal_gen.configs.models.dits import WanTransformerConfig
from sglang.multimodal_gen.configs.models.vaes import WanVAEConfig
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan

# Arguments that differ from the class default, and the number of parameters of the published files.
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "Wan2.1-T2V-1.3B": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1_418_996_800),
    "Wan2.1-T2V-14B": ({}, 14_288_491_584),
    "Wan2.1-I2V-14B": ({"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 16_394_878_784),
    "Wan2.1-FLF2V-14B": (
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
        16_395_536_704,
    ),
    "Wan2.2-I2V-A14B": ({"in_channels": 36}, 14_288_901_184),
    "Wan2.2-TI2V-5B": (
        {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30},
        4_999_787_712,
    ),
}
VAES: dict[str, tuple[dict[str, Any], int]] = {
    "wan2.1": ({}, 126_892_531),
    "wan2.2-5b": (
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
        704_688_668,
    ),
}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_has_the_parameters_of_the_published_checkpoint(name: str) -> None:
    arguments, num_parameters = TRANSFORMERS[name]
    with torch.device("meta"):
        reference = diffusers.WanTransformer3DModel(**arguments)
        ours = WanTransformer3DModel(WanTransformerConfig.from_dict(dict(reference.config)))
    assert shapes(ours) == shapes(reference)
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_parameters


@pytest.mark.parametrize("name", VAES)
def test_autoencoder_has_the_parameters_of_the_published_checkpoint(name: str) -> None:
    arguments, num_parameters = VAES[name]
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLWan(**arguments)
        ours = AutoencoderKLWan(WanVAEConfig.from_dict(dict(reference.config)))
    assert shapes(ours) == shapes(reference)
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_parameters


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(WanTransformerConfig(), diffusers.WanTransformer3DModel), (WanVAEConfig(), diffusers.AutoencoderKLWan)],
)
def test_config_defaults_are_those_of_diffusers(ours: Any, theirs: Any) -> None:
    with torch.device("meta"):
        config = dict(theirs().config)
    assert type(ours).from_dict(config) == ours
