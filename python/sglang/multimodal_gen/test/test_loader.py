"""Loading checkpoints: what fits loads at the wanted dtype, what does not fit says so in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.errors import CorruptCheckpoint, ModelError, PickleRefused, UnsupportedModel
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext, NativeModule, load_module
from sglang.multimodal_gen.runtime.loader.weight_utils import open_weights
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.placement import DTYPES, place
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONTEXT = LoadContext(device=torch.device("cpu"), dtype=torch.float32, layers=LayerContext())
TRANSFORMER = WanPipeline.components["transformer"]


@pytest.fixture
def checkpoint(wan_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(wan_checkpoint("plain"), tmp_path / "model"))


def load_transformer(checkpoint: Path) -> torch.nn.Module:
    module = TRANSFORMER(checkpoint / "transformer", "WanTransformer3DModel", CONTEXT)
    assert isinstance(module, torch.nn.Module)
    return module


def shard(directory: Path, count: int) -> list[Path]:
    """Split a component's weights into shards with an index, as large checkpoints have them."""
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {key: names[i % count] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        safetensors.torch.save_file(part, directory / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return [directory / name for name in names]


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS)


def test_loaded_module_has_the_files_tensors_and_is_ready_to_run(checkpoint: Path) -> None:
    stored = safetensors.torch.load_file(checkpoint / "transformer" / WEIGHTS)
    module = load_transformer(checkpoint)
    assert not module.training
    assert {name for name, _ in module.named_parameters()} == set(stored)
    for name, parameter in module.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, stored[name]), name


def test_shards_load_like_one_file(checkpoint: Path) -> None:
    whole = load_transformer(checkpoint).state_dict()
    shard(checkpoint / "transformer", 5)
    for name, tensor in load_transformer(checkpoint).state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_bf16_keeps_what_the_model_needs_in_fp32(checkpoint: Path) -> None:
    config = WanTransformerConfig.from_dict(json.loads((checkpoint / "transformer" / "config.json").read_text()))
    module = load_module(
        WanTransformer3DModel,
        config,
        checkpoint / "transformer",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        context=LayerContext(),
    )
    fp32 = {name for name, parameter in module.named_parameters() if parameter.dtype == torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float32, torch.bfloat16}
    assert fp32 == {
        name for name in module.state_dict() if set(name.split(".")) & set(WanTransformer3DModel.keep_in_fp32)
    }


def test_component_that_computes_in_fp32_does_so_in_a_bf16_pipeline(checkpoint: Path) -> None:
    context = LoadContext(
        device=torch.device("cpu"), dtype=torch.bfloat16, layers=LayerContext(), fp32_components=("vae",)
    )
    vae = WanPipeline.components["vae"](checkpoint / "vae", "AutoencoderKLWan", context)
    assert isinstance(vae, AutoencoderKLWan)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "vae_precision", "expected"),
    [
        ("fp32", "auto", torch.float32),
        ("bf16", "auto", torch.bfloat16),
        ("fp16", "auto", torch.float32),
        ("bf16", "fp32", torch.float32),
        ("fp32", "bf16", torch.bfloat16),
        ("fp16", "fp16", torch.float16),
    ],
)
def test_the_autoencoder_may_have_a_precision_of_its_own(
    precision: str, vae_precision: str, expected: torch.dtype
) -> None:
    execution = ExecutionArgs(device="cpu", precision=precision, vae_precision=vae_precision)
    placement = place(execution)
    context = WanPipeline.load_context(PipelineConfig(), placement, execution)
    assert context.dtype_of("vae") == expected
    assert context.dtype_of("transformer") == placement.dtype == DTYPES[precision]
    [reason] = [line for line in placement.reasons if line.startswith("vae_precision")]
    assert reason.endswith("asked for" if vae_precision != "auto" else f"default with {precision}")


def test_missing_shard_is_named(checkpoint: Path) -> None:
    files = shard(checkpoint / "transformer", 3)
    files[1].unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"{files[1].name}.*missing"):
        load_transformer(checkpoint)


def test_shard_without_the_tensor_that_the_index_promises_is_named(checkpoint: Path) -> None:
    files = shard(checkpoint / "transformer", 2)
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(CorruptCheckpoint, match="not in the file that the index names"):
        load_transformer(checkpoint)


@pytest.mark.parametrize("file", ["../../secret.safetensors", "weights.bin", 7])
def test_index_may_only_name_safetensors_files_beside_it(checkpoint: Path, file: object) -> None:
    directory = checkpoint / "transformer"
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"proj_out.weight": file}}))
    with pytest.raises(CorruptCheckpoint, match="accepted are safetensors files beside it"):
        load_transformer(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_file_is_refused_before_it_is_mapped(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptCheckpoint, match=rf"transformer/{WEIGHTS}.*truncated"):
        load_transformer(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 12) + b'{"a": [1, 2]}'[:12],
        struct.pack("<Q", 9) + b'{"a":"b"}',
    ],
)
def test_file_that_is_no_safetensors_file_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "transformer" / WEIGHTS).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=f"transformer/{WEIGHTS}"):
        load_transformer(checkpoint)


def test_trailing_bytes_are_refused(checkpoint: Path) -> None:
    with (checkpoint / "transformer" / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        load_transformer(checkpoint)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(checkpoint: Path, name: str) -> None:
    (checkpoint / "transformer" / WEIGHTS).rename(checkpoint / "transformer" / name)
    with pytest.raises(PickleRefused, match=rf"{name}.*safe_serialization=True"):
        load_transformer(checkpoint)


def test_component_without_weights_says_so(checkpoint: Path) -> None:
    (checkpoint / "transformer" / WEIGHTS).unlink()
    with pytest.raises(CorruptCheckpoint, match="holds no safetensors weights"):
        load_transformer(checkpoint)


def test_several_files_without_an_index_are_not_guessed_at(checkpoint: Path) -> None:
    shard(checkpoint / "transformer", 2)
    (checkpoint / "transformer" / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(CorruptCheckpoint, match="no index file"):
        load_transformer(checkpoint)


def test_every_key_that_does_not_fit_is_in_one_error(checkpoint: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["proj_out.bias"], tensors["blocks.0.attn1.to_q.weight"]
        tensors["surplus.weight"] = torch.zeros(2)
        tensors["patch_embedding.bias"] = torch.zeros(3)

    edit_weights(checkpoint / "transformer", damage)
    with pytest.raises(CorruptCheckpoint) as caught:
        load_transformer(checkpoint)
    message = caught.value.message
    assert "2 missing: " in message and "proj_out.bias" in message and "blocks.0.attn1.to_q.weight" in message
    assert "1 unexpected: surplus.weight" in message
    assert "1 mis-shaped: patch_embedding.bias (file 3, model 48)" in message


def test_many_keys_that_do_not_fit_are_counted_not_listed(checkpoint: Path) -> None:
    edit_weights(checkpoint / "transformer", lambda tensors: [tensors.pop(key) for key in list(tensors)[:20]] and None)
    with pytest.raises(CorruptCheckpoint, match=r"20 missing: ([^,]+, ){8}…"):
        load_transformer(checkpoint)


def test_quantised_weights_are_refused_where_nothing_reads_them(checkpoint: Path) -> None:
    """Of a transformer those in fp8 are read: test_quantized_checkpoints.py."""

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_weights(checkpoint / "vae", quantise)
    context = LoadContext(device=torch.device("cpu"), dtype=torch.float32, layers=LayerContext())
    with pytest.raises(CorruptCheckpoint, match=r"F8_E4M3.*quantised"):
        WanPipeline.components["vae"](checkpoint / "vae", "AutoencoderKLWan", context)


def test_encoder_loads_whether_the_shared_embedding_is_stored_once_or_twice(checkpoint: Path) -> None:
    directory = checkpoint / "text_encoder"
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    embedding = tensors["shared.weight"]
    load = WanPipeline.components["text_encoder"]
    own, alias = "shared.weight", "encoder.embed_tokens.weight"
    for keys in ((own,), (alias,), (own, alias)):
        tensors.pop(own, None)
        tensors.pop(alias, None)
        safetensors.torch.save_file(tensors | {key: embedding.clone() for key in keys}, directory / "model.safetensors")
        assert torch.equal(load(directory, "UMT5EncoderModel", CONTEXT).shared.weight, embedding)


def test_component_of_another_class_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModel, match="OtherModel; supported is WanTransformer3DModel"):
        TRANSFORMER(checkpoint / "transformer", "OtherModel", CONTEXT)


def test_config_key_that_is_unknown_names_file_and_key(checkpoint: Path) -> None:
    path = checkpoint / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_feature": True}))
    with pytest.raises(UnsupportedModel, match=r"transformer/config.json.*new_feature"):
        load_transformer(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: shutil.rmtree(path / "vae"),
        lambda path: (path / "transformer" / "config.json").unlink(),
        lambda path: (path / "scheduler" / "scheduler_config.json").write_text("{"),
        lambda path: (path / "tokenizer" / "tokenizer.json").write_text("{}"),
        lambda path: shutil.rmtree(path / "tokenizer") or (path / "tokenizer").mkdir(),
        lambda path: (path / "vae" / "config.json").write_text('"text"'),
    ],
    ids=["no vae", "no config", "broken scheduler", "broken tokenizer", "no tokenizer", "config is text"],
)
def test_damaged_checkpoint_ends_in_one_sentence(checkpoint: Path, damage: Callable[[Path], object]) -> None:
    damage(checkpoint)
    with pytest.raises(ModelError) as caught:
        build_pipeline(str(checkpoint))
    assert "\n" not in caught.value.message
    assert str(checkpoint) not in caught.value.message


def test_native_module_names_its_class() -> None:
    assert isinstance(TRANSFORMER, NativeModule)
    assert TRANSFORMER.module_class is WanTransformer3DModel


def test_header_knows_every_tensor_without_reading_it(checkpoint: Path) -> None:
    stored = open_weights(checkpoint / "transformer")
    expected = safetensors.torch.load_file(checkpoint / "transformer" / WEIGHTS)
    assert {name: tensor.shape for name, tensor in stored.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }


def test_hub_that_cannot_be_reached_ends_in_one_sentence(tmp_path: Path) -> None:
    script = (
        "from sglang.multimodal_gen.errors import ServingError\n"
        "from sglang.multimodal_gen.registry import get_model_info\n"
        "from sglang.multimodal_gen.runtime.loader.hub import ensure_local\n"
        "try:\n    ensure_local(get_model_info('someone/no-such-model'))\n"
        "except ServingError as error:\n    print(error.code, error.message)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, timeout=60, env=environment, stdout=subprocess.PIPE, text=True)
    code, _, message = done.stdout.rstrip("\n").partition(" ")
    assert code == "model_not_reachable"
    assert "someone/no-such-model" in message and "cache" in message and "\n" not in message


def test_worker_path_imports_neither_transformers_nor_diffusers_nor_the_compiler(
    wan_checkpoint: Callable[[str], Path],
) -> None:
    """Each of them would add 2 to 6 seconds to every start."""
    code = (
        "import sys, torch\n"
        "from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams\n"
        "from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline\n"
        "pipeline = build_pipeline(sys.argv[1])\n"
        "params = SamplingParams(prompt='a', width=16, height=16, num_frames=5, num_inference_steps=2, seed=0)\n"
        "with torch.inference_mode():\n"
        "    req = pipeline.admit('r', params)\n"
        "    for phase in req.phases:\n"
        "        for _ in range(phase.units):\n"
        "            pipeline.run_unit(phase.name, [req])\n"
        "loaded = {'transformers', 'diffusers', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code, str(wan_checkpoint("plain"))], check=True, timeout=60)
