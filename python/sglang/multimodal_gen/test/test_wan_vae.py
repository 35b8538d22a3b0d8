"""The native Wan autoencoder against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only: the chunked and the whole clip meet the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sglang.multimodal_gen
from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.fused_frames import cell_step, norm_frames, sum_frames
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.loader.component_loader import load_module
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import CausalConv3d, TemporalState
from sglang.multimodal_gen.runtime.models.vaes.distribution import LatentDistribution
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan, DecoderState
from sglang.multimodal_gen.test.tiny_wan import TINY_PATCHED_VAE, TINY_RESIDUAL_VAE, TINY_VAE, noise, vae_pair

FP32 = {"rtol": 1e-4, "atol": 1e-5}
VARIANTS = pytest.mark.parametrize(
    "config", [TINY_VAE, TINY_PATCHED_VAE, TINY_RESIDUAL_VAE], ids=["wan2.1", "patched", "wan2.2"]
)


def pixels(*shape: int) -> Tensor:
    """Values all over [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@VARIANTS
@pytest.mark.parametrize("num_frames", [1, 5, 9])
@torch.no_grad()
def test_decoding_matches_diffusers_in_any_chunks(config: dict[str, Any], num_frames: int) -> None:
    reference, ours = vae_pair(config)
    latents = noise(2, 4, 1 + (num_frames - 1) // 4, 3, 2)
    expected = reference.decode(latents, return_dict=False)[0]
    assert expected.shape[2] == num_frames
    assert (expected.abs() < 1).float().mean() > 0.2, "a clamped picture would hide differences"
    for chunk_frames in (None, 1, 2):
        torch.testing.assert_close(ours.decode(latents, chunk_frames=chunk_frames), expected, **FP32)


@VARIANTS
@pytest.mark.parametrize("num_frames", [1, 5, 9])
@torch.no_grad()
def test_encoding_matches_diffusers_in_any_chunks(config: dict[str, Any], num_frames: int) -> None:
    reference, ours = vae_pair(config)
    ratio = ours.config.spatial_ratio
    video = pixels(2, 3, num_frames, 2 * ratio, 3 * ratio)
    expected = reference.encode(video).latent_dist
    for chunk_frames in (None, 1, 2):
        posterior = ours.encode(video, chunk_frames=chunk_frames)
        torch.testing.assert_close(posterior.mean, expected.mean, **FP32)
        torch.testing.assert_close(posterior.logvar, expected.logvar, **FP32)


@VARIANTS
@torch.no_grad()
def test_a_clip_can_be_encoded_as_its_frames_arrive(config: dict[str, Any]) -> None:
    reference, ours = vae_pair(config)
    video, state = pixels(1, 3, 17, 2 * ours.config.spatial_ratio, ours.config.spatial_ratio), TemporalState(carry=True)
    expected = reference.encode(video).latent_dist.mean
    chunks = [ours.encode_next(frames, state).mean for frames in video.split((1, 8, 4, 4), dim=2)]
    assert [chunk.shape[2] for chunk in chunks] == [1, 2, 1, 1]
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, **FP32)


@pytest.mark.parametrize("config", [TINY_VAE, TINY_PATCHED_VAE], ids=["wan2.1", "patched"])
@pytest.mark.parametrize("size", [(17, 13), (8, 13), (7, 8)])
@torch.no_grad()
def test_tiles_match_diffusers_in_any_chunks(config: dict[str, Any], size: tuple[int, int]) -> None:
    reference, ours = vae_pair(config)
    reference.enable_tiling(64, 64, 48, 48)
    tiling = Tiling(tile_height=64, tile_width=64, stride_height=48, stride_width=48)
    latents = noise(1, 4, 2, *size)
    expected = reference.decode(latents, return_dict=False)[0]
    for chunk_frames in (None, 1):
        torch.testing.assert_close(ours.decode(latents, chunk_frames=chunk_frames, tiling=tiling), expected, **FP32)


@torch.no_grad()
def test_tiled_encoding_matches_diffusers() -> None:
    reference, ours = vae_pair(TINY_VAE)
    reference.enable_tiling(64, 64, 48, 48)
    tiling = Tiling(tile_height=64, tile_width=64, stride_height=48, stride_width=48)
    video = pixels(1, 3, 5, 136, 104)
    torch.testing.assert_close(ours.encode(video, tiling=tiling).mean, reference.encode(video).latent_dist.mean, **FP32)


def test_tiling_defaults_are_those_of_diffusers() -> None:
    reference = diffusers.AutoencoderKLWan(**TINY_VAE)
    assert Tiling() == Tiling(
        tile_height=reference.tile_sample_min_height,
        tile_width=reference.tile_sample_min_width,
        stride_height=reference.tile_sample_stride_height,
        stride_width=reference.tile_sample_stride_width,
    )


@torch.no_grad()
def test_two_clips_decode_in_turns_without_touching_each_other() -> None:
    _, ours = vae_pair(TINY_PATCHED_VAE)
    clips = [noise(1, 4, 3, 2, 4, seed=seed) for seed in (1, 2)]
    states = [DecoderState(), DecoderState()]
    frames: list[list[Tensor]] = [[], []]
    for turn in range(3):
        for clip, state, done in zip(clips, states, frames, strict=True):
            done.append(ours.decode_next(clip[:, :, turn : turn + 1], state))
    assert [chunk.shape[2] for chunk in frames[0]] == [1, 4, 4]
    for clip, done in zip(clips, frames, strict=True):
        torch.testing.assert_close(torch.cat(done, dim=2), ours.decode(clip), **FP32)


@torch.no_grad()
def test_tiles_can_be_decoded_one_by_one() -> None:
    _, ours = vae_pair(TINY_VAE)
    tiling = Tiling(tile_height=32, tile_width=32, stride_height=24, stride_width=24)
    latents, state = noise(1, 4, 2, 6, 5), DecoderState(tiling)
    chunks = []
    for chunk in latents.split(1, dim=2):
        slices = ours.decoder_tiles(chunk, tiling)
        tiles = [ours.decode_tile(chunk[..., y, x], state.tile(index)) for index, (y, x) in enumerate(slices)]
        assert len(tiles) == 4
        chunks.append(ours.join_tiles(tiles, chunk, tiling))
    torch.testing.assert_close(torch.cat(chunks, dim=2), ours.decode(latents, tiling=tiling), **FP32)


@torch.no_grad()
def test_state_between_chunks_does_not_grow_with_the_clip() -> None:
    _, ours = vae_pair(TINY_VAE)
    state, sizes = DecoderState(), []
    for chunk in noise(1, 4, 6, 2, 2).split(1, dim=2):
        ours.decode_next(chunk, state)
        sizes.append(state.num_bytes())
    assert sizes[-1] == sizes[2] > 0
    whole = DecoderState(carry=False)
    ours.decode_next(noise(1, 4, 6, 2, 2), whole)
    assert whole.num_bytes() == 0, "a whole clip leaves nothing to remember"


@pytest.mark.parametrize("config", [TINY_VAE, TINY_PATCHED_VAE], ids=["wan2.1", "patched"])
def test_gradients_of_the_whole_clip_match_diffusers(config: dict[str, Any]) -> None:
    reference, ours = vae_pair(config)
    video = pixels(1, 3, 5, 16, 16)
    reference.decode(reference.encode(video).latent_dist.mean, return_dict=False)[0].square().mean().backward()
    ours.decode(ours.encode(video).mean).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        # Gradients sum over all pixels, so their rounding is that of the largest terms.
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@VARIANTS
@torch.no_grad()
def test_bf16_error_is_no_worse_than_diffusers(config: dict[str, Any]) -> None:
    """1.25 leaves room for where single values happen to round."""
    reference, ours = vae_pair(config)
    latents = noise(1, 4, 3, 4, 4)
    exact = ours.decode(latents)
    reference.bfloat16()
    theirs = (reference.decode(latents.bfloat16(), return_dict=False)[0].float() - exact).norm()
    output = ours.bfloat16().decode(latents.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() <= 1.25 * theirs


@torch.no_grad()
def test_bf16_of_the_embedded_autoencoder_is_as_close_as_rounding_to_eight_bits() -> None:
    """58.9 dB is what a uniform error of one step of 255 makes; 8 dB less is what is asked for."""
    directory = Path(sglang.multimodal_gen.__file__).parent / "assets" / "demo_model" / "vae"
    config = WanVAEConfig.from_dict(read_json_object(directory / "config.json"))
    context = {"device": torch.device("cpu"), "context": LayerContext()}
    exact, half = (
        load_module(AutoencoderKLWan, config, directory, dtype=dtype, **context)
        for dtype in (torch.float32, torch.bfloat16)
    )
    time, rows, columns = (torch.linspace(-1, 1, count) for count in (5, 64, 96))
    ramp = 0.6 * rows.view(1, -1, 1) + 0.3 * columns + 0.1 * time.view(-1, 1, 1)
    disc = ((rows.view(1, -1, 1) ** 2 + (columns - 0.3 * time.view(-1, 1, 1)) ** 2) < 0.2).float() - 0.5
    latents = exact.encode(torch.stack((ramp, disc, -ramp))[None]).mean
    expected = exact.decode(latents)
    error = half.decode(latents.bfloat16(), chunk_frames=1).float() - expected
    assert expected.std() > 0.2, "there is a picture"
    assert 10 * torch.log10(4 / error.square().mean()) >= 50


@VARIANTS
@torch.no_grad()
def test_a_convolution_of_the_gpu_s_kind_gives_the_same(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind two frames of the past, or of zeros, in one 3-D convolution, with the bias left to what comes next."""
    reference, ours = vae_pair(config)
    latents = noise(2, 4, 3, 3, 2)
    expected = reference.decode(latents, return_dict=False)[0]
    monkeypatch.setattr(CausalConv3d, "computes_at_once", staticmethod(lambda device: True))
    for chunk_frames in (None, 1, 2):
        torch.testing.assert_close(ours.decode(latents, chunk_frames=chunk_frames), expected, **FP32)
    ratio = ours.config.spatial_ratio
    video = pixels(2, 3, 9, 2 * ratio, 3 * ratio)
    found = ours.encode(video, chunk_frames=1).mean
    torch.testing.assert_close(found, reference.encode(video).latent_dist.mean, **FP32)


@torch.no_grad()
def test_more_output_channels_for_speed_leave_the_result_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = CausalConv3d(64, 96, 3, strips=StripSharding()).requires_grad_(False)
    frames = noise(2, 64, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    expected = conv(frames, TemporalState(carry=False))
    monkeypatch.setattr(CausalConv3d, "computes_at_once", staticmethod(lambda device: True))
    monkeypatch.setattr(CausalConv3d, "fills_channels", staticmethod(lambda frames: True))
    found, bias = conv.without_bias(frames, TemporalState(carry=False))
    assert cell_step(found.movedim(1, -1)) == 128, "some channels of more"
    behind = CausalConv3d(96, 96, 3, strips=StripSharding()).room(found, TemporalState(carry=False))
    assert behind is not None and behind.whole.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(conv(frames, TemporalState(carry=False)), expected, **FP32)
    residual, weight = noise(2, 96, 3, 4, 5, seed=2), noise(96, seed=3)
    torch.testing.assert_close(sum_frames(found, residual, bias=bias), expected + residual, **FP32)
    torch.testing.assert_close(
        norm_frames(found, weight, bias=bias), norm_frames(expected, weight), rtol=1e-4, atol=1e-4
    )


def test_latents_are_normalised_as_the_published_pipeline_does() -> None:
    ours = AutoencoderKLWan(WanVAEConfig.from_dict(TINY_VAE))
    latents = noise(2, 4, 1, 2, 2)
    inverse_std = 1.0 / torch.tensor(TINY_VAE["latents_std"]).view(1, 4, 1, 1, 1)
    expected = latents / inverse_std + torch.tensor(TINY_VAE["latents_mean"]).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(ours.denormalise(latents), expected)
    torch.testing.assert_close(ours.normalise(ours.denormalise(latents)), latents)


def test_samples_equal_those_of_diffusers_for_the_same_generator() -> None:
    moments = noise(1, 8, 2, 3, 3)
    reference = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
    ours = LatentDistribution(*moments.chunk(2, dim=1))
    expected = reference.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours.sample(torch.Generator().manual_seed(7)), expected)


@pytest.mark.parametrize(
    ("shape", "param", "sentence"),
    [
        ((1, 3, 4, 16, 16), "num_frames", "4 frames.*1 plus a multiple of 4"),
        ((1, 3, 5, 20, 16), "height", "20x16 pixels.*multiples of 8"),
        ((1, 3, 5, 16, 20), "width", "16x20 pixels.*multiples of 8"),
    ],
)
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...], param: str, sentence: str) -> None:
    ours = AutoencoderKLWan(WanVAEConfig.from_dict(TINY_VAE))
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        ours.encode(torch.zeros(shape))
    assert caught.value.param == param


def test_a_stride_beyond_the_tile_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="stride_height is 300; it must be from 1 to tile_height = 256"):
        Tiling(stride_height=300)
