"""The native Qwen-Image transformer and autoencoder against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only.
"""

from __future__ import annotations

from math import prod
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import ModelConfig
from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.configs.models.vaes.qwen_image import QwenImageVAEConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.models.dits.qwen_image import (
    ImageShapes,
    QwenImageTransformer2DModel,
    joint_table,
)
from sglang.multimodal_gen.runtime.models.vaes.qwen_image_vae import AutoencoderKLQwenImage
from sglang.multimodal_gen.test.test_structure import compare
from sglang.multimodal_gen.test.tiny_qwen_image import TEXT_WIDTH, TINY_TRANSFORMER, transformer_pair, vae_pair
from sglang.multimodal_gen.test.tiny_wan import noise

FP32 = {"rtol": 1e-4, "atol": 1e-5}
ONE_IMAGE: ImageShapes = ((1, 4, 6),)
WITH_PICTURES: ImageShapes = ((1, 4, 6), (1, 3, 5), (1, 7, 2))


def qwen_inputs(
    shapes: ImageShapes = ONE_IMAGE, num_rows: int = 2, num_text_tokens: int = 7, channels: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, one timestep for each sample, text."""
    timesteps = torch.linspace(987.5, 3.25, num_rows)
    tokens = noise(num_rows, sum(map(prod, shapes)), channels)
    return tokens, timesteps, noise(num_rows, num_text_tokens, TEXT_WIDTH, seed=2)


def reference_output(
    model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], shapes: ImageShapes, mask: Tensor | None = None
) -> Tensor:
    tokens, timesteps, text = inputs
    return model(
        hidden_states=tokens,
        timestep=timesteps / 1000,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[list(shapes)] * len(tokens),
        return_dict=False,
    )[0]


@pytest.mark.parametrize(
    ("changes", "shapes", "num_rows", "num_text_tokens"),
    [
        ({}, ONE_IMAGE, 2, 7),
        ({}, ((1, 1, 1),), 1, 1),
        ({}, WITH_PICTURES, 2, 5),
        ({"zero_cond_t": True}, WITH_PICTURES, 2, 5),
        ({"zero_cond_t": True, "num_layers": 3}, ONE_IMAGE, 3, 2),
        ({"num_attention_heads": 3, "num_layers": 1, "out_channels": None}, ((1, 7, 5),), 1, 12),
        ({"attention_head_dim": 24, "axes_dims_rope": (8, 8, 8), "joint_attention_dim": 32}, ((3, 2, 5),), 2, 4),
    ],
)
@torch.no_grad()
def test_transformer_matches_diffusers_in_fp32(
    changes: dict[str, Any], shapes: ImageShapes, num_rows: int, num_text_tokens: int
) -> None:
    reference, ours = transformer_pair(**changes)
    inputs = qwen_inputs(shapes, num_rows, num_text_tokens)
    torch.testing.assert_close(ours(*inputs, shapes), reference_output(reference, inputs, shapes), **FP32)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("lengths", [(3, 7), (7, 1), (7, 7)])
@torch.no_grad()
def test_rows_of_unequal_text_match_diffusers_and_the_rows_alone(lengths: tuple[int, int], zero_cond_t: bool) -> None:
    reference, ours = transformer_pair(zero_cond_t=zero_cond_t)
    tokens, timesteps, text = qwen_inputs(WITH_PICTURES)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(-1)
    together = ours(tokens, timesteps, text, WITH_PICTURES, lengths)
    expected = reference_output(reference, (tokens, timesteps, text), WITH_PICTURES, mask)
    torch.testing.assert_close(together, expected, **FP32)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = reference_output(reference, (tokens[one], timesteps[one], text[one, :length]), WITH_PICTURES)
        torch.testing.assert_close(together[one], alone, **FP32)


@torch.no_grad()
def test_text_of_equal_lengths_needs_no_mask() -> None:
    _, ours = transformer_pair()
    for block in ours.transformer_blocks:
        block.attn.masked_attention = None
    tokens, timesteps, text = qwen_inputs()
    assert torch.equal(ours(tokens, timesteps, text, ONE_IMAGE, (7, 7)), ours(tokens, timesteps, text, ONE_IMAGE))


@torch.no_grad()
def test_pictures_without_noise_keep_their_modulation_at_every_timestep() -> None:
    _, ours = transformer_pair(zero_cond_t=True)
    first, last = (
        ours.transformer_blocks[0].img_mod(ours.time_text_embed(torch.tensor([value]), torch.float32))
        for value in (0.0, 800.0)
    )
    assert (first - last).abs().max() > 0.1, "else the test shows nothing"
    seen: list[Tensor] = []
    ours.transformer_blocks[0].img_mod.register_forward_hook(lambda _m, _i, output: seen.append(output))
    tokens, _, text = qwen_inputs(WITH_PICTURES)
    ours(tokens, torch.tensor([800.0, 300.0]), text, WITH_PICTURES)
    torch.testing.assert_close(seen[0][0], last[0])
    torch.testing.assert_close(seen[0][2:], first.expand(2, -1))


@pytest.mark.parametrize("shapes", [ONE_IMAGE, WITH_PICTURES, ((1, 82, 46), (1, 45, 91))])
@torch.no_grad()
def test_rotary_tables_are_those_of_diffusers(shapes: ImageShapes) -> None:
    reference = diffusers.QwenImageTransformer2DModel(**(TINY_TRANSFORMER | {"num_layers": 0}))
    images, text = reference.pos_embed([list(shapes)], max_txt_seq_len=9, device=torch.device("cpu"))
    table = joint_table(shapes, 9, TINY_TRANSFORMER["axes_dims_rope"], torch.device("cpu"))
    torch.testing.assert_close(table[0, :, 0], torch.view_as_real(torch.cat((text, images))), rtol=0, atol=1e-6)


def test_gradients_match_diffusers() -> None:
    reference, ours = transformer_pair(zero_cond_t=True)
    inputs = qwen_inputs(WITH_PICTURES)
    reference_output(reference, inputs, WITH_PICTURES).square().mean().backward()
    ours(*inputs, WITH_PICTURES).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        if expected[name] is None or parameter.grad is None:
            # Text after the last attention reaches no output.
            assert expected[name] is None or not expected[name].any(), name
            continue
        # Gradients sum over all tokens, so their rounding is that of the largest terms.
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_bf16_error_is_no_worse_than_diffusers() -> None:
    """1.25 leaves room for where single values happen to round."""
    reference, ours = transformer_pair(zero_cond_t=True, num_layers=4)
    inputs = qwen_inputs(WITH_PICTURES, num_text_tokens=12)
    exact = ours(*inputs, WITH_PICTURES)
    tokens, timesteps, text = inputs
    inputs = (tokens.bfloat16(), timesteps, text.bfloat16())
    theirs = (reference_output(reference.bfloat16(), inputs, WITH_PICTURES).float() - exact).norm()
    output = ours.bfloat16()(*inputs, WITH_PICTURES)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() <= 1.25 * theirs


@pytest.mark.parametrize("size", [(16, 24), (40, 8)])
@torch.no_grad()
def test_autoencoder_matches_diffusers_at_one_frame(size: tuple[int, int]) -> None:
    reference, ours = vae_pair()
    pixels = torch.rand((2, 3, 1, *size), generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = reference.encode(pixels).latent_dist
    posterior = ours.encode(pixels)
    torch.testing.assert_close(posterior.mean, expected.mean, **FP32)
    torch.testing.assert_close(posterior.logvar, expected.logvar, **FP32)
    latents = noise(2, 4, 1, size[0] // 8, size[1] // 8)
    picture = reference.decode(latents, return_dict=False)[0]
    assert (picture.abs() < 1).float().mean() > 0.2, "a clamped picture would hide differences"
    torch.testing.assert_close(ours.decode(latents), picture, **FP32)


@pytest.mark.parametrize("changes", [{}, {"zero_cond_t": True}], ids=["Qwen-Image", "Qwen-Image-Edit-2511"])
def test_transformer_has_the_parameters_of_the_published_checkpoint(changes: dict[str, Any]) -> None:
    compare(
        lambda: QwenImageTransformer2DModel(QwenImageTransformerConfig(**changes)),
        lambda: diffusers.QwenImageTransformer2DModel(**changes),
        20_430_401_088,
    )


def test_autoencoder_has_the_parameters_of_the_published_checkpoint() -> None:
    compare(
        lambda: AutoencoderKLQwenImage(QwenImageVAEConfig()), lambda: diffusers.AutoencoderKLQwenImage(), 126_892_531
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (QwenImageTransformerConfig(), diffusers.QwenImageTransformer2DModel),
        (QwenImageVAEConfig(), diffusers.AutoencoderKLQwenImage),
    ],
)
def test_config_defaults_are_those_of_diffusers(ours: ModelConfig, theirs: Any) -> None:
    with torch.device("meta"):
        config = dict(theirs().config)
    assert type(ours).from_dict(config) == ours


@pytest.mark.parametrize(
    ("config", "data", "sentence"),
    [
        (QwenImageTransformerConfig, {"use_layer3d_rope": True}, "use_layer3d_rope is True; only False.*layers"),
        (QwenImageTransformerConfig, {"use_additional_t_cond": True}, "use_additional_t_cond is True; only False"),
        (QwenImageTransformerConfig, {"guidance_embeds": True}, "guidance_embeds is True; only False"),
        (QwenImageTransformerConfig, {"axes_dims_rope": [16, 56]}, r"axes_dims_rope is \[16, 56\].*three.*128"),
        (QwenImageVAEConfig, {"is_residual": True}, "no field 'is_residual'; it has .*input_channels"),
    ],
)
def test_config_refuses_what_it_cannot_honour(config: type[ModelConfig], data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        config.from_dict({"pooled_projection_dim": 768} | data if config is QwenImageTransformerConfig else data)
    assert caught.value.param == next(iter(data))


def test_channels_of_the_autoencoder_are_read_from_the_key_of_its_file() -> None:
    config = QwenImageVAEConfig.from_dict({"_class_name": "AutoencoderKLQwenImage", "input_channels": 4})
    assert (config.in_channels, config.out_channels, config.spatial_ratio) == (4, 4, 8)
