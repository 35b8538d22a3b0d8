"""Adapters' parts for text encoders: what peft makes of them, for each request its own, in every layout of files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sglang.multimodal_gen.configs.memory_args import MemoryArgs
from sglang.multimodal_gen.errors_lora import InvalidLora, LoraDoesNotFit
from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req, TextCondition
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.lora_case import random_adapter, reference_transformer
from sglang.multimodal_gen.test.pipeline_parity import admitted, finished, relative_error
from sglang.multimodal_gen.test.tiny_families import FAMILIES, wish_of

CPU_FP32 = ExecutionArgs(device="cpu", precision="fp32")
TOLERANCE = 1e-5
SCALE = 0.7


class Case:
    """A family's checkpoint, the factors for its encoders by the names of diffusers, and what peft makes of them."""

    def __init__(self, family: str, directory: Path) -> None:
        self.family, self.checkpoint = family, FAMILIES[family][0](directory / "checkpoint")
        self.library = diffusers.DiffusionPipeline.from_pretrained(self.checkpoint)
        self.tensors: dict[str, Tensor] = {}
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self.library, name)
            if type(encoder).__name__.startswith("CLIP"):
                self.tensors |= encoder_part(name, encoder)
        self.file = directory / "adapter.safetensors"
        save_file(self.tensors, self.file)
        self.directory = directory

    def fused_pipeline(self, scale: float) -> Any:
        """Ours, with encoders whose weights diffusers and peft have changed."""
        pipeline = build_pipeline(str(self.checkpoint), CPU_FP32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the file has nothing for the transformer
            self.library.load_lora_weights(str(self.directory), weight_name=self.file.name, adapter_name="a")
        components = sorted({key.partition(".")[0] for key in self.tensors})
        self.library.fuse_lora(components=components, lora_scale=scale)
        self.library.unload_lora_weights()
        for name in components:
            pipeline.modules[name].load_state_dict(getattr(self.library, name).state_dict())
        return pipeline

    def save(self, tensors: dict[str, Tensor]) -> LoraSource:
        """The tensors as a file of another layout."""
        save_file(tensors, self.directory / "other.safetensors")
        return LoraSource(path=str(self.directory / "other.safetensors"))


def encoder_part(component: str, encoder: nn.Module) -> dict[str, Tensor]:
    """Factors for the attention and MLP of every layer."""
    found = {
        f"{component}.{key.removeprefix('transformer.')}": tensor
        for key, tensor in random_adapter(encoder, len(component)).items()
        if "self_attn" in key or ".mlp." in key
    }
    assert len(found) >= 2 * 2 * 6
    return found


@pytest.fixture(scope="module", params=["sd3", "flux"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(case: Case) -> Callable[[Any], list[TextCondition]]:
    """What the texts of a wish become with peft's weights."""
    pipeline = case.fused_pipeline(SCALE)
    return lambda wish: texts_of(pipeline, [wish])[0]


def texts_of(pipeline: Any, wishes: list[dict[str, Any]]) -> list[list[TextCondition]]:
    """Of requests that are encoded together: prompt and negative prompt."""
    requests = admitted(pipeline, [(wish, EMPTY) for wish in wishes])
    with torch.inference_mode():
        pipeline.run_unit("text_encode", requests)
    return [[text for text in (req.text, req.negative_text) if text is not None] for req in requests]


def assert_close(found: list[TextCondition], expected: list[TextCondition]) -> None:
    """Embeddings and vectors."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one.embeds, other.embeds) <= TOLERANCE
        assert other.pooled is None or relative_error(one.pooled, other.pooled) <= TOLERANCE


def differ(one: list[TextCondition], other: list[TextCondition]) -> bool:
    """Visibly."""
    pairs = [(a.pooled, b.pooled) for a, b in zip(one, other, strict=True) if a.pooled is not None]
    return all(relative_error(a, b) > 1e-2 for a, b in pairs)


def test_each_request_reads_with_its_own_adapters(case: Case, expected: Callable[[Any], list[TextCondition]]) -> None:
    """Equal prompts with, without, and with half of it, in one batch; twice, since embeddings are kept."""
    pipeline = build_pipeline(str(case.checkpoint), CPU_FP32)
    plain = texts_of(pipeline, [wish_of(case.family)])[0]
    pipeline.adapters.load("a", LoraSource(path=str(case.file)))
    wishes = [
        wish_of(case.family, lora=[{"name": "a", "scale": SCALE}]),
        wish_of(case.family),
        wish_of(case.family, lora=[{"name": "a", "scale": SCALE / 2}]),
        wish_of(case.family, lora=[{"name": "a", "scale": SCALE}], prompt="another text of several words"),
    ]
    for _ in range(2):
        found = texts_of(pipeline, wishes)
        assert_close(found[0], expected(wishes[0] | {"lora": []}))
        assert_close(found[1], plain)
        assert_close(found[3], expected(wishes[3] | {"lora": []}))
        assert differ(found[0], plain) and differ(found[2], plain) and differ(found[0], found[2])


@pytest.mark.parametrize("memory", [MemoryArgs(), MemoryArgs(performance_mode="memory")], ids=["resident", "on host"])
def test_merged_parts_change_all_texts_until_they_are_taken_out(
    case: Case, expected: Callable[[Any], list[TextCondition]], memory: MemoryArgs
) -> None:
    pipeline = build_pipeline(str(case.checkpoint), CPU_FP32, memory=memory)
    wish = wish_of(case.family)
    plain = texts_of(pipeline, [wish])[0]
    pipeline.adapters.load("a", LoraSource(path=str(case.file)))
    pipeline.adapters.merge_ids([("a", SCALE)])
    assert_close(texts_of(pipeline, [wish])[0], expected(wish))
    pipeline.adapters.unmerge()
    for before, after in zip(plain, texts_of(pipeline, [wish])[0], strict=True):
        assert torch.equal(before.embeds, after.embeds)


def kohya(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """`lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight`, with an alpha."""
    component, _, rest = key.partition(".")
    name, part = rest.rsplit(".lora_", 1)
    number = component.removeprefix("text_encoder").removeprefix("_") or "1"
    flat = name if name.startswith("text_model") else f"text_model.{name}"
    path = f"lora_te{number}_{flat.replace('.', '_')}"
    kind = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
    return {f"{path}.{kind}": tensor, f"{path}.alpha": torch.tensor(3.0)}


def comfy(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """`text_encoders.clip_l.transformer.text_model…`."""
    component, _, rest = key.partition(".")
    kind = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
    flat = rest if rest.startswith("text_model") else f"text_model.{rest}"
    return {
        f"text_encoders.{kind}.transformer.{flat.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}": tensor
    }


@pytest.mark.parametrize("layout", [kohya, comfy])
def test_layouts_of_other_trainers(
    case: Case, layout: Callable[[str, Tensor], dict[str, Tensor]], expected: Callable[[Any], list[TextCondition]]
) -> None:
    """With a part for the transformer beside it, and one for an encoder that the model has not."""
    pipeline = build_pipeline(str(case.checkpoint), CPU_FP32)
    tensors = {name: own for key, tensor in case.tensors.items() for name, own in layout(key, tensor).items()}
    tensors |= {f"text_encoders.llama.{part}": torch.ones(2, 2) for part in ("x.lora_up.weight", "x.lora_down.weight")}
    tensors |= random_adapter(reference_transformer(case.checkpoint), 5)
    adapter = pipeline.adapters.load("a", case.save(tensors))
    assert adapter.notes == ("2 tensors of a text encoder that the model has not are left out",)
    wish = wish_of(case.family)
    assert_close(texts_of(pipeline, [wish | {"lora": [{"name": "a", "scale": SCALE}]}])[0], expected(wish))

    def made(values: dict[str, Any]) -> Req:
        with torch.inference_mode():
            return finished(pipeline, admitted(pipeline, [(values, EMPTY)]))[0][0]

    assert relative_error(made(wish | {"lora": ["a"]}).latents, made(wish).latents) > 1e-2


def test_a_target_takes_its_part_alone(case: Case) -> None:
    pipeline = build_pipeline(str(case.checkpoint), CPU_FP32)
    source = case.save(case.tensors | random_adapter(reference_transformer(case.checkpoint), 5))
    read = pipeline.adapters.read
    assert set(read(source).updates) == {"transformer", *(key.partition(".")[0] for key in case.tensors)}
    assert set(read(source, "transformer").updates) == {"transformer"}
    assert not read(source, "transformer").changes_texts
    assert set(read(source, "text_encoder").updates) == {"text_encoder"}
    with pytest.raises(InvalidLora, match="the target text_encoder_7 is none of all, transformer, text_encoder"):
        read(source, "text_encoder_7")
    only_transformer = case.save(random_adapter(reference_transformer(case.checkpoint), 5))
    with pytest.raises(InvalidLora, match="it changes nothing of the target text_encoder"):
        read(only_transformer, "text_encoder")


def test_layers_that_the_encoder_has_not_are_named(case: Case) -> None:
    pipeline = build_pipeline(str(case.checkpoint), CPU_FP32)
    unknown = {key.replace("layers.0", "layers.77"): tensor for key, tensor in case.tensors.items()}
    with pytest.raises(LoraDoesNotFit, match=r"layers\.77"):
        pipeline.adapters.read(case.save(unknown))
