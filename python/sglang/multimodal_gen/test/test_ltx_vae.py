"""The native LTX-Video autoencoder against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.models.vaes.ltx import LTXVideoVAEConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidRequest, ModelError, UnsupportedModel
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.strip_sharding import StripSharding
from sglang.multimodal_gen.runtime.models.vaes.causal_conv import CausalConv3d
from sglang.multimodal_gen.runtime.models.vaes.ltx_vae import AutoencoderKLLTXVideo
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.pipelines.ltx import LTXPipeline
from sglang.multimodal_gen.runtime.pipelines.ltx_workloads import LTX_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, WorkSize
from sglang.multimodal_gen.test.parallel_coding import Coding, coded
from sglang.multimodal_gen.test.parallel_pool import Pool
from sglang.multimodal_gen.test.pipeline_parity import load, relative_error
from sglang.multimodal_gen.test.tiny_ltx import (
    TINY_LTXS,
    TINY_NOISY_VAE,
    TINY_TIMED_VAE,
    TINY_VAE,
    save_tiny_ltx,
    shrunk_vae,
    vae_pair,
)
from sglang.multimodal_gen.test.tiny_wan import noise

TOLERANCE = 1e-5
PUBLISHED = (
    "Lightricks/LTX-Video",
    "a-r-r-o-w/LTX-Video-0.9.1-diffusers",
    "Lightricks/LTX-Video-0.9.5",
    "Lightricks/LTX-Video-0.9.7-dev",
    "Lightricks/LTX-Video-0.9.8-13B-distilled",
)
# Each timestep of one sample.
TIMESTEPS = torch.tensor([0.05, 0.7])
SMALL_TILES = Tiling(tile_height=32, tile_width=32, stride_height=24, stride_width=16)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


def published_config(hub_id: str) -> dict[str, Any]:
    return read_json_object(published_directory(hub_id) / "vae" / "config.json")


@cache
def pair_of(hub_id: str) -> tuple[Any, AutoencoderKLLTXVideo]:
    """In the form of a published checkpoint."""
    return vae_pair(shrunk_vae(published_config(hub_id)))


def decoded_by(reference: Any, latents: Tensor, timesteps: Tensor | None, *, seed: int = 0) -> Tensor:
    """diffusers' video. Its decoder draws from torch's own generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        video: Tensor = reference.decode(latents, timesteps, return_dict=False)[0]
    return video


def timesteps_for(vae: AutoencoderKLLTXVideo, batch_size: int) -> Tensor | None:
    return TIMESTEPS[:batch_size] if vae.config.timestep_conditioning else None


@pytest.mark.parametrize("num_frames", [1, 9, 17])
@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_encoding_matches_diffusers(hub_id: str, num_frames: int) -> None:
    reference, ours = pair_of(hub_id)
    video = noise(2 if num_frames == 9 else 1, 3, num_frames, 64, 96)
    expected, found = reference.encode(video).latent_dist, ours.encode(video)
    assert expected.mean.shape[1:] == (8, (num_frames - 1) // 8 + 1, 2, 3)
    assert relative_error(found.mean, expected.mean) <= TOLERANCE
    assert relative_error(found.logvar, expected.logvar) <= TOLERANCE


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_latents_are_the_most_likely_ones_or_a_sample(hub_id: str) -> None:
    reference, ours = pair_of(hub_id)
    video, mean, std = noise(1, 3, 9, 64, 64), *(reference.get_buffer(f"latents_{name}") for name in ("mean", "std"))
    distribution = reference.encode(video).latent_dist
    for expected, generator in (
        (distribution.mode(), None),
        (distribution.sample(torch.Generator().manual_seed(3)), torch.Generator().manual_seed(3)),
    ):
        expected = (expected - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
        assert relative_error(ours.to_latents(video, generator=generator), expected) <= TOLERANCE
    latents = noise(1, 8, 2, 2, 2)
    torch.testing.assert_close(ours.normalise(ours.denormalise(latents)), latents)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 1), (3, 1, 2)])
@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_decoding_matches_diffusers(hub_id: str, size: tuple[int, int, int]) -> None:
    """Of two samples, each with its timestep."""
    reference, ours = pair_of(hub_id)
    latents, timesteps = noise(2, 8, *size), timesteps_for(ours, 2)
    expected = decoded_by(reference, latents, timesteps, seed=7)
    assert expected.shape == (2, 3, 1 + 8 * (size[0] - 1), 32 * size[1], 32 * size[2])
    found = ours.decode(latents, timesteps, seed=7)
    assert relative_error(found, expected) <= TOLERANCE
    if timesteps is not None:
        assert relative_error(ours.decode(latents, timesteps.flip(0), seed=7), expected) > 1e-2
    if ours.config.injects_noise:
        assert relative_error(ours.decode(latents, timesteps, seed=8), expected) > 1e-2


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (TINY_VAE, {"encoder_causal": False, "decoder_causal": True}),
        (
            TINY_TIMED_VAE,
            {"encoder_causal": False, "decoder_causal": True, "patch_size": 1, "spatial_compression_ratio": 4},
        ),
        (TINY_VAE, {"layers_per_block": (2, 0, 1, 1), "decoder_layers_per_block": (1, 2, 0, 1)}),
        (TINY_VAE, {"block_out_channels": (8, 12, 20), "resnet_norm_eps": 0.1}),
        (TINY_VAE, {"decoder_block_out_channels": (8, 16, 16), "upsample_residual": (True,) * 3}),
        (
            TINY_VAE,
            {
                "decoder_block_out_channels": (16, 16, 16),
                "timestep_conditioning": True,
                "decoder_inject_noise": (False, True, False, True),
            },
        ),
        (
            TINY_TIMED_VAE,
            {
                "decoder_block_out_channels": (8, 32),
                "upsample_factor": (1, 4),
                "upsample_residual": (False, True),
            },
        ),
        (TINY_NOISY_VAE, {"decoder_inject_noise": (False, True, True), "latent_channels": 3}),
    ],
)
def test_other_architectures_match_diffusers(base: dict[str, Any], changes: dict[str, Any]) -> None:
    reference, ours = vae_pair(base | changes)
    video = noise(1, 3, 9, 24, 40)
    latents = reference.encode(video).latent_dist.mode()
    assert relative_error(ours.encode(video).mean, latents) <= TOLERANCE
    timesteps = timesteps_for(ours, 1)
    expected = decoded_by(reference, latents, timesteps, seed=1)
    assert relative_error(ours.decode(latents, timesteps, seed=1), expected) <= TOLERANCE


@pytest.mark.parametrize("config", [TINY_VAE, TINY_TIMED_VAE, TINY_NOISY_VAE])
@pytest.mark.parametrize("size", [(5, 7), (4, 5), (4, 4), (9, 3)])
def test_tiles_match_diffusers(config: dict[str, Any], size: tuple[int, int]) -> None:
    """Random numbers are drawn tile by tile."""
    reference, ours = vae_pair(config)
    latents, timesteps = noise(1, 8, 2, *size), timesteps_for(ours, 1)
    reference.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=16,
    )
    expected = decoded_by(reference, latents, timesteps, seed=2)
    assert relative_error(ours.decode(latents, timesteps, tiling=SMALL_TILES, seed=2), expected) <= TOLERANCE


@pytest.mark.parametrize("config", [TINY_VAE, TINY_TIMED_VAE])
def test_convolutions_at_once_give_what_slices_give(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At once is how GPUs compute."""
    _, ours = vae_pair(config)
    latents, video, timesteps = noise(1, 8, 2, 3, 2), noise(1, 3, 5, 16, 24), timesteps_for(ours, 1)
    expected = ours.decode(latents, timesteps), ours.encode(video).mean
    monkeypatch.setattr(CausalConv3d, "computes_at_once", staticmethod(lambda device: True))
    for found, other in zip((ours.decode(latents, timesteps), ours.encode(video).mean), expected, strict=True):
        assert relative_error(found, other) <= TOLERANCE


def test_without_a_seed_random_numbers_are_torch_s() -> None:
    _, ours = vae_pair(TINY_NOISY_VAE)
    latents = noise(1, 8, 1, 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        found = ours.decode(latents, TIMESTEPS[:1])
        assert relative_error(ours.decode(latents, TIMESTEPS[:1]), found) > 1e-2
    assert torch.equal(ours.decode(latents, TIMESTEPS[:1], seed=4), found)


@pytest.mark.parametrize("config", [TINY_VAE, TINY_TIMED_VAE])
def test_bf16_error_is_no_worse_than_diffusers(config: dict[str, Any]) -> None:
    """1.25 leaves room for where single values happen to round."""
    reference, ours = vae_pair(config)
    latents, timesteps = noise(1, 8, 3, 4, 4), timesteps_for(ours, 1)
    expected = decoded_by(reference, latents, timesteps)
    wide_video = noise(1, 3, 9, 32, 32)
    mean = reference.encode(wide_video).latent_dist.mode()
    reference, ours = reference.bfloat16(), ours.bfloat16()
    error = (ours.decode(latents.bfloat16(), timesteps).float() - expected).abs().mean()
    theirs = decoded_by(reference, latents.bfloat16(), timesteps)
    assert error <= 1.25 * (theirs.float() - expected).abs().mean()
    error = (ours.encode(wide_video.bfloat16()).mean.float() - mean).abs().mean()
    assert error <= 1.25 * (reference.encode(wide_video.bfloat16()).latent_dist.mode().float() - mean).abs().mean()


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 3, 8, 64, 64), "a clip of 8 frames cannot be encoded; the autoencoder takes 1 plus a multiple of 4"),
        ((1, 3, 5, 60, 64), "60x64 pixels cannot be encoded; the autoencoder takes multiples of 8"),
    ],
)
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...], sentence: str) -> None:
    _, ours = vae_pair(TINY_VAE)
    with pytest.raises(InvalidRequest, match=sentence):
        ours.encode(noise(*shape))


# Ranks and their strips


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool(3)
    yield found
    found.close()


# Odd numbers of latent cells along the side that is cut, rows or columns, and fewer than ranks, which stays whole.
CODINGS = (
    Coding(height=72, width=48, num_frames=9),
    Coding(height=40, width=56, num_frames=5, tile=32),
    Coding(height=16, width=8),
)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["first", "timed"])
def test_strips_of_several_ranks_give_what_whole_pictures_give(name: str, pool: Pool, tmp_path: Path) -> None:
    """The tolerance is fp32's rounding in another order; a line that a neighbour did not send changes 1e-2."""
    directory = save_tiny_ltx(tmp_path / name, TINY_LTXS[name])
    expected = coded(load(directory), CODINGS)
    for num_ranks in (2, 3):
        found = pool.code(directory, ReplicaShape(ring=num_ranks), CODINGS, tmp_path)
        assert set(found.files) == set(expected)
        for key, values in expected.items():
            assert relative_error(torch.from_numpy(found[key]), torch.from_numpy(values)) <= TOLERANCE, key


def test_a_decoder_with_random_numbers_stays_whole_and_says_why() -> None:
    strips = StripSharding(ProcessAxis(size=2))
    context = dataclasses.replace(LayerContext(), strips=strips)
    configs = (LTXVideoVAEConfig.from_dict(config) for config in (TINY_TIMED_VAE, TINY_NOISY_VAE))
    dealt, whole = (AutoencoderKLLTXVideo(config, context).strips for config in configs)
    assert dealt is strips
    assert whole.axis.size == 1 and whole.why_whole == "its decoder draws random numbers for the whole picture"
    assert AutoencoderKLLTXVideo(LTXVideoVAEConfig.from_dict(TINY_NOISY_VAE)).strips.why_whole == "", "one rank alone"


# Configs and checkpoints


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_published_configs_have_the_parameters_of_diffusers(hub_id: str) -> None:
    config = published_config(hub_id)
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLLTXVideo.from_config(config)
        ours = AutoencoderKLLTXVideo(LTXVideoVAEConfig.from_dict(config))
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert {name for name, _ in ours.named_buffers()} == {"latents_mean", "latents_std"}
    assert (ours.config.spatial_ratio, ours.config.temporal_ratio) == (32, 8)
    assert reference.spatial_compression_ratio == 32 and reference.temporal_compression_ratio == 8


def test_config_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        config = dict(diffusers.AutoencoderKLLTXVideo().config)
    assert LTXVideoVAEConfig.from_dict(config) == LTXVideoVAEConfig()


@pytest.mark.parametrize(
    ("base", "changes", "sentence"),
    [
        (TINY_VAE, {"patch_size_t": 2}, "patch_size_t is 2; accepted is 1"),
        (TINY_VAE, {"scaling_factor": 0.5}, "scaling_factor is 0.5; accepted is 1"),
        (TINY_VAE, {"latent_channels": 0}, "latent_channels is 0; accepted is 1 or more"),
        (TINY_VAE, {"block_out_channels": (8, 0, 8)}, r"block_out_channels is \[8, 0, 8\]; accepted is a width"),
        (TINY_VAE, {"decoder_block_out_channels": ()}, r"decoder_block_out_channels is \[\]; accepted is a width"),
        (TINY_VAE, {"layers_per_block": (1, 1)}, r"layers_per_block is \[1, 1\]; accepted is 4 values"),
        (TINY_VAE, {"decoder_inject_noise": (True,)}, r"decoder_inject_noise is \[True\]; accepted is 4 values"),
        (TINY_VAE, {"upsample_factor": (1,)}, r"upsample_factor is \[1\]; accepted is 3 values"),
        (TINY_VAE, {"down_block_types": ("DownBlock3D",) * 3}, "down_block_types is .*LTXVideoDownBlock3D for every"),
        (TINY_VAE, {"downsample_type": ("conv", "spatial", "conv")}, "downsample_type is .*conv for every"),
        (
            TINY_TIMED_VAE,
            {"downsample_type": ("spatial", "conv", "spatial")},
            "downsample_type is .*accepted is spatial, temporal, spatiotemporal, not conv",
        ),
        (TINY_TIMED_VAE, {"spatio_temporal_scaling": (True, False, True)}, "accepted is true for every"),
        (TINY_TIMED_VAE, {"block_out_channels": (8, 18, 16, 32)}, "block_out_channels is .* fold evenly"),
        (TINY_VAE, {"spatial_compression_ratio": 16}, "spatial_compression_ratio is 16; accepted is 8, which the lay"),
        (TINY_TIMED_VAE, {"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8; accepted is 4"),
        (
            TINY_VAE,
            {"decoder_spatio_temporal_scaling": (True, False, False)},
            "decoder_spatio_temporal_scaling is .*; accepted is what makes the encoder's spatial ratio, 8",
        ),
        (TINY_TIMED_VAE, {"upsample_factor": (2, 3)}, "upsample_factor is .*divisors of 8"),
        (TINY_TIMED_VAE, {"upsample_factor": (2, 1)}, "upsample_factor is .*gets 16 channels for 8"),
        (TINY_VAE, {"upsample_factor": (1, 1, 2)}, "upsample_factor is .*; accepted is 1 where a block does not scale"),
        (TINY_VAE, {"upsample_residual": (True,) * 3}, "multiples of 8 where upsample_residual is true"),
        (TINY_VAE, {"timestep_conditioning": True}, "decoder_block_out_channels is .*equal widths"),
    ],
)
def test_config_refuses_what_it_cannot_honour(base: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        LTXVideoVAEConfig.from_dict(base | changes)
    assert caught.value.message.startswith(f"LTXVideoVAEConfig.{caught.value.param} is ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ltx(tmp_path_factory.mktemp("whole") / "timed", TINY_LTXS["timed"])


def change_weights(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Files are replaced, for the checkpoint shares them."""
    [file] = (checkpoint / "vae").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    file.unlink()
    safetensors.torch.save_file(tensors, file)


def change_config(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "vae" / "config.json"
    values = read_json_object(file) | changes
    file.unlink()
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (
            lambda path: change_weights(path, lambda tensors: tensors.pop("decoder.timestep_scale_multiplier")),
            CorruptCheckpoint,
            "vae do not fit vae/config.json: 1 missing: decoder.timestep_scale_multiplier",
        ),
        (
            lambda path: change_weights(path, lambda tensors: tensors.update(other=torch.zeros(1))),
            CorruptCheckpoint,
            "vae do not fit vae/config.json: 1 unexpected: other",
        ),
        (
            lambda path: change_weights(path, lambda tensors: tensors.update(latents_std=torch.zeros(3))),
            CorruptCheckpoint,
            r"1 mis-shaped: latents_std \(file 3, model 8\)",
        ),
        (
            lambda path: change_config(path, patch_size_t=2),
            UnsupportedModel,
            "vae/config.json: LTXVideoVAEConfig.patch_size_t is 2; accepted is 1",
        ),
        (lambda path: change_config(path, act_fn="gelu"), UnsupportedModel, "LTXVideoVAEConfig has no field 'act_fn'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_its_reason(
    damage: Callable[[Path], None], error: type[ModelError], sentence: str, whole: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    for file in whole.rglob("*"):
        if file.is_file():
            (checkpoint / file.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / file.relative_to(whole)).hardlink_to(file)
    damage(checkpoint)
    with pytest.raises(error, match=sentence):
        load(checkpoint)


def test_in_bf16_the_spread_of_the_latents_is_as_the_file_has_it(whole: Path) -> None:
    [file] = (whole / "vae").glob("*.safetensors")
    stored, vae = safetensors.torch.load_file(file), load(whole, precision="bf16").vae
    for name in ("latents_mean", "latents_std", "decoder.timestep_scale_multiplier"):
        assert torch.equal(vae.state_dict()[name], stored[name]) and stored[name].dtype == torch.float32
    assert vae.dtype == torch.bfloat16


# What surrounds it


@pytest.mark.parametrize("config", [TINY_VAE, TINY_TIMED_VAE, TINY_NOISY_VAE])
@pytest.mark.parametrize("kind", ["vae_decode", "vae_encode"])
def test_benchmarks_run_the_same_work_on_both(kind: str, config: dict[str, Any]) -> None:
    reference, ours = vae_pair(config)
    size = WorkSize(
        height=16, width=24, num_frames=5, latent_shape=(8, 2, 2, 3), batch_size=2, num_text_tokens=1, chunk_frames=2
    )
    workload = LTX_WORKLOADS[kind]
    inputs = workload.inputs({"vae": ours.config}, size, Drawing(torch.device("cpu"), torch.float32))
    found, expected = workload.forward(ours, inputs, size), workload.reference_forward(reference, inputs)
    assert relative_error(found, expected) <= TOLERANCE


def test_the_autoencoder_needs_no_library() -> None:
    """Nor does what LTX pipelines say of it; text encoders come from a library."""
    package = "sglang.multimodal_gen"
    modules = (
        f"{package}.configs.models.vaes.ltx",
        f"{package}.runtime.models.vaes.ltx_vae",
        *(f"{package}.runtime.pipelines.ltx_{part}" for part in ("conditioning", "denoiser", "workloads")),
    )
    code = f"import sys, {', '.join(modules)}; print({{'diffusers', 'transformers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_estimates_of_memory_are_those_of_the_published_forms() -> None:
    """At full size there are as many channels as the decoder's last block, or the encoder's first one, has."""
    for hub_id in PUBLISHED:
        config = LTXVideoVAEConfig.from_dict(published_config(hub_id))
        memory = LTXPipeline.decoder_memory_of({"vae": config}, 2)
        assert (memory.channels, memory.patch_size, memory.element_size) == (128, 4, 2)
        assert np.isclose(memory.chunk_bytes(8, 32, 64), 7 * 8 * 8 * 16 * 128 * 2 + 8 * 32 * 64 * 3 * 9)
