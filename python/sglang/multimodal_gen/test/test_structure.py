"""Published architectures: our modules have exactly diffusers' parameters, without a weight being allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.models.encoders import UMT5EncoderConfig
from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import NotAModel
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.encoders.umt5 import UMT5EncoderModel
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan

# Numbers of parameters of the published files.
NUM_TRANSFORMER_PARAMETERS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16_394_878_784,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": 16_394_878_784,
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": 16_395_536_704,
    "weizhou03/Wan2.1-Fun-1.3B-InP-Diffusers": 1_564_428_608,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14_288_901_184,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4_999_787_712,
}
NUM_VAE_PARAMETERS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 126_892_531,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 704_688_668,
}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def published(hub_id: str, component: str) -> dict[str, Any]:
    return read_json_object(published_directory(hub_id) / component / "config.json")


def compare(ours: Callable[[], nn.Module], reference: Callable[[], nn.Module], num_parameters: int) -> None:
    with torch.device("meta"):
        built, expected = ours(), reference()
    assert shapes(built) == shapes(expected)
    assert sum(parameter.numel() for parameter in built.parameters()) == num_parameters


@pytest.mark.parametrize("hub_id", NUM_TRANSFORMER_PARAMETERS)
def test_transformer_has_the_parameters_of_the_published_checkpoint(hub_id: str) -> None:
    config = published(hub_id, "transformer")
    compare(
        lambda: WanTransformer3DModel(WanTransformerConfig.from_dict(config)),
        lambda: diffusers.WanTransformer3DModel.from_config(config),
        NUM_TRANSFORMER_PARAMETERS[hub_id],
    )


def test_both_experts_have_one_architecture() -> None:
    for hub_id in ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"):
        assert published(hub_id, "transformer_2") == published(hub_id, "transformer")


@pytest.mark.parametrize("hub_id", NUM_VAE_PARAMETERS)
def test_autoencoder_has_the_parameters_of_the_published_checkpoint(hub_id: str) -> None:
    config = published(hub_id, "vae")
    compare(
        lambda: AutoencoderKLWan(WanVAEConfig.from_dict(config)),
        lambda: diffusers.AutoencoderKLWan.from_config(config),
        NUM_VAE_PARAMETERS[hub_id],
    )


def test_text_encoder_has_the_parameters_of_the_published_checkpoint() -> None:
    config = published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "text_encoder")
    with torch.device("meta"):
        ours = UMT5EncoderModel(UMT5EncoderConfig.from_dict(config))
        reference = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
    # Files hold the shared embedding under one or both of its names; ours has the first.
    assert shapes(ours) == {k: v for k, v in shapes(reference).items() if k != "encoder.embed_tokens.weight"}
    assert sum(parameter.numel() for parameter in ours.parameters()) == 5_680_910_336


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(WanTransformerConfig(), diffusers.WanTransformer3DModel), (WanVAEConfig(), diffusers.AutoencoderKLWan)],
)
def test_config_defaults_are_those_of_diffusers(ours: Any, theirs: Any) -> None:
    with torch.device("meta"):
        config = dict(theirs().config)
    assert type(ours).from_dict(config) == ours


def test_a_hub_id_without_configs_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(NotAModel, match=r"known are .*Wan-AI/Wan2.1.*did you mean Wan-AI/Wan2.1-T2V-14B-Diffusers\?"):
        published_directory("Wan-AI/Wan2.1-T2V-14-Diffusers")


def test_published_configs_are_found_whatever_the_letter_case() -> None:
    assert published_directory("wan-ai/wan2.1-t2v-14b-diffusers").name == "Wan-AI--Wan2.1-T2V-14B-Diffusers"
