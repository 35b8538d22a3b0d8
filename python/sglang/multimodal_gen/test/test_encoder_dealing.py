"""Which text encoders are dealt to ranks, how it is told, and that the parts of all ranks are the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sglang.multimodal_gen.configs.encoder_dealing import LARGE_BYTES, EncoderDealing, EncoderSize, deal_encoder
from sglang.multimodal_gen.configs.encoder_outline import outline_encoder
from sglang.multimodal_gen.configs.models.encoders import CLIPTextConfig, T5EncoderConfig, UMT5EncoderConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE, ParallelContext, ProcessAxis
from sglang.multimodal_gen.runtime.layers.context import EncoderAxes, LayerContext
from sglang.multimodal_gen.runtime.layers.shards import shards_of
from sglang.multimodal_gen.runtime.loader.component_loader import (
    Checkpoint,
    LoadContext,
    built_without_memory,
    weight_totals,
    without_memory,
)
from sglang.multimodal_gen.runtime.loader.library_sharding import deal_library_encoder, library_encoder_size
from sglang.multimodal_gen.runtime.loader.random_weights import RandomSource
from sglang.multimodal_gen.runtime.models.encoders.clip_text import CLIPTextModel
from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel
from sglang.multimodal_gen.runtime.models.encoders.umt5 import UMT5EncoderModel
from sglang.multimodal_gen.runtime.pipelines.flux import FluxPipeline
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video_image import HunyuanVideoImageToVideoPipeline
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines.zimage import ZImagePipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.tiny_checkpoints import TinyWan, save_tiny_wan
from sglang.multimodal_gen.test.tiny_flux import TinyFlux, save_tiny_flux
from sglang.multimodal_gen.test.tiny_hunyuan_video import TINY_HUNYUAN_VIDEOS, save_tiny_hunyuan_video
from sglang.multimodal_gen.test.tiny_sd3 import TinySD3, save_tiny_sd3
from sglang.multimodal_gen.test.tiny_zimage import TINY_Z_IMAGES, save_tiny_zimage

XXL = EncoderSize(num_heads=64, num_key_heads=64, ffn_dim=10240, vocab_size=256384)
QWEN_VL = EncoderSize(num_heads=28, num_key_heads=4, ffn_dim=18944, vocab_size=152064)
ODD = EncoderSize(num_heads=3, num_key_heads=3, ffn_dim=33, vocab_size=64)


def dealt(size: EncoderSize | str, shape: ReplicaShape, *, gib: float = 10, wish: str = "auto") -> EncoderDealing:
    return deal_encoder("text_encoder", size, weight_bytes=int(gib * 2**30), shape=shape, wish=wish)


@pytest.mark.parametrize(
    ("size", "shape", "axes", "reason"),
    [
        (
            XXL,
            ReplicaShape(cfg=2, ulysses=2),
            ("world", "world", "world"),
            r"text_encoder \(10.0 GiB\) is dealt .*: attention to 4; feed-forward to 4; vocabulary to 4$",
        ),
        (
            QWEN_VL,
            ReplicaShape(cfg=2, ulysses=4),
            ("sequence", "world", "world"),
            "attention to 4, since 28 heads with 4 of keys cannot be dealt evenly to 8; feed-forward to 8",
        ),
        (
            QWEN_VL,
            ReplicaShape(ulysses=8),
            (None, "world", "world"),
            "attention whole, since 28 heads with 4 of keys cannot be dealt evenly to 8; feed-forward to 8",
        ),
        (QWEN_VL, ReplicaShape(tp=4), ("world", "world", "world"), "attention to 4; feed"),
        (XXL, ReplicaShape(ring=3, ulysses=2), ("ulysses", "ulysses", "ulysses"), "feed-forward to 2, since 10240"),
        (ODD, ReplicaShape(tp=2), (None, None, None), "whole on every rank: attention whole, since 3 heads .* to 2"),
        ("there is no plan", ReplicaShape(tp=2), (None, None, None), "10.0 GiB. is whole on every rank: there is no"),
    ],
)
def test_each_part_is_dealt_to_as_many_ranks_as_it_divides_by(
    size: EncoderSize | str, shape: ReplicaShape, axes: tuple[str | None, ...], reason: str
) -> None:
    found = dealt(size, shape)
    assert (found.heads, found.features, found.vocabulary) == axes
    assert re.search(reason, found.reason), found.reason


@pytest.mark.parametrize(
    ("wish", "gib", "is_dealt"),
    [("auto", 0.9, False), ("auto", LARGE_BYTES / 2**30, True), ("on", 0.1, True), ("off", 10, False)],
)
def test_small_encoders_and_all_of_them_on_request_stay_whole(wish: str, gib: float, is_dealt: bool) -> None:
    found = dealt(XXL, ReplicaShape(tp=2), gib=gib, wish=wish)
    assert (found.heads == "world") == is_dealt
    assert ("is whole on every rank" in found.reason) == (not is_dealt)


# --- what is loaded; parts need no other process until they compute ---


def rank_of(rank: int, size: int = 2) -> ParallelContext:
    """As one of the ranks that share guidance branches."""
    axis = ProcessAxis(size=size, rank=rank)
    return ParallelContext(cfg=axis, world=axis)


NATIVE: dict[str, tuple[type[nn.Module], Any]] = {
    "clip_text_model": (CLIPTextModel, CLIPTextConfig),
    "t5": (T5EncoderModel, T5EncoderConfig),
    "umt5": (UMT5EncoderModel, UMT5EncoderConfig),
}
PUBLISHED_ENCODERS = [
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "text_encoder"),
    ("black-forest-labs/FLUX.1-dev", "text_encoder"),
    ("black-forest-labs/FLUX.1-dev", "text_encoder_2"),
    ("Qwen/Qwen-Image", "text_encoder"),
    ("Tongyi-MAI/Z-Image", "text_encoder"),
    ("hunyuanvideo-community/HunyuanVideo", "text_encoder"),
    ("hunyuanvideo-community/HunyuanVideo-I2V", "text_encoder"),
]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize(("hub_id", "component"), PUBLISHED_ENCODERS)
def test_what_each_rank_will_hold_is_known_from_the_config_alone(hub_id: str, component: str, num_ranks: int) -> None:
    """Of every published kind, against the modules themselves; what is whole in one is whole in the other."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    directory = published_directory(hub_id) / component
    config, parallel = read_json_object(directory / "config.json"), rank_of(1, num_ranks)
    if config["model_type"] in NATIVE:
        cls, config_class = NATIVE[config["model_type"]]
        ours = config_class.from_dict(config)
        size: EncoderSize | str = ours.size
        number = count(without_memory(cls, ours, LayerContext()))
        axes = EncoderAxes.of(dealt(size, parallel.shape), parallel)
        part = count(without_memory(cls, ours, LayerContext(parallel=parallel, encoder=axes)))
    else:
        with built_without_memory():
            cls = getattr(transformers, config["architectures"][0])
            module = cls(cls.config_class.from_pretrained(directory))
        size = library_encoder_size(module)
        number = count(module)
        deal_library_encoder(module, EncoderAxes.of(dealt(size, parallel.shape), parallel))
        part = count(module)
    outline = outline_encoder(component, config, number)
    assert outline.size == size or (isinstance(outline.size, str) and isinstance(size, str))
    # Biases and tables of positions are not counted apart, which is hundredths of a percent.
    held = outline.parameters_on_each(parallel.shape, element_bytes=4, wish="on")
    assert held == pytest.approx(part, rel=2e-3)
    assert outline.parameters_on_each(parallel.shape, element_bytes=4, wish="off") == number


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, str]]:
    """What loads each, from where, and its class."""
    root = tmp_path_factory.mktemp("encoders")
    wan = save_tiny_wan(root / "wan", TinyWan(text={"num_heads": 4}))
    flux = save_tiny_flux(root / "flux", TinyFlux(text_heads=4))
    zimage = save_tiny_zimage(root / "zimage", TINY_Z_IMAGES["turbo"])
    return {
        "umt5": (WanPipeline.components["text_encoder"], wan / "text_encoder", "UMT5EncoderModel"),
        "t5": (FluxPipeline.components["text_encoder_2"], flux / "text_encoder_2", "T5EncoderModel"),
        "qwen3": (ZImagePipeline.components["text_encoder"], zimage / "text_encoder", "Qwen3ForCausalLM"),
    }


@pytest.mark.parametrize("source", [Checkpoint(), RandomSource(seed=3)], ids=["stored", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["umt5", "t5", "qwen3"])
def test_the_parts_of_all_ranks_are_the_whole(
    name: str, dtype: torch.dtype, source: Any, encoders: dict[str, tuple[Any, Path, str]]
) -> None:
    """At the dtypes of one rank: those that are kept in fp32 are so in parts as well."""
    load, directory, class_name = encoders[name]

    def loaded(parallel: ParallelContext) -> nn.Module:
        layers = LayerContext(parallel=parallel)
        context = LoadContext(
            device=torch.device("cpu"), dtype=dtype, layers=layers, source=source, encoder_parallel="on"
        )
        module = load(directory, class_name, context)
        assert isinstance(module, nn.Module)
        return module

    whole, parts = loaded(SINGLE), [loaded(rank_of(rank)) for rank in (0, 1)]
    shards, tensors = shards_of(parts[0]), [dict(part.state_dict()) for part in parts]
    assert {key.split(".")[-2] for key in shards} >= HELD_IN_PARTS[name]
    for key, expected in whole.state_dict().items():
        found = joined([each[key] for each in tensors], shards[key].dim) if key in shards else tensors[1][key]
        assert found.dtype == expected.dtype, key
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert weight_totals([parts[0]])[0] == weight_totals([whole])[0]


HELD_IN_PARTS = {
    "umt5": {"shared", "q", "k", "v", "o", "relative_attention_bias", "wi_0", "wi_1", "wo"},
    "t5": {"shared", "q", "k", "v", "o", "relative_attention_bias", "wi_0", "wi_1", "wo"},
    "qwen3": {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}


def joined(parts: Iterable[Tensor], dim: int) -> Tensor:
    return torch.cat(list(parts), dim=dim)


def test_the_language_model_of_a_model_that_sees_is_dealt_and_its_eyes_stay_whole(tmp_path: Path) -> None:
    checkpoint = save_tiny_hunyuan_video(tmp_path, TINY_HUNYUAN_VIDEOS["i2v"])
    context = LoadContext(
        device=torch.device("cpu"),
        dtype=torch.float32,
        layers=LayerContext(parallel=rank_of(1)),
        encoder_parallel="on",
    )
    load = HunyuanVideoImageToVideoPipeline.components["text_encoder"]
    module = load(checkpoint / "text_encoder", "LlavaForConditionalGeneration", context)
    names = shards_of(module)
    assert names and all(name.startswith("language_model.") for name in names)
    # Two heads share one key: its attention stays whole beside dealt features.
    assert not any("self_attn" in name for name in names) and any("mlp" in name for name in names)
    assert not any("lm_head" in name for name, _ in module.named_parameters())


def test_an_encoder_whose_heads_no_axis_divides_is_no_error(encoders: dict[str, tuple[Any, Path, str]]) -> None:
    """Two heads on three ranks; it is whole on each."""
    _, directory, _ = encoders["t5"]
    axis = ProcessAxis(size=3, rank=1)
    layers = LayerContext(parallel=ParallelContext(ulysses=axis, sequence=axis, world=axis))
    context = LoadContext(device=torch.device("cpu"), dtype=torch.float32, layers=layers, encoder_parallel="on")
    clip = FluxPipeline.components["text_encoder"](directory.with_name("text_encoder"), "CLIPTextModel", context)
    assert clip.config.num_attention_heads == 2 and not shards_of(clip)


def test_parts_do_not_keep_the_whole_alive() -> None:
    module = transformers.LlamaModel(transformers.LlamaConfig(**TINY_LLAMA))
    axis = ProcessAxis(size=2, rank=1)
    deal_library_encoder(module, EncoderAxes(heads=axis, features=axis, vocabulary=axis))
    for name in shards_of(module):
        tensor = module.get_parameter(name)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    attention: Any = module.layers[0].self_attn
    assert attention.q_proj(torch.ones(1, 3, 16)).shape == (1, 3, 8)


TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_a_model_without_a_plan_or_with_one_that_is_not_known_says_why() -> None:
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=2, vocab_size=9))
    assert library_encoder_size(bert) == "there is no tensor-parallel plan for BertModel"
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    config.base_model_tp_plan = {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "packed_rowwise"}
    assert "wants layers.0.mlp.down_proj to be packed_rowwise" in str(
        library_encoder_size(transformers.LlamaModel(config))
    )


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("auto", ["text_encoder (0.0 GiB) is whole", "text_encoder_2 (0.0 GiB) is whole", "text_encoder_3 (0.0 GiB)"]),
        ("on", ["not made to hold parts", "not made to hold parts", "attention whole, since 3 heads cannot be dealt"]),
    ],
)
def test_a_start_says_once_of_each_encoder_where_it_is(wish: str, expected: list[str], tmp_path: Path) -> None:
    checkpoint, lines = save_tiny_sd3(tmp_path, TinySD3()), list[str]()

    def started(join: Callable[[torch.device], ParallelContext]) -> list[str]:
        lines.clear()
        build_pipeline(str(checkpoint), ExecutionArgs(encoder_parallel=wish), join=join, report=lines.append)
        return [line for line in lines if line.startswith("text_encoder")]

    told = started(lambda _: rank_of(0))
    assert len(told) == 3 and all(part in line for part, line in zip(expected, told, strict=True)), told
    assert not started(lambda _: SINGLE)
