"""The native HunyuanVideo autoencoder against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only, over some thirty layers of norms.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sglang.multimodal_gen.configs.models.vaes.hunyuan_video import HunyuanVideoVAEConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.models.vaes.hunyuan_video_vae import AutoencoderKLHunyuanVideo
from sglang.multimodal_gen.runtime.models.vaes.tiling import TemporalTiling, Tiling
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, relative_error
from sglang.multimodal_gen.test.tiny_hunyuan_video import TINY_VAE, vae_pair
from sglang.multimodal_gen.test.tiny_wan import noise

FP32 = {"rtol": 1e-4, "atol": 5e-5}
SMALL_TILES = Tiling(tile_height=32, tile_width=32, stride_height=24, stride_width=24)


def with_tiles(reference: Any) -> Any:
    reference.enable_tiling(32, 32, None, 24, 24)
    return reference


# 4 latent frames are one piece; 7 leave a piece of the last frame alone, which adds nothing.
@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 7, 8, 10])
@torch.no_grad()
def test_decoding_matches_diffusers_in_its_pieces(num_frames: int) -> None:
    reference, ours = vae_pair()
    latents = noise(1, 4, num_frames, 3, 2)
    expected = reference.decode(latents, return_dict=False)[0]
    assert expected.shape == (1, 3, 1 + 4 * (num_frames - 1), 24, 16)
    torch.testing.assert_close(ours.decode(latents), expected, **FP32)


@pytest.mark.parametrize("num_frames", [1, 5, 13, 17, 25, 29])
@torch.no_grad()
def test_encoding_matches_diffusers_in_its_pieces(num_frames: int) -> None:
    reference, ours = vae_pair()
    video = noise(1, 3, num_frames, 16, 24)
    torch.testing.assert_close(ours.encode(video).mean, reference.encode(video).latent_dist.mode(), **FP32)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": (8, 8, 12), "layers_per_block": 2},
        {"mid_block_add_attention": False},
        {"spatial_compression_ratio": 4, "norm_num_groups": 2},
        {"spatial_compression_ratio": 16},
        {"latent_channels": 3, "block_out_channels": (4, 8, 8, 8, 16)},
    ],
)
@torch.no_grad()
def test_other_architectures_match_diffusers(changes: dict[str, Any]) -> None:
    stages = len(changes.get("block_out_channels", TINY_VAE["block_out_channels"]))
    blocks = {
        "down_block_types": ("HunyuanVideoDownBlock3D",) * stages,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * stages,
    }
    reference, ours = vae_pair(**blocks, **changes)
    video = noise(2, 3, 5, 32, 16)
    latents = reference.encode(video).latent_dist.mode()
    assert relative_error(ours.encode(video).mean, latents) <= LATENT_TOLERANCE
    # By norm: where a group of the norms has few cells, single pixels amplify the rounding.
    assert relative_error(ours.decode(latents), reference.decode(latents, return_dict=False)[0]) <= LATENT_TOLERANCE


@pytest.mark.parametrize(("num_frames", "size"), [(5, (7, 5)), (2, (4, 7)), (2, (4, 4)), (1, (9, 3))])
@torch.no_grad()
def test_tiles_match_diffusers(num_frames: int, size: tuple[int, int]) -> None:
    reference, ours = vae_pair()
    latents = noise(1, 4, num_frames, *size)
    expected = with_tiles(reference).decode(latents, return_dict=False)[0]
    torch.testing.assert_close(ours.decode(latents, tiling=SMALL_TILES), expected, **FP32)


@torch.no_grad()
def test_tiled_encoding_matches_diffusers() -> None:
    reference, ours = vae_pair()
    video = noise(1, 3, 17, 40, 56)
    expected = with_tiles(reference).encode(video).latent_dist.mode()
    torch.testing.assert_close(ours.encode(video, tiling=SMALL_TILES).mean, expected, **FP32)


def test_tiling_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLHunyuanVideo()
    assert reference.use_framewise_decoding and reference.use_framewise_encoding and not reference.use_tiling
    assert TemporalTiling() == TemporalTiling(
        tile_frames=reference.tile_sample_min_num_frames, stride_frames=reference.tile_sample_stride_num_frames
    )
    assert Tiling() == Tiling(
        tile_height=reference.tile_sample_min_height,
        tile_width=reference.tile_sample_min_width,
        stride_height=reference.tile_sample_stride_height,
        stride_width=reference.tile_sample_stride_width,
    )


@torch.no_grad()
def test_pieces_of_two_clips_decode_in_turns() -> None:
    _, ours = vae_pair()
    clips = [noise(1, 4, 8, 2, 2, seed=seed) for seed in (1, 2)]
    states = [ours.new_state(None, carry=True) for _ in clips]
    parts: list[list[torch.Tensor]] = [[], []]
    assert ours.decoder_pieces(8) == [slice(0, 5), slice(3, 8), slice(6, 11)]
    for index in range(3):
        for clip in range(2):
            parts[clip].append(ours.decode_piece(clips[clip], index, states[clip]))
    assert [part.shape[2] for part in parts[0]] == [13, 12, 4]
    for clip in range(2):
        torch.testing.assert_close(torch.cat(parts[clip], dim=2), ours.decode(clips[clip]), **FP32)


@torch.no_grad()
def test_normalising_and_back_gives_the_latents() -> None:
    _, ours = vae_pair()
    latents = noise(1, 4, 2, 2, 2)
    torch.testing.assert_close(ours.normalise(latents), latents * ours.config.scaling_factor)
    torch.testing.assert_close(ours.denormalise(ours.normalise(latents)), latents)


@torch.no_grad()
def test_bf16_error_is_no_worse_than_diffusers() -> None:
    """1.25 leaves room for where single values happen to round."""
    reference, ours = vae_pair()
    latents = noise(1, 4, 5, 4, 4)
    expected = reference.decode(latents, return_dict=False)[0]
    error_of_ours = (ours.bfloat16().decode(latents.bfloat16()).float() - expected).abs().mean()
    theirs = reference.bfloat16().decode(latents.bfloat16(), return_dict=False)[0]
    assert error_of_ours <= 1.25 * (theirs.float() - expected).abs().mean()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; accepted for 4 stages: 'silu'"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8; accepted for 4 stages: 4"),
        ({"up_block_types": ["UpBlock"] * 4}, "up_block_types is .*UpBlock"),
        ({"down_block_types": ["HunyuanVideoDownBlock3D"]}, "down_block_types is .*accepted for 4 stages"),
        ({"spatial_compression_ratio": 12}, "spatial_compression_ratio is 12; .*2, 4, 8, 16"),
        (
            {
                "block_out_channels": [8, 8],
                "down_block_types": ["HunyuanVideoDownBlock3D"] * 2,
                "up_block_types": ["HunyuanVideoUpBlock3D"] * 2,
                "spatial_compression_ratio": 4,
            },
            "block_out_channels has 2 stages; a temporal ratio of 4 wants 3",
        ),
    ],
)
def test_config_refuses_what_it_cannot_honour(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        HunyuanVideoVAEConfig.from_dict(changes)
    assert caught.value.param == next(iter(changes))


def test_config_defaults_and_parameters_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLHunyuanVideo()
        ours = AutoencoderKLHunyuanVideo(HunyuanVideoVAEConfig())
    assert HunyuanVideoVAEConfig.from_dict(dict(reference.config)) == HunyuanVideoVAEConfig()
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == 246_478_803
