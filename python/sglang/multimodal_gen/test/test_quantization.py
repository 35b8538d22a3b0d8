"""Weights in eight bits: how they are made, how layers multiply with them, and what every family makes with them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.configs.sample.lora_params import LoraUse
from sglang.multimodal_gen.errors_quantization import InvalidQuantizedWeights, MergeNotPossible, UnknownLayers
from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis
from sglang.multimodal_gen.runtime.layers.forward_graphs import ForwardGraphs
from sglang.multimodal_gen.runtime.layers.fused import JoinedLinear
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear, ColumnParallelLinear, RowParallelLinear
from sglang.multimodal_gen.runtime.layers.mlp import FeedForward
from sglang.multimodal_gen.runtime.layers.quantization.products import (
    Quantization,
    QuantizedWeight,
    reference_product,
    scaled_afterwards,
)
from sglang.multimodal_gen.runtime.layers.quantization.rows import quantize_rows
from sglang.multimodal_gen.runtime.layers.quantization.schemes import QuantizedTensors, Scheme
from sglang.multimodal_gen.runtime.layers.shards import Shard
from sglang.multimodal_gen.runtime.loader import quantized_layers as loading
from sglang.multimodal_gen.runtime.loader.quantized_layers import LayerQuantizer
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs, ModelArgs
from sglang.multimodal_gen.test.lora_case import load_adapters, save_adapters
from sglang.multimodal_gen.test.parallel_pool import FAMILIES
from sglang.multimodal_gen.test.pipeline_parity import relative_error
from sglang.multimodal_gen.test.quantization_case import (
    dequantized,
    latents,
    load,
    quantized_layers,
    realigned,
    set_weights,
)
from sglang.multimodal_gen.test.recorded_graph import record
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, save_tiny_wan_image

CPU = torch.device("cpu")
SCHEMES = [Scheme(method, granularity) for method in ("fp8", "int8") for granularity in ("row", "tensor")]
# Of whole requests against unquantised weights, over all families: measured 0.010 to 0.089 and 0.003 to 0.016.
ERRORS = {"fp8": (1e-3, 0.2), "int8": (1e-4, 0.05)}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- how weights are quantised ---


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_times_scales_are_the_weight_to_half_a_step(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = (torch.randn(24, 40) * torch.logspace(-3, 1, 24).unsqueeze(1)).to(dtype)
    values, scales = scheme.quantize(weight)
    assert scales.shape == ((24, 1) if scheme.granularity == "row" else (1, 1))
    assert values.dtype == (torch.float8_e4m3fn if scheme.method == "fp8" else torch.int8)
    error = (values.float() * scales - weight.float()).abs()
    # fp8 has three bits behind the first one, and below 2**-6 steps of 2**-9; int8 has steps of one.
    step = torch.maximum(weight.float().abs() / 16, scales * 2**-10) if scheme.method == "fp8" else scales / 2
    assert bool((error <= step * 1.0001).all())
    assert float(values.float().abs().max()) == (448 if scheme.method == "fp8" else 127)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_of_zeros_stay_zeros(scheme: Scheme) -> None:
    values, scales = scheme.quantize(torch.zeros(4, 8))
    assert not values.float().any()
    assert bool((scales == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_dequantised_weights_are_rounded_once(stored: torch.dtype, dtype: torch.dtype) -> None:
    values = (torch.randn(6, 16) * 30).clamp(-100, 100).to(stored)
    for scales in (torch.rand(6, 1) + 0.1, torch.rand(1, 1) + 0.1):
        found = QuantizedTensors(values, scales).dequantized(dtype)
        assert torch.equal(found, (values.float() * scales).to(dtype))


def test_a_scale_for_each_row_is_nearer_than_one_for_all() -> None:
    weight = torch.randn(64, 64) * torch.logspace(-3, 1, 64).unsqueeze(1)
    errors = {
        granularity: float(
            (Scheme("int8", granularity).quantize(weight).dequantized(torch.float32) / weight - 1).abs().median()
        )
        for granularity in ("row", "tensor")
    }
    assert errors["row"] < errors["tensor"] / 4


# --- products ---


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_in_fp8_are_those_of_fp32_emulation(granularity: str, dtype: torch.dtype, has_bias: bool) -> None:
    """The emulation computes in fp32 what both have as fp8, so that only the sum's order and the result's rounding
    differ: one step of the dtype."""
    weight = Scheme("fp8", granularity).quantize(torch.randn(48, 64))
    inputs = (torch.randn(2, 5, 64) * torch.logspace(-2, 2, 5).view(1, 5, 1)).to(dtype)
    bias = torch.randn(48).to(dtype) if has_bias else None
    found = QuantizedWeight(weight).linear(inputs, bias=bias)
    rows = quantize_rows(inputs.flatten(0, 1))
    expected = reference_product(rows, weight, bias, dtype).view(2, 5, 48)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert relative_error(found, expected) < tolerance
    assert relative_error(scaled_afterwards(rows, weight, bias, dtype).view_as(found), expected) < tolerance
    assert 1e-3 < relative_error(found, F.linear(inputs, weight.dequantized(dtype), bias)) < 0.05
    room = torch.full((10, 48), torch.nan, dtype=dtype)
    QuantizedWeight(weight).linear(inputs, bias=bias, out=room)
    assert torch.equal(room.view_as(found), found)


def layer_pair(kind: str, scheme: Scheme, *, in_fp8: bool) -> tuple[Any, Any]:
    """A quantised layer and one with the same weights, multiplied out."""
    layers: list[Any] = []
    for _ in range(2):
        layer = {
            "linear": lambda: AdaptableLinear(64, 48),
            "column": lambda: ColumnParallelLinear(64, 48),
            "row": lambda: RowParallelLinear(64, 48, blocks=(16, 48)),
        }[kind]()
        layers.append(layer.requires_grad_(False))
    quantized = scheme.quantize(layers[0].weight)
    layers[0].quantize(*quantized, Quantization(torch.float32, scales_inputs=in_fp8))
    layers[1].weight.copy_(quantized.dequantized(torch.float32))
    layers[1].bias.copy_(layers[0].bias)
    return layers[0], layers[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "column", "row"])
def test_every_way_through_a_layer_multiplies_the_dequantised_weight(kind: str, scheme: Scheme) -> None:
    quantized, plain = layer_pair(kind, scheme, in_fp8=False)
    inputs = torch.randn(2, 7, 64)
    assert torch.equal(quantized(inputs), plain(inputs))
    assert torch.equal(quantized.gelu(inputs), plain.gelu(inputs))
    for gelu in (True, False):
        parts = [layer.output_parts(inputs, 2, gelu=gelu) for layer in (quantized, plain)]
        for found, expected in zip(*parts, strict=True):
            assert torch.equal(found, expected)
    if kind == "row":
        parts = inputs.split((16, 48), dim=-1)
        assert torch.equal(quantized.of_parts(*parts), plain.of_parts(*parts))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("kind", ["linear", "column", "row"])
def test_every_way_through_a_layer_can_multiply_in_fp8(kind: str, granularity: str) -> None:
    layer, _ = layer_pair(kind, Scheme("fp8", granularity), in_fp8=True)
    weight = QuantizedTensors(layer.weight, layer.weight_scale)
    inputs = torch.randn(2, 7, 64)

    def product(part: Tensor, own: QuantizedTensors, bias: Tensor | None) -> Tensor:
        return reference_product(quantize_rows(part.flatten(0, 1)), own, bias, torch.float32).view(2, 7, -1)

    expected = product(inputs, weight, layer.bias)
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
    gelu = F.gelu(expected, approximate="tanh")
    torch.testing.assert_close(layer.gelu(inputs), gelu, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat(list(layer.output_parts(inputs, 2, gelu=True)), -1), gelu, rtol=1e-5, atol=1e-5
    )
    plain = torch.cat(list(layer.output_parts(inputs, 2, gelu=False)), -1)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    if kind == "row":
        for widths in ((16, 48), (24, 40), (8, 40, 16)):
            parts = inputs.split(widths, dim=-1)
            torch.testing.assert_close(layer.of_parts(*parts), expected, rtol=1e-5, atol=1e-5)
            activated = torch.cat([parts[0], *(F.gelu(part, approximate="tanh") for part in parts[1:])], dim=-1)
            found = layer.of_parts(*parts, gelu_from=1)
            torch.testing.assert_close(found, product(activated, weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_gelu_is_left_to_the_layer_that_quantises_its_inputs() -> None:
    """The same numbers as GELU first, in fp32; rows with adapters, which need the inputs as they are, get them."""
    mlp = FeedForward(64, 96, 48).requires_grad_(False)
    inputs = torch.randn(2, 7, 64)
    for layer in (mlp.net[0].proj, mlp.net[2]):
        layer.quantize(*Scheme("fp8").quantize(layer.weight), Quantization(torch.float32, scales_inputs=True))
    expected = mlp.net[2](F.gelu(mlp.net[0].proj(inputs), approximate="tanh"))
    torch.testing.assert_close(mlp(inputs), expected, rtol=1e-5, atol=1e-5)
    mlp.net[2].quantization = Quantization(torch.float32)
    assert not torch.equal(mlp(inputs), expected), "only one of the layers multiplies in fp8"
    torch.testing.assert_close(mlp(inputs), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_joined_layers_are_one_product_with_each_ones_scales(granularity: str, in_fp8: bool) -> None:
    pairs = [layer_pair("column", Scheme("fp8", granularity), in_fp8=in_fp8) for _ in range(3)]
    inputs = torch.randn(2, 7, 64)
    expected = [layer(inputs) for layer, _ in pairs]
    joined = JoinedLinear.of([layer for layer, _ in pairs])
    assert joined is not None
    for found, own in zip(joined(inputs), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    for (layer, _), own in zip(pairs, expected, strict=True):
        torch.testing.assert_close(layer(inputs), own, rtol=1e-5, atol=1e-5)
        assert layer.weight.untyped_storage().data_ptr() == joined.weight.untyped_storage().data_ptr()


def test_layers_that_are_quantised_in_other_ways_are_not_joined() -> None:
    fp8, plain = layer_pair("column", Scheme("fp8"), in_fp8=False)
    int8, _ = layer_pair("column", Scheme("int8"), in_fp8=False)
    assert JoinedLinear.of([fp8, plain]) is None
    assert JoinedLinear.of([fp8, int8]) is None


def test_the_kernel_gives_what_its_reference_gives() -> None:
    program = [sys.executable, "-W", "error", "-m", "sglang.multimodal_gen.test.interpreted_kernels", "rows"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=110, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(found) == ["quantized_rows bf16", "quantized_rows fp32"]
    for name, worst in found.items():
        assert worst["cases"] == 192
        assert worst["distance"] == 0, f"{name}: {worst}"


# --- while a model loads ---


class _Pair(nn.Module):
    keep_unquantized = ("last",)

    def __init__(self, axis: ProcessAxis) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(32, 64, axis=axis)
        self.down = RowParallelLinear(64, 32, axis=axis, blocks=(32, 32))
        self.last = AdaptableLinear(32, 8)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_ranks_hold_parts_of_what_one_process_holds(scheme: Scheme) -> None:
    """Scales of whole weights are each rank's; those of rows go with the rows."""
    whole_of = {"up.weight": torch.randn(64, 32), "down.weight": torch.randn(32, 64)}
    for rank in range(2):
        axis = ProcessAxis(size=2, rank=rank)
        module = _Pair(axis)
        options = QuantizationArgs(quantization=scheme.method, quantization_granularity=scheme.granularity)
        quantizer = LayerQuantizer(module, options, dtype=torch.float32, device=CPU)
        shards = {"up.weight": module.up.shards()["weight"], "down.weight": module.down.shards()["weight"]}
        for name, weight in whole_of.items():
            assert quantizer.placed(name, name, weight, shards[name], torch.float32) is not None
        assert quantizer.placed("last.weight", "last.weight", torch.randn(8, 32), None, torch.float32) is None
        state = quantizer.install()
        for name, shard in shards.items():
            values, scales = scheme.quantize(whole_of[name])
            assert torch.equal(state[name].float(), shard.cut(values.float()))
            by_rank = scheme.granularity == "row" and shard.dim == 0
            assert torch.equal(state[f"{name}_scale"], shard.cut(scales) if by_rank else scales)
        assert module.last.quantization is None


def test_weights_that_are_no_numbers_are_refused() -> None:
    module = _Pair(ProcessAxis())
    quantizer = LayerQuantizer(module, QuantizationArgs(quantization="fp8"), dtype=torch.float32, device=CPU)
    with pytest.raises(InvalidQuantizedWeights, match=r"not finite: up\.weight"):
        quantizer.placed("up.weight", "up.weight", torch.full((64, 32), torch.nan), None, torch.float32)


def test_ignored_layers_that_are_not_there_are_named() -> None:
    options = QuantizationArgs(quantization="fp8", quantization_ignored_layers=("up", "to_nothing"))
    with pytest.raises(UnknownLayers, match="holds to_nothing; names are such as up, down") as raised:
        LayerQuantizer(_Pair(ProcessAxis()), options, dtype=torch.float32, device=CPU)
    assert raised.value.texts == ("to_nothing",)


def test_a_part_along_inputs_keeps_the_scales_of_its_rows() -> None:
    shard = Shard(dim=1, blocks=(32, 32), axis=ProcessAxis(size=2, rank=1))
    options = QuantizationArgs(quantization="fp8")
    quantizer = LayerQuantizer(_Pair(ProcessAxis()), options, dtype=torch.float32, device=CPU)
    weight = torch.randn(32, 64)
    quantizer.placed("down.weight", "down.weight", weight, shard, torch.float32)
    state = quantizer.install()
    found = QuantizedTensors(state["down.weight"], state["down.weight_scale"]).dequantized(torch.float32)
    expected = Scheme("fp8").quantize(weight).dequantized(torch.float32)
    assert torch.equal(found, shard.cut(expected))


# --- every family ---


class Case:
    """A family's tiny checkpoint, and what it makes without quantisation."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.family = name, FAMILIES[name]
        self.checkpoint = self.family.save(directory / name)
        self.wish = self.family.wishes[0] | {"num_inference_steps": 2, "output_type": "latent"}
        self.plain = load(self.checkpoint)
        self.exact = latents(self.plain, self.wish)

    def emulated(self, quantized: Any) -> Any:
        """A plain pipeline with another's weights, multiplied out."""
        layers = quantized_layers(quantized.transformer)
        plain = realigned(load(self.checkpoint))
        return set_weights(plain, {name: dequantized(layer) for name, layer in layers.items()})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    directory = tmp_path_factory.mktemp("quantized")
    yield functools.cache(lambda name: Case(name, directory))


# What of the parallel layers stays as it is: those of refiners and embedders that run once for each request.
KEPT_PARALLEL = {"hunyuan_video": ("context_embedder.",), "wan": ("condition_embedder.",)}


@pytest.mark.parametrize("method", ["fp8", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_makes_exactly_what_the_dequantised_weights_make(
    name: str, method: str, case: Callable[[str], Case]
) -> None:
    tiny, lines = case(name), []  # type: tuple[Case, list[str]]
    pipeline = realigned(load(tiny.checkpoint, lines, quantization=method))
    found = latents(pipeline, tiny.wish)
    assert torch.equal(found, latents(tiny.emulated(pipeline), tiny.wish))
    low, high = ERRORS[method]
    assert low < relative_error(found, tiny.exact) < high
    layers, info = quantized_layers(pipeline.transformer), pipeline.model_info()
    for layer_name, layer in pipeline.transformer.named_modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            assert (layer_name in layers) != layer_name.startswith(KEPT_PARALLEL.get(name, ("-",))), layer_name
        else:
            assert layer_name not in layers, f"{layer_name} is an embedding, a modulation or the last projection"
    assert info.quantization is not None
    assert (info.quantization.method, info.quantization.num_layers) == (method, len(layers))
    assert info.num_parameters == tiny.plain.model_info().num_parameters
    # Of fp32, a fourth; and a scale for each row.
    saved = sum(3 * layer.weight.numel() - 4 * layer.out_features for layer in layers.values())
    assert info.weight_bytes == tiny.plain.model_info().weight_bytes - saved
    assert any(f"quantization {method}, a scale for each row: {len(layers)} of" in line for line in lines)
    assert any("cpu does not multiply in fp8" in line for line in lines) == (method == "fp8")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_makes_nearly_the_same_by_products_in_fp8_also_as_graphs(
    name: str, case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a chip that multiplies in fp8; this processor does it as well, slowly."""
    monkeypatch.setattr(loading, "computes_in_fp8", lambda device: True)
    tiny = case(name)
    pipeline = load(tiny.checkpoint, quantization="fp8")
    info = pipeline.model_info().quantization
    assert (info.num_fp8_products > 0) == (name != "ltx")  # whose tiny layers are of 40 features
    layers = quantized_layers(pipeline.transformer).values()
    assert info.num_fp8_products == sum(all(size % 16 == 0 for size in layer.weight.shape) for layer in layers)
    found = latents(pipeline, tiny.wish)
    assert 1e-3 < relative_error(found, tiny.exact) < 0.25
    pipeline.transformer.forward = graphs = ForwardGraphs(pipeline.transformer, record)
    latents(pipeline, tiny.wish)
    assert torch.equal(latents(pipeline, tiny.wish), found)
    assert graphs.num_graphs > 0
    assert graphs.failure is None


def test_layers_can_be_left_as_they_are(case: Callable[[str], Case]) -> None:
    """Also some of those whose products would be one."""
    tiny = case("flux")
    every = quantized_layers(load(tiny.checkpoint, quantization="fp8").transformer)
    ignored = ("to_q", "transformer_blocks.0.ff")
    pipeline = load(tiny.checkpoint, quantization="fp8", quantization_ignored_layers=ignored)
    left = every.keys() - quantized_layers(pipeline.transformer).keys()
    assert left == {name for name in every if any(text in name for text in ignored)} != set()
    found = latents(pipeline, tiny.wish)
    # Products of one and of several weights are summed in another order.
    assert relative_error(found, latents(tiny.emulated(pipeline), tiny.wish)) < 1e-5


def test_both_transformers_of_a_model_are_quantised(tmp_path: Path) -> None:
    checkpoint = save_tiny_wan_image(tmp_path, TINY_WAN_IMAGES["t2v_experts"])
    pipeline = load(checkpoint, quantization="fp8", quantization_granularity="tensor")
    numbers = [len(quantized_layers(pipeline.modules[name])) for name in ("transformer", "transformer_2")]
    info = pipeline.model_info().quantization
    assert min(numbers) > 0
    assert (info.num_layers, info.granularity) == (sum(numbers), "tensor")


def test_adapters_stand_beside_quantised_weights_and_never_in_them(tmp_path: Path, case: Callable[[str], Case]) -> None:
    tiny = case("sd3")
    files = save_adapters(tiny.checkpoint, tmp_path, {"wide": 9})
    pipeline = load(tiny.checkpoint, quantization="int8")
    plain = tiny.emulated(pipeline)
    wish = tiny.wish | {"lora": [LoraUse("wide", 0.8).as_field()]}
    for each in (pipeline, plain):
        load_adapters(each, files, merged={})
    without = latents(pipeline, tiny.wish)
    found = latents(pipeline, wish)
    assert torch.equal(found, latents(plain, wish))
    assert relative_error(found, without) > 1e-2
    with pytest.raises(MergeNotPossible, match="accepted is dynamic"):
        pipeline.adapters.merge_ids([("wide", 0.8)])
    assert torch.equal(latents(pipeline, tiny.wish), without)


def test_step_caches_pass_blocks_of_quantised_weights(case: Callable[[str], Case]) -> None:
    tiny = case("wan")
    pipeline = load(tiny.checkpoint, quantization="fp8")
    cache = {"residual_diff_threshold": 5.0, "max_warmup_steps": 1, "max_continuous_cached_steps": 1}
    wish = tiny.wish | {"num_inference_steps": 5, "enable_cache_dit": True, "cache_dit_params": cache}
    found = latents(pipeline, wish)
    assert torch.equal(found, latents(tiny.emulated(pipeline), wish))
    assert not torch.equal(found, latents(pipeline, tiny.wish | {"num_inference_steps": 5}))


def test_half_precision_computes_in_half_precision(case: Callable[[str], Case]) -> None:
    tiny = case("flux")
    pipeline = load(tiny.checkpoint, quantization="fp8", precision="bf16")
    for layer in quantized_layers(pipeline.transformer).values():
        assert layer.quantization == Quantization(torch.bfloat16)
    assert 1e-3 < relative_error(latents(pipeline, tiny.wish), tiny.exact) < 0.2


def test_random_weights_are_quantised_too(case: Callable[[str], Case]) -> None:
    model = ModelArgs(model_path=str(case("zimage").checkpoint), random_weights=True)
    plain, quantized = (
        build_pipeline(model, ExecutionArgs(device="cpu", quantization=method)) for method in (None, "int8")
    )
    for name, layer in quantized_layers(quantized.modules["transformer"]).items():
        expected = Scheme("int8").quantize(plain.modules["transformer"].get_submodule(name).weight)
        assert torch.equal(layer.weight, expected.values)
