"""Transformers' files by the names of the models' first repositories: what diffusers makes of them is the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.errors_quantization import QuantizationNotSupported
from sglang.multimodal_gen.runtime.layers.quantization.schemes import Scheme
from sglang.multimodal_gen.test.quantization_case import WEIGHTS, load, quantized_file, quantized_layers, stored_weights
from sglang.multimodal_gen.test.tiny_families import FAMILIES

CONVERTERS = {
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "hunyuan": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "ltx": single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
    "zimage": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
}
PUBLISHED_WIDTH = 3072
FAMILY_NAMES = sorted(CONVERTERS)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family not in made:
            made[family] = FAMILIES[family][0](tmp_path_factory.mktemp(family) / "checkpoint")
        return made[family]

    return checkpoint


def original(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The same weights as the first repository has them: what its names say, backwards."""
    left, written = dict(tensors), {}
    for rule in config.foreign_names:
        if not rule.own or "processor" in rule.name:  # of adapters alone
            continue
        first = re.compile(re.escape(rule.own[0]).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias|)")
        for found in [found for name in list(left) if (found := first.fullmatch(name))]:
            *numbers, leaf = found.groups()
            parts = [own.format(*numbers) + leaf for own in rule.own]
            if not all(part in left for part in parts):
                continue
            whole = torch.cat([left.pop(part) for part in parts])
            if rule.halves_swapped:
                whole = torch.cat(whole.chunk(2)[::-1])
            written[rule.name.format(*numbers) + leaf] = whole
    return written | left


def converted(family: str, tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """By diffusers, in whose code some models have their published width."""

    def narrower(code: CodeType) -> CodeType:
        constants = (
            narrower(each) if isinstance(each, CodeType) else width if each == PUBLISHED_WIDTH else each
            for each in code.co_consts
        )
        return code.replace(co_consts=tuple(constants))

    convert = CONVERTERS[family]
    copy = type(convert)(narrower(convert.__code__), convert.__globals__)
    return copy(dict(tensors))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_files_of_first_repositories_are_what_diffusers_makes_of_them(
    family: str, prefix: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(family)
    plain = load(checkpoint).transformer
    stored = stored_weights(checkpoint)
    written = original(stored, plain.config)
    assert len(written) < len(stored) or family in ("wan", "ltx")
    expected = converted(family, written, getattr(plain.config, "hidden_size", 0))
    assert expected.keys() == stored.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in stored.items())

    others = {"vae.decoder.weight": torch.ones(2)} if prefix else {}
    save_file({prefix + key: tensor for key, tensor in written.items()} | others, tmp_path / "whole.safetensors")
    read = load(checkpoint, transformer_weights_path=str(tmp_path / "whole.safetensors")).transformer
    assert read.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_scales_of_joined_layers_are_those_of_each(
    granularity: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As ComfyUI writes FLUX.1: in fp8, by the names of its first repository, with descriptions of layers."""
    checkpoint = checkpoint_of("flux")
    plain = load(checkpoint)
    values, scales = quantized_file(plain, checkpoint, Scheme("fp8", granularity))
    written = original(values, plain.transformer.config)
    joined = original({f"{name}.weight": scale for name, scale in scales.items()}, plain.transformer.config)
    for key, scale in joined.items():
        layer = key.removesuffix(".weight")
        # One number for a tensor is the same for all layers in it.
        written[f"{layer}.weight_scale"] = scale[0, 0] if granularity == "tensor" else scale
        written[f"{layer}.input_scale"] = torch.ones(())
        # As long as the tensor has rows: it is the description of all of it.
        said = b'{"format": "float8_e4m3fn"}'.ljust(scale.shape[0])
        written[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    save_file(written, tmp_path / "flux.safetensors")
    layers = quantized_layers(load(checkpoint, transformer_weights_path=str(tmp_path / "flux.safetensors")).transformer)
    assert layers.keys() == scales.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight.view(torch.uint8), values[f"{name}.weight"].view(torch.uint8)), name
        if granularity == "row":
            assert torch.equal(layer.get_parameter("weight_scale"), scales[name]), name
    query, key = layers["transformer_blocks.0.attn.to_q"], layers["transformer_blocks.0.attn.to_k"]
    if granularity == "tensor":
        assert torch.equal(query.get_parameter("weight_scale"), key.get_parameter("weight_scale"))


def test_swapped_halves_are_put_right_in_fp8_too(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Of a file in which everything was cast."""
    checkpoint = checkpoint_of("flux")
    config = load(checkpoint).transformer.config
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored_weights(checkpoint).items()}
    save_file(original(cast, config), tmp_path / "cast.safetensors")
    read = load(checkpoint, transformer_weights_path=str(tmp_path / "cast.safetensors")).transformer
    for name in ("norm_out.linear.weight", "norm_out.linear.bias"):
        assert torch.equal(read.state_dict()[name], cast[name].float())


def test_two_experts_have_a_file_each(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = checkpoint_of("wan")
    plain = load(checkpoint)
    for name in ("transformer", "transformer_2"):
        written = original(load_file(checkpoint / name / WEIGHTS), plain.transformer.config)
        save_file({key: tensor + 1 for key, tensor in written.items()}, tmp_path / f"{name}.safetensors")
    read = load(
        checkpoint,
        transformer_weights_path=str(tmp_path / "transformer.safetensors"),
        transformer_2_weights_path=str(tmp_path / "transformer_2.safetensors"),
    )
    for name in ("transformer", "transformer_2"):
        for key, tensor in getattr(plain, name).state_dict().items():
            assert torch.equal(getattr(read, name).state_dict()[key], tensor + 1), key


def test_what_does_not_fit_is_named(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = checkpoint_of("flux")
    written = original(stored_weights(checkpoint), load(checkpoint).transformer.config)
    path = tmp_path / "odd.safetensors"
    joined = written["double_blocks.0.img_attn.qkv.weight"]
    save_file(written | {"double_blocks.0.img_attn.qkv.weight": joined[:-1].clone()}, path)
    with pytest.raises(
        CorruptCheckpoint, match=r"odd.safetensors: double_blocks.0.img_attn.qkv.weight is \[\d+, \d+\]"
    ):
        load(checkpoint, transformer_weights_path=str(path))
    save_file(written | {"double_blocks.7.img_attn.qkv.weight": joined.clone()}, path)
    with pytest.raises(CorruptCheckpoint, match=r"1 unexpected: double_blocks\.7\.img_attn\.qkv\.weight"):
        load(checkpoint, transformer_weights_path=str(path))
    with pytest.raises(QuantizationNotSupported, match="this model has no transformer_2"):
        load(checkpoint, transformer_2_weights_path=str(path))
