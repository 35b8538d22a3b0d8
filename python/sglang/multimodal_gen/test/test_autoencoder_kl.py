"""The native picture autoencoder against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only, over some thirty layers of norms.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch

from sglang.multimodal_gen.configs.models.vaes.autoencoder_kl import AutoencoderKLConfig
from sglang.multimodal_gen.configs.published import published_directory, published_ids
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidRequest, UnsupportedModel
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext, NativeModule
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl import AutoencoderKL
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.pipelines_core.memory import DecoderMemory
from sglang.multimodal_gen.test.pipeline_parity import relative_error
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux
from sglang.multimodal_gen.test.tiny_parts import tiny_picture_vae
from sglang.multimodal_gen.test.tiny_wan import noise

TOLERANCE = 1e-5
SMALL_TILES = Tiling(tile_height=32, tile_width=32, stride_height=24, stride_width=24)


def stages(*widths: int) -> dict[str, Any]:
    """So many resolutions."""
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {},
    "sd": {"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None, "layers_per_block": 2},
    "no_attention": {"mid_block_add_attention": False, "use_quant_conv": True},
    "one_stage": {**stages(8), "act_fn": "swish", "latent_channels": 3},
    "two_stages": {**stages(12, 24), "norm_num_groups": 6, "use_post_quant_conv": True},
    "three_stages": {**stages(8, 24, 16), "norm_num_groups": 8, "layers_per_block": 3},
}


def vae_pair(**changes: Any) -> tuple[Any, AutoencoderKL]:
    """Diffusers' and ours."""
    reference = tiny_picture_vae(0, **changes)
    ours = AutoencoderKL(AutoencoderKLConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    return reference, ours.eval()


def decoded(reference: Any, latents: torch.Tensor) -> torch.Tensor:
    """By diffusers', with a dimension for time."""
    return reference.decode(latents.squeeze(2), return_dict=False)[0].unsqueeze(2)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_matches_diffusers(name: str) -> None:
    reference, ours = vae_pair(**CONFIGS[name])
    for height, width in ((4, 4), (5, 3), (1, 2)):
        latents = noise(2, ours.config.latent_channels, 1, height, width)
        found, ratio = ours.decode(latents), ours.config.spatial_ratio
        assert found.shape == (2, 3, 1, height * ratio, width * ratio)
        assert relative_error(found, decoded(reference, latents)) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encoding_matches_diffusers_its_most_likely_latents_and_its_draws(name: str) -> None:
    """Sides that are no multiple of a cell lose what is left over, as there."""
    reference, ours = vae_pair(**CONFIGS[name])
    for height, width in ((32, 24), (35, 45)):
        pictures = noise(2, 3, 1, height, width)
        expected = reference.encode(pictures.squeeze(2)).latent_dist
        assert relative_error(ours.encode(pictures).mean.squeeze(2), expected.mode()) <= TOLERANCE
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        drawn = ours.encode(pictures).chosen(generators[0])
        assert relative_error(drawn.squeeze(2), expected.sample(generators[1])) <= TOLERANCE


@torch.no_grad()
def test_latents_of_the_transformer_are_scaled_and_shifted_as_in_diffusers() -> None:
    for changes in ({}, {"shift_factor": None}):
        reference, ours = vae_pair(**changes)
        pictures = noise(1, 3, 1, 16, 24)
        config = reference.config
        expected = (reference.encode(pictures.squeeze(2)).latent_dist.mode() - (config.shift_factor or 0.0)) * (
            config.scaling_factor
        )
        latents = ours.to_latents(pictures)
        assert relative_error(latents.squeeze(2), expected) <= TOLERANCE
        assert relative_error(ours.denormalise(latents), ours.encode(pictures).mean) <= TOLERANCE
        drawn = ours.to_latents(pictures, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(drawn, latents)


@pytest.mark.parametrize("size", [(5, 7), (4, 9), (4, 4), (3, 2)])
@torch.no_grad()
def test_tiles_match_diffusers(size: tuple[int, int]) -> None:
    reference, ours = vae_pair(use_quant_conv=True, use_post_quant_conv=True, sample_size=32)
    reference.enable_tiling()
    latents = noise(1, 4, 1, *size)
    assert relative_error(ours.decode(latents, tiling=SMALL_TILES), decoded(reference, latents)) <= TOLERANCE
    pictures = noise(1, 3, 1, *(8 * side for side in size), seed=1)
    expected = reference.encode(pictures.squeeze(2)).latent_dist.mode()
    assert relative_error(ours.encode(pictures, tiling=SMALL_TILES).mean.squeeze(2), expected) <= TOLERANCE


@torch.no_grad()
def test_activations_in_channels_last_order_give_the_same() -> None:
    """The order of GPUs, where nothing may depend on how memory lies."""
    _, ours = vae_pair()
    latents, pictures = noise(2, 4, 3, 5), noise(1, 3, 32, 24)
    for network, images in ((ours.decoder, latents), (ours.encoder, pictures)):
        found = network(images.contiguous(memory_format=torch.channels_last))
        assert relative_error(found, network(images)) <= TOLERANCE


@torch.no_grad()
def test_bf16_error_is_no_worse_than_diffusers() -> None:
    """1.25 leaves room for where single values happen to round."""
    reference, ours = vae_pair()
    latents = noise(1, 4, 1, 6, 6)
    expected = decoded(reference, latents)
    error_of_ours = (ours.bfloat16().decode(latents.bfloat16()).float() - expected).abs().mean()
    theirs = decoded(reference.bfloat16(), latents.bfloat16())
    assert error_of_ours <= 1.25 * (theirs.float() - expected).abs().mean()


def test_a_picture_is_one_frame() -> None:
    _, ours = vae_pair()
    with pytest.raises(AssertionError, match="a picture is one frame"):
        ours.decode(noise(1, 4, 2, 2, 2))
    with pytest.raises(AssertionError, match="a picture is one frame"):
        ours.new_state(None, carry=True)


# --- configs ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"act_fn": "mish"}, "act_fn is 'mish'; accepted is silu"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types is .*; accepted is 2 DownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types is .*; accepted is 2 UpDecoderBlock2D"),
        ({"norm_num_groups": 3}, r"norm_num_groups is 3; accepted is a divisor of block_out_channels \[8, 16\]"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0"),
        ({"in_channels": 4}, "in_channels is 4; accepted is 3"),
        ({"out_channels": 1}, "out_channels is 1; accepted is 3"),
        ({"layers_per_block": 0}, "layers_per_block is 0; accepted is 1 or more"),
        ({"latent_channels": 0}, "latent_channels is 0; accepted is 1 or more"),
        ({"scaling_factor": 0}, "scaling_factor is 0; accepted is a number above 0"),
        ({"latents_mean": [0.0, 1.0]}, r"latents_mean is \[0.0, 1.0\]; accepted is null"),
        ({"latents_std": [1.0]}, "latents_std is .*; accepted is null"),
        ({"block_out_channels": []}, "block_out_channels is .*; accepted is one width for each resolution"),
        ({"norm_type": "spatial"}, "has no field 'norm_type'"),
        ({"use_quant_conv": None}, "use_quant_conv is None, but must be bool"),
    ],
)
def test_config_refuses_what_it_cannot_honour(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    config = {**json.loads(json.dumps(stages(8, 16))), "norm_num_groups": 4, **changes}
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        AutoencoderKLConfig.from_dict(config)
    assert caught.value.param == next(iter(changes))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=f"^vae/config.json: .*{sentence}"):
        NativeModule(AutoencoderKL, AutoencoderKLConfig).config(tmp_path / "vae")


def test_config_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        reference = diffusers.AutoencoderKL()
    assert AutoencoderKLConfig.from_dict(dict(reference.config)) == AutoencoderKLConfig()


@pytest.mark.parametrize(
    "hub_id",
    [
        hub_id
        for hub_id in published_ids()
        if "AutoencoderKL" in json.loads((published_directory(hub_id) / "model_index.json").read_text())["vae"]
    ],
)
def test_published_structures_are_those_of_diffusers(hub_id: str) -> None:
    data = json.loads((published_directory(hub_id) / "vae" / "config.json").read_text())
    with torch.device("meta"):
        reference = diffusers.AutoencoderKL.from_config(data)
        ours = AutoencoderKL(AutoencoderKLConfig.from_dict(data))
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_819_683
    assert ours.config.spatial_ratio == 8


# --- loading ---


def saved(directory: Path, tensors: dict[str, torch.Tensor], config: Any) -> AutoencoderKL:
    """Written as a checkpoint, and loaded."""
    (directory / "vae").mkdir()
    (directory / "vae" / "config.json").write_text(json.dumps(dict(config), default=str))
    safetensors.torch.save_file(tensors, directory / "vae" / "diffusion_pytorch_model.safetensors")
    context = LoadContext(device=torch.device("cpu"), dtype=torch.float32, layers=LayerContext())
    module = NativeModule(AutoencoderKL, AutoencoderKLConfig)(directory / "vae", "AutoencoderKL", context)
    assert isinstance(module, AutoencoderKL)
    return module


def test_the_attention_of_older_files_is_read_by_its_older_names(tmp_path: Path) -> None:
    """As diffusers reads them."""
    reference = tiny_picture_vae(0)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in reference.state_dict().items():
        for new, older in old.items():
            name = name.replace(f".{new}.", f".{older}.")
        tensors[name] = tensor.clone()
    assert sum(".proj_attn." in name for name in tensors) == 4
    found = saved(tmp_path, tensors, reference.config)
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **reference.config}))
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
        assert torch.equal(theirs.state_dict()[name], tensor)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    reference = tiny_picture_vae(0)
    whole = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    key = "encoder.mid_block.attentions.0.to_q.weight"
    for number, (changes, gone, sentence) in enumerate(
        (
            ({}, (key,), f"1 missing: {key}"),
            ({"quant_conv.weight": torch.zeros(8, 8, 1, 1)}, (), "1 unexpected: quant_conv.weight"),
            ({key: torch.zeros(16, 15)}, (), rf"1 mis-shaped: {key} \(file 16x15, model 16x16\)"),
        )
    ):
        (directory := tmp_path / str(number)).mkdir()
        tensors = {name: tensor for name, tensor in (whole | changes).items() if name not in gone}
        with pytest.raises(CorruptCheckpoint, match=rf"weights in vae do not fit vae/config\.json: {sentence}"):
            saved(directory, tensors, reference.config)


def test_older_names_are_no_excuse_for_attention_that_the_config_does_not_have(tmp_path: Path) -> None:
    reference = tiny_picture_vae(0, mid_block_add_attention=False)
    extra = {"decoder.mid_block.attentions.0.query.weight": torch.zeros(16, 16)}
    with pytest.raises(CorruptCheckpoint, match=r"1 unexpected: decoder\.mid_block\.attentions\.0\.query\.weight"):
        saved(tmp_path, {**reference.state_dict(), **extra}, reference.config)


DIFFUSERS_IMPORTED = "print([name for name in sys.modules if name.partition('.')[0] == 'diffusers'])"


def lines_of(program: str, *arguments: str) -> list[str]:
    """What it prints in an interpreter of its own."""
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_pipelines_of_pictures_do_without_diffusers() -> None:
    """Importing it takes more than a second of a worker's start."""
    imports = [f"import sglang.multimodal_gen.runtime.pipelines.{family}" for family in ("flux_edit", "sd3", "zimage")]
    program = "\n".join(f"{line}\n{DIFFUSERS_IMPORTED}" for line in ["import sys", *imports])
    assert lines_of(program) == ["[]"] * 4


def test_a_pipeline_is_built_and_makes_a_picture_without_diffusers(tmp_path: Path) -> None:
    program = f"""
import sys, torch
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

pipeline = build_pipeline(sys.argv[1], ExecutionArgs(device="cpu"))
params = SamplingParams.from_values(dict(prompt="x", width=32, height=32, num_inference_steps=1, seed=1))
with torch.inference_mode():
    req = pipeline.admit("r", params)
    outputs = [pipeline.run_unit(phase.name, [req]) for phase in req.phases]
print(outputs[-1][0].frames.shape)
{DIFFUSERS_IMPORTED}
"""
    found = lines_of(program, str(save_tiny_flux(tmp_path / "flux", TINY_FLUXES["dev"])))
    assert found == ["torch.Size([1, 32, 32, 3])", "[]"]


# --- memory ---


def test_a_decoder_plans_with_the_second_width_at_full_size() -> None:
    memory = DecoderMemory.of_pictures((128, 256, 512, 512), 2)
    assert (memory.channels, memory.patch_size, memory.carried_channels) == (256, 1, 0)
