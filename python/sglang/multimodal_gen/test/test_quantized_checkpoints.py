"""Checkpoints that are quantised already: read as other programs write them, and written by `sglang quantize`."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang.cli.main import main
from sglang.multimodal_gen.configs.model_outline import outline_of
from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidValue, StorageError
from sglang.multimodal_gen.errors_lora import InvalidLora
from sglang.multimodal_gen.errors_quantization import (
    InvalidQuantizedWeights,
    OutputNotEmpty,
    QuantizationConflict,
    QuantizationNotReadable,
    QuantizationNotSupported,
)
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.entrypoints.cli import quantize
from sglang.multimodal_gen.runtime.layers.quantization.schemes import Scheme
from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource
from sglang.multimodal_gen.runtime.loader.quantization_wishes import check_wishes
from sglang.multimodal_gen.runtime.loader.quantized_checkpoint import as_os_error, write_quantized
from sglang.multimodal_gen.runtime.pipelines.flux import FluxPipeline
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, ModelArgs
from sglang.multimodal_gen.test.parallel_case import FORWARD_TOLERANCE, made_of
from sglang.multimodal_gen.test.parallel_pool import FAMILIES, Pool
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, relative_error
from sglang.multimodal_gen.test.quantization_case import (
    WEIGHTS,
    latents,
    load,
    quantized_file,
    quantized_layers,
    realigned,
    set_weights,
    stored_weights,
    with_transformer,
)

FAMILY = FAMILIES["flux"]
WISH: dict[str, Any] = FAMILY.wishes[0] | {"num_inference_steps": 2, "output_type": "latent"}
CPU = torch.device("cpu")
ONE_FOR_ALL, ONE_FOR_EACH = Scheme("fp8", "tensor"), Scheme("fp8", "row")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY.save(tmp_path_factory.mktemp("flux") / "checkpoint")


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    return load(checkpoint)


def multiplied_out(checkpoint: Path, tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
    """What the checkpoint makes with these values times these scales, computed by hand."""
    weights = {name: tensors[f"{name}.weight"].float() * scale for name, scale in scales.items()}
    return latents(realigned(set_weights(load(checkpoint), weights)), WISH)


def comfy_bytes(**said: Any) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


# --- files of other programs ---


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_scaled_files_of_comfyui_keep_their_values(prefix: str, checkpoint: Path, plain: Any, tmp_path: Path) -> None:
    """The older layout: one scale for a weight, scales of activations that need none, and a marker of the file."""
    tensors, scales = quantized_file(plain, checkpoint, ONE_FOR_ALL)
    written = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    for name, scale in scales.items():
        written[f"{prefix}{name}.scale_weight"] = scale.view(())
        written[f"{prefix}{name}.scale_input"] = torch.ones(1)
    written[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(written, tmp_path / "model.safetensors")
    pipeline = load(checkpoint, transformer_weights_path=str(tmp_path / "model.safetensors"))
    layers = quantized_layers(pipeline.transformer)
    assert layers.keys() == scales.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight.float(), tensors[f"{name}.weight"].float())
        assert layer.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(latents(realigned(pipeline), WISH), multiplied_out(checkpoint, tensors, scales))


def test_described_layers_of_comfyui_compute_as_they_say(
    checkpoint: Path, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer layout: a description for each layer, which may forbid products in fp8."""
    monkeypatch.setattr("sglang.multimodal_gen.runtime.loader.quantized_layers.computes_in_fp8", lambda device: True)
    tensors, scales = quantized_file(plain, checkpoint, ONE_FOR_ALL)
    exact = set(sorted(scales)[::2])
    for name, scale in scales.items():
        tensors[f"{name}.weight_scale"] = scale.view(1)
        described = {"format": "float8_e4m3fn", "full_precision_matrix_mult": name in exact}
        tensors[f"{name}.comfy_quant"] = comfy_bytes(**described)
    pipeline = load(with_transformer(checkpoint, tmp_path / "model", tensors))
    for name, layer in quantized_layers(pipeline.transformer).items():
        assert layer.quantization is not None
        fits = all(size % 16 == 0 for size in layer.weight.shape)
        assert layer.quantization.scales_inputs == (fits and name not in exact), name


def test_a_marker_of_two_forbids_products_in_fp8(
    checkpoint: Path, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.multimodal_gen.runtime.loader.quantized_layers.computes_in_fp8", lambda device: True)
    tensors, scales = quantized_file(plain, checkpoint, ONE_FOR_ALL)
    tensors |= {f"{name}.scale_weight": scale for name, scale in scales.items()}
    for marker, products in ((torch.zeros(2), False), (torch.zeros(0), True)):
        model = with_transformer(
            checkpoint, tmp_path / str(products), tensors | {"scaled_fp8": marker.to(torch.float8_e4m3fn)}
        )
        info = load(model).model_info().quantization
        assert (info.num_fp8_products > 0) == products


def test_a_file_in_which_everything_was_cast_is_read_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    """As diffusers' layerwise casting and other programs write: biases, norms and embeddings too, and no scales."""
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored_weights(checkpoint).items()}
    pipeline = load(with_transformer(checkpoint, tmp_path / "model", tensors))
    by_hand = with_transformer(checkpoint, tmp_path / "plain", {n: t.float() for n, t in tensors.items()})
    assert torch.equal(latents(realigned(pipeline), WISH), latents(realigned(load(by_hand)), WISH))
    assert pipeline.transformer.x_embedder.weight.dtype == torch.float32
    assert quantized_layers(pipeline.transformer)


@pytest.mark.parametrize("form", [(-1,), (-1, 1)])
@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_scales_of_rows_and_int8_are_read(
    method: str, form: tuple[int, ...], checkpoint: Path, plain: Any, tmp_path: Path
) -> None:
    tensors, scales = quantized_file(plain, checkpoint, Scheme(method))
    written = tensors | {f"{name}.weight_scale": scale.view(form) for name, scale in scales.items()}
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8"}
    model = with_transformer(checkpoint, tmp_path / "model", written, quantization_config=modelopt)
    lines: list[str] = []
    pipeline = load(model, lines)
    assert torch.equal(latents(realigned(pipeline), WISH), multiplied_out(checkpoint, tensors, scales))
    assert any(f"quantization {method}, a scale for each row" in line for line in lines)


def test_a_wider_range_and_layers_that_stay_as_they_are_are_dequantised(
    checkpoint: Path, plain: Any, tmp_path: Path
) -> None:
    """fp8 with five bits of exponent; an embedding, which has no quantised products; and a layer that is ignored."""
    tensors = stored_weights(checkpoint)
    names = ["x_embedder", "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn.to_q"]
    exact = {}
    for name in names:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = (weight / 0.01).to(torch.float8_e5m2)
        tensors[f"{name}.weight_scale"] = torch.tensor(0.01)
        exact[name] = tensors[f"{name}.weight"].float() * 0.01
    model = with_transformer(checkpoint, tmp_path / "model", tensors)
    pipeline = load(model, quantization_ignored_layers=("to_q",))
    assert quantized_layers(pipeline.transformer).keys() == {"transformer_blocks.0.ff.net.2"}
    found = latents(pipeline, WISH)
    assert relative_error(found, latents(set_weights(load(checkpoint), exact), WISH)) < 1e-6


def test_the_rest_of_a_file_that_is_quantised_in_part_can_be_quantised(
    checkpoint: Path, plain: Any, tmp_path: Path
) -> None:
    tensors, scales = quantized_file(plain, checkpoint, ONE_FOR_EACH)
    [(name, scale), *_] = scales.items()
    only = stored_weights(checkpoint) | {
        f"{name}.weight": tensors[f"{name}.weight"],
        f"{name}.weight_scale": scale,
    }
    model = with_transformer(checkpoint, tmp_path / "model", only)
    assert quantized_layers(load(model).transformer).keys() == {name}
    pipeline = load(model, quantization="fp8")
    assert torch.equal(latents(realigned(pipeline), WISH), multiplied_out(checkpoint, tensors, scales))


# --- what is refused ---


@pytest.mark.parametrize(
    ("method", "change", "sentence"),
    [
        ("int8", {"weight_scale": None}, "weights in int8 without a weight_scale"),
        ("fp8", {"weight_scale": torch.ones(3)}, r"scales of a shape that is not read: .*weight_scale \(\[3\]"),
        ("fp8", {"weight_scale": torch.ones(2, 2)}, "scales of a shape that is not read"),
        ("fp8", {"weight_scale": torch.tensor(torch.nan)}, "zero, negative or no numbers"),
        ("fp8", {"weight_scale": torch.tensor(0.0)}, "zero, negative or no numbers"),
        ("fp8", {"weight": torch.ones(32, 32)}, "scales of weights that are not quantised"),
        ("fp8", {"comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "descriptions that cannot be read"),
    ],
    ids=["missing", "three", "blocks", "nan", "zero", "idle", "description"],
)
def test_scales_that_do_not_fit_are_refused_by_name(
    method: str, change: dict[str, Tensor | None], sentence: str, checkpoint: Path, plain: Any, tmp_path: Path
) -> None:
    tensors, scales = quantized_file(plain, checkpoint, Scheme(method))
    tensors |= {f"{name}.weight_scale": scale for name, scale in scales.items()}
    layer = "transformer_blocks.0.attn.to_q"
    for name, tensor in change.items():
        tensors.pop(f"{layer}.{name}", None)
        if tensor is not None:
            tensors[f"{layer}.{name}"] = tensor
    with pytest.raises(InvalidQuantizedWeights, match=sentence) as raised:
        load(with_transformer(checkpoint, tmp_path / "model", tensors))
    [key] = raised.value.keys
    assert key.startswith(layer)


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "torchao", "quant_type": "int8wo"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "something else",
    ],
    ids=str,
)
def test_methods_that_are_not_read_are_named(said: Any, checkpoint: Path, tmp_path: Path) -> None:
    model = with_transformer(checkpoint, tmp_path / "model", stored_weights(checkpoint), quantization_config=said)
    name = said if isinstance(said, str) else said["quant_method"]
    with pytest.raises(QuantizationNotReadable, match=f"quantised by {name}.*accepted are"):
        load(model)


def test_formats_of_layers_that_are_not_read_are_named(checkpoint: Path, plain: Any, tmp_path: Path) -> None:
    tensors, _ = quantized_file(plain, checkpoint, ONE_FOR_ALL)
    tensors["transformer_blocks.0.attn.to_q.comfy_quant"] = comfy_bytes(format="nvfp4")
    with pytest.raises(QuantizationNotReadable, match=r"to_q\.comfy_quant is quantised by nvfp4"):
        load(with_transformer(checkpoint, tmp_path / "model", tensors))


def test_a_quantised_file_is_not_quantised_in_another_way(checkpoint: Path, plain: Any, tmp_path: Path) -> None:
    tensors, _ = quantized_file(plain, checkpoint, ONE_FOR_ALL)
    model = with_transformer(checkpoint, tmp_path / "model", tensors)
    with pytest.raises(QuantizationConflict, match="got int8, but transformer is quantised to fp8 already"):
        load(model, quantization="int8")


@pytest.mark.parametrize("component", ["text_encoder_2", "vae"])
def test_components_without_quantised_layers_refuse_fp8(component: str, checkpoint: Path, tmp_path: Path) -> None:
    """A library would read the numbers and leave their scales out."""
    model = with_transformer(checkpoint, tmp_path / "model", stored_weights(checkpoint))
    [file] = (model / component).glob("*.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CorruptCheckpoint, match="stores F8_E4M3; accepted are F32, F16 and BF16 here"):
        load(model)


def test_adapters_in_fp8_are_refused(plain: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 16, dtype=torch.float8_e4m3fn)}, adapter)
    with pytest.raises(InvalidLora, match="stores F8_E4M3"):
        plain.adapters.read(LoraSource(path=str(adapter)))


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"quantization_ignored_layers": ("to_q",)},
        {"quantization_granularity": "tensor"},
        {"transformer_weights_path": "somewhere"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_models_without_a_native_transformer_refuse_the_options(options: dict[str, Any], checkpoint: Path) -> None:
    args, execution = ModelArgs(model_path=str(checkpoint), backend="diffusers"), ExecutionArgs(device="cpu", **options)
    with pytest.raises(QuantizationNotSupported, match=f"{next(iter(options))}: this model has no transformer"):
        build_pipeline(args, execution)
    with pytest.raises(QuantizationNotSupported, match="no transformer that runs natively"):
        check_wishes(execution, {"vae": WanPipeline.components["vae"]})
    check_wishes(execution, WanPipeline.components)


def test_other_weights_must_exist_and_be_read(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="transformer_weights_path"):
        load(checkpoint, transformer_weights_path=str(tmp_path / "nothing"))
    model = ModelArgs(model_path=str(checkpoint), random_weights=True)
    options = ExecutionArgs(device="cpu", transformer_weights_path=str(tmp_path))
    with pytest.raises(QuantizationNotSupported, match="with random_weights no file is read"):
        build_pipeline(model, options)


def test_a_directory_can_stand_in_for_the_transformers(checkpoint: Path, tmp_path: Path) -> None:
    changed = {name: tensor * 1.01 for name, tensor in stored_weights(checkpoint).items()}
    other = with_transformer(checkpoint, tmp_path / "other", changed)
    found = load(checkpoint, transformer_weights_path=str(other / "transformer"))
    assert torch.equal(latents(realigned(found), WISH), latents(realigned(load(other)), WISH))


# --- writing ---


def written(checkpoint: Path, target: Path, *, shard_bytes: int = 1 << 30, **options: Any) -> Path:
    target.mkdir()
    components = {"transformer": FluxPipeline.components["transformer"]}
    options = {"quantization": "fp8"} | options
    write_quantized(
        checkpoint,
        target,
        components,
        QuantizationArgs(**options),
        device=CPU,
        shard_bytes=shard_bytes,  # type: ignore[arg-type]
    )
    return target


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_a_written_model_is_what_is_quantised_while_loading(
    method: str, granularity: str, checkpoint: Path, tmp_path: Path
) -> None:
    options = {
        "quantization": method,
        "quantization_granularity": granularity,
        "quantization_ignored_layers": ("to_k",),
    }
    model = written(checkpoint, tmp_path / "model", shard_bytes=20_000, **options)
    assert len(list((model / "transformer").glob("*.safetensors"))) > 2
    found, expected = load(model), load(checkpoint, **options)
    for (name, one), (other_name, other) in zip(
        found.transformer.state_dict().items(), expected.transformer.state_dict().items(), strict=True
    ):
        assert (name, one.dtype) == (other_name, other.dtype)
        assert torch.equal(one.float(), other.float()), name
    assert torch.equal(latents(realigned(found), WISH), latents(realigned(expected), WISH))
    said = json.loads((model / "transformer" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["granularity"]) == (method, granularity)
    with pytest.raises(QuantizationConflict):
        load(model, quantization="int8" if method == "fp8" else "fp8")


def test_all_else_is_linked_and_the_original_stays(checkpoint: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    model = written(checkpoint, tmp_path / "model")
    assert all(path.read_bytes() == content for path, content in before.items())
    for path in before:
        other = model / path.relative_to(checkpoint)
        own = path.parent.name == "transformer"
        assert other.exists()
        assert other.samefile(path) != own
    assert (model / "transformer" / WEIGHTS).stat().st_size < (checkpoint / "transformer" / WEIGHTS).stat().st_size


def test_a_disk_without_room_is_said_so(checkpoint: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(StorageError, match="output: model cannot be written: File too large"):
            written(checkpoint, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    full = as_os_error(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert full.strerror == "No space left on device"


def test_the_command_writes_a_model_that_needs_no_options(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "model"
    arguments = ["quantize", "--model-path", str(checkpoint), "--output", str(output), "--quantization", "int8"]
    assert main([*arguments, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "transformer: 22 layers quantised" in said.out
    assert torch.equal(
        latents(realigned(load(output)), WISH), latents(realigned(load(checkpoint, quantization="int8")), WISH)
    )
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    assert main(arguments) == 2
    assert "output: model exists and is not empty" in capsys.readouterr().err


def test_what_is_not_finished_goes_away(tmp_path: Path) -> None:
    output = tmp_path / "new" / "model"
    with pytest.raises(KeyboardInterrupt), quantize.Unfinished(output) as unfinished:
        (unfinished.path / "transformer").mkdir()
        raise KeyboardInterrupt
    assert list(output.parent.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="output: model cannot be written"):
        quantize.Unfinished(tmp_path / "file" / "model")


def test_the_command_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--quantization", "fp8"]) == 2
    assert "output: none was given" in capsys.readouterr().err
    assert main(["quantize", "--output", str(tmp_path / "model")]) == 2
    assert "quantization: none was given; accepted is one of fp8, int8" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotEmpty):
        quantize.check_output(tmp_path / "file")
    quantize.check_output(tmp_path / "nothing")


def test_plans_count_quantised_bytes(checkpoint: Path, tmp_path: Path) -> None:
    outline = outline_of(get_model_info("black-forest-labs/FLUX.1-dev"))
    whole, quantized = outline.weights(), outline.weights(quantized=True)
    assert quantized.shared == whole.shared / 2
    assert quantized.whole == whole.whole
    of_file = outline_of(get_model_info(str(written(checkpoint, tmp_path / "model"))))
    of_original = outline_of(get_model_info(str(checkpoint)))
    assert of_file.parameters == of_original.parameters
    assert of_file.weights().shared == of_original.weights().shared / 2


# --- over ranks ---


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool(2)
    yield found
    found.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flux", {"quantization": "fp8", "quantization_granularity": "row"}),
        ("wan", {"quantization": "int8", "quantization_granularity": "tensor"}),
    ],
)
def test_two_ranks_make_what_one_process_makes(name: str, options: dict[str, str], pool: Pool, tmp_path: Path) -> None:
    """While loading, and from a model that was written."""
    checkpoint = FAMILIES[name].save(tmp_path / "checkpoint")
    family = replace(FAMILIES[name], wishes=tuple(w | {"output_type": "latent"} for w in FAMILIES[name].wishes))
    expected = made_of(load(checkpoint, **options), family.wishes)
    natives = {"flux": FluxPipeline, "wan": WanPipeline}[name].components
    model = tmp_path / "model"
    model.mkdir()
    write_quantized(
        checkpoint,
        model,
        {"transformer": natives["transformer"]},
        QuantizationArgs(**options),
        device=CPU,  # type: ignore[arg-type, dict-item]
    )
    for shape, directory, given in (
        (ReplicaShape(tp=2), checkpoint, options),
        (ReplicaShape(tp=2), model, {}),
        (ReplicaShape(ulysses=2), model, {}),
    ):
        for rank in pool.run(directory, shape, family, tmp_path, execution=given):
            for key, values in expected.items():
                if key.startswith(("latents", "predicted")):
                    tolerance = LATENT_TOLERANCE if key.startswith("latents") else FORWARD_TOLERANCE
                    assert relative_error(torch.from_numpy(rank[key]), torch.from_numpy(values)) <= tolerance, key
