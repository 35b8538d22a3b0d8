"""Our text encoders against transformers', on random weights in every form that the pipelines use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.encoders import CLIPTextConfig, T5EncoderConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidRequest
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear
from sglang.multimodal_gen.runtime.loader.component_loader import load_module
from sglang.multimodal_gen.runtime.models.encoders.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel
from sglang.multimodal_gen.test.tiny_families import FAMILIES
from sglang.multimodal_gen.test.tiny_wan import randomised

CPU = torch.device("cpu")
T5_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 20,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}


def saved_t5(directory: Path, **changes: Any) -> Any:
    """A model of transformers, which is written there too."""
    model = randomised(transformers.T5EncoderModel(transformers.T5Config(**(T5_SIZES | changes))), 7)
    model.save_pretrained(directory)
    return model


def t5_from(directory: Path, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    config = T5EncoderConfig.from_dict(transformers.T5Config.from_pretrained(directory).to_dict())
    return load_module(T5EncoderModel, config, directory, dtype=dtype, device=CPU, context=LayerContext())


def drawn_ids(rows: int, length: int, vocab_size: int = 64) -> Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))


def assert_equal_states(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """fp32 on the CPU: the usual tolerance covers the order of summation only."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 50, 256])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_t5_matches_transformers_in_fp32(feed_forward: str, length: int, tmp_path: Path) -> None:
    """Of versions 1.0 and 1.1; with all tokens, and masked behind each text, where what padding becomes counts too."""
    reference = saved_t5(tmp_path, feed_forward_proj=feed_forward)
    ours, ids = t5_from(tmp_path), drawn_ids(3, length)
    lengths = torch.tensor([1, max(1, length // 3), length])
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    with torch.inference_mode():
        assert_equal_states(ours(ids), reference(ids).last_hidden_state)
        assert_equal_states(ours(ids, lengths), reference(ids, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t5_has_the_dtypes_of_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    """With fp16 one layer is kept in fp32. The values differ by roundings of the dtype."""
    saved_t5(tmp_path)
    reference = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=dtype).eval()
    ours, ids = t5_from(tmp_path, dtype), drawn_ids(2, 9)
    theirs = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == theirs
    with torch.inference_mode():
        found, expected = ours(ids), reference(ids).last_hidden_state
    assert found.dtype == expected.dtype
    assert_equal_states(found, expected, 5e-2)


def rewritten(directory: Path, change: Any) -> None:
    [file] = directory.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()},
        lambda tensors: {
            key.replace("shared.weight", "encoder.embed_tokens.weight"): tensor for key, tensor in tensors.items()
        },
        lambda tensors: (
            tensors
            | {
                "decoder.embed_tokens.weight": torch.ones(64, 20),
                "decoder.final_layer_norm.weight": torch.ones(20),
                "lm_head.weight": torch.ones(64, 20),
            }
        ),
    ],
    ids=["under both names", "under its second name", "with a decoder"],
)
def test_t5_files_may_name_the_embedding_twice_and_hold_a_decoder(change: Any, tmp_path: Path) -> None:
    reference = saved_t5(tmp_path)
    rewritten(tmp_path, change)
    ids = drawn_ids(1, 5)
    with torch.inference_mode():
        assert_equal_states(t5_from(tmp_path)(ids), reference(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {key: tensor for key, tensor in tensors.items() if "attention_bias" not in key},
            "1 missing: encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        (lambda tensors: tensors | {"encoder.extra.weight": torch.ones(2)}, "1 unexpected: encoder.extra.weight"),
        (
            lambda tensors: tensors | {"shared.weight": torch.ones(3, 20)},
            "1 mis-shaped: shared.weight .file 3x20",
        ),
    ],
)
def test_t5_weights_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    saved_t5(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(CorruptCheckpoint, match=message):
        t5_from(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "umt5"}, "model_type is 'umt5', but must be 't5'"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu', but must be 'relu' or 'gated-gelu'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn is 'silu', but must be 'relu'"),
        ({"is_gated_act": True}, "is_gated_act is True, but must be False"),
        ({"num_layers": 0}, "num_layers is 0, but must be at least 1"),
        ({"d_ff": "wide"}, "d_ff is 'wide', but must be int"),
    ],
)
def test_other_t5_architectures_are_refused_by_key_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        T5EncoderConfig.from_dict({"model_type": "t5"} | change)


def test_config_defaults_are_those_of_transformers() -> None:
    assert T5EncoderConfig.from_dict(transformers.T5Config().to_dict()) == T5EncoderConfig()
    assert CLIPTextConfig.from_dict(transformers.CLIPTextConfig().to_dict()) == CLIPTextConfig()


CLIP_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 48,
    "projection_dim": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 63,
}
CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (CLIPTextModel, CLIPTextModelWithProjection)}


def saved_clip(directory: Path, class_name: str, **changes: Any) -> Any:
    """A model of transformers, which is written there too."""
    config = transformers.CLIPTextConfig(**(CLIP_SIZES | changes))
    model = randomised(getattr(transformers, class_name)(config), 3)
    model.save_pretrained(directory)
    return model


def clip_from(directory: Path, class_name: str, dtype: torch.dtype = torch.float32) -> Any:
    config = CLIPTextConfig.from_dict(transformers.CLIPTextConfig.from_pretrained(directory).to_dict())
    return load_module(CLASSES[class_name], config, directory, dtype=dtype, device=CPU, context=LayerContext())


def clip_rows(end: int, pad: int, *lengths: int) -> Tensor:
    """Texts of lower ids than the end's, up to the end at these places, padded."""
    rows = drawn_ids(len(lengths), CLIP_SIZES["max_position_embeddings"], min(end, 60))
    for row, length in zip(rows, lengths, strict=True):
        row[length], row[length + 1 :] = end, pad
    return rows


def assert_reads_alike(ours: Any, reference: Any, ids: Tensor, *, tolerance: float = 1e-5) -> None:
    """All hidden states, of which one after `clip_skip` is taken, and the vector."""
    with torch.inference_mode():
        found, expected = ours(ids), reference(ids, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_equal_states(one, other, tolerance)
    vector = expected.text_embeds if "text_embeds" in expected else expected.pooler_output
    assert_equal_states(found.pooled, vector, tolerance)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    ("configured", "end", "pad"),
    [(63, 63, 63), (2, 63, 63), (2, 63, 0), (5, 5, 60)],
)
def test_clip_matches_transformers_in_fp32(
    class_name: str, activation: str, configured: int, end: int, pad: int, tmp_path: Path
) -> None:
    """The end is where the config says, or where the highest id is when it says 2, as unread ones did."""
    reference = saved_clip(tmp_path, class_name, hidden_act=activation, eos_token_id=configured)
    ours = clip_from(tmp_path, class_name)
    assert_reads_alike(ours, reference, clip_rows(end, pad, 1, 30, 76))
    assert_reads_alike(ours, reference, clip_rows(end, pad, 4)[:, :5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("class_name", CLASSES)
def test_clip_has_the_dtypes_of_transformers(class_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The values differ by roundings of the dtype."""
    saved_clip(tmp_path, class_name)
    reference = getattr(transformers, class_name).from_pretrained(tmp_path, dtype=dtype).eval()
    ours = clip_from(tmp_path, class_name, dtype)
    theirs = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == theirs
    assert_reads_alike(ours, reference, clip_rows(63, 63, 9, 76), tolerance=5e-2)


def with_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As published."""
    return {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in tensors.items()}


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers 5 writes the class without a projection."""
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}


def with_positions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers wrote up to version 4.30."""
    return with_prefix(tensors) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def with_eyes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of CLIP."""
    eyes = {"vision_model.pre_layrnorm.weight": torch.ones(3), "visual_projection.weight": torch.ones(16, 3)}
    return with_prefix(tensors) | eyes | {"logit_scale": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("class_name", "change"),
    [
        ("CLIPTextModel", without_prefix),
        *((name, change) for name in CLASSES for change in (with_prefix, with_positions, with_eyes)),
    ],
)
def test_clip_files_of_all_versions_are_read(class_name: str, change: Any, tmp_path: Path) -> None:
    reference = saved_clip(tmp_path, class_name)
    rewritten(tmp_path, change)
    assert_reads_alike(clip_from(tmp_path, class_name), reference, clip_rows(63, 63, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {key: tensors[key] for key in tensors if "fc1.bias" not in key},
            "4 missing: .*fc1.bias",
        ),
        (lambda tensors: tensors | {"text_model.more": torch.ones(2)}, "1 unexpected: text_model.more"),
        (lambda tensors: tensors | {"text_projection.weight": torch.ones(2, 24)}, "mis-shaped: text_projection.weight"),
    ],
)
def test_clip_weights_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    saved_clip(tmp_path, "CLIPTextModelWithProjection")
    rewritten(tmp_path, change)
    with pytest.raises(CorruptCheckpoint, match=message):
        clip_from(tmp_path, "CLIPTextModelWithProjection")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip_text_model"}, "model_type is 'siglip_text_model', but must be 'clip_text_model'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', but must be 'quick_gelu' or 'gelu'"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7, but must divide hidden_size, 512"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, but must be at least 1"),
        ({"eos_token_id": [2, 3]}, "eos_token_id is .2, 3., but must be int"),
    ],
)
def test_other_clip_architectures_are_refused_by_key_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        CLIPTextConfig.from_dict({"model_type": "clip_text_model"} | change)


def test_the_config_of_all_of_clip_serves_its_text_encoder() -> None:
    whole = transformers.CLIPConfig(text_config=CLIP_SIZES)
    expected = CLIPTextConfig.from_dict(transformers.CLIPTextConfig(**CLIP_SIZES).to_dict())
    assert CLIPTextConfig.from_dict(whole.to_dict()) == expected


def linear_names(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, kind)}


def test_layers_that_adapters_change_have_their_usual_names(tmp_path: Path) -> None:
    reference = saved_t5(tmp_path / "t5")
    assert linear_names(t5_from(tmp_path / "t5"), AdaptableLinear) == linear_names(reference, nn.Linear)
    for name in CLASSES:
        reference = saved_clip(tmp_path / name, name)
        assert linear_names(clip_from(tmp_path / name, name), AdaptableLinear) == linear_names(reference, nn.Linear)


@pytest.mark.parametrize(
    ("hub_id", "component", "ours", "config_class"),
    [
        ("black-forest-labs/FLUX.1-dev", "text_encoder", CLIPTextModel, CLIPTextConfig),
        ("black-forest-labs/FLUX.1-dev", "text_encoder_2", T5EncoderModel, T5EncoderConfig),
        ("hunyuanvideo-community/HunyuanVideo", "text_encoder_2", CLIPTextModel, CLIPTextConfig),
        ("stabilityai/stable-diffusion-3.5-large", "text_encoder", CLIPTextModelWithProjection, CLIPTextConfig),
        ("stabilityai/stable-diffusion-3.5-large", "text_encoder_2", CLIPTextModelWithProjection, CLIPTextConfig),
        ("Lightricks/LTX-Video", "text_encoder", T5EncoderModel, T5EncoderConfig),
    ],
)
def test_published_encoders_have_the_parameters_of_transformers(
    hub_id: str, component: str, ours: Any, config_class: Any
) -> None:
    config = read_json_object(published_directory(hub_id) / component / "config.json")
    with torch.device("meta"):
        model, cls = ours(config_class.from_dict(config)), getattr(transformers, ours.__name__)
        reference = cls(cls.config_class(**config))
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    expected.pop("encoder.embed_tokens.weight", None)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected


LIBRARIES = "print(sorted({name.partition('.')[0] for name in sys.modules} & {'transformers', 'diffusers'}))"
ENCODES_A_TEXT = f"""
import sys, torch
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

pipeline = build_pipeline(sys.argv[1], ExecutionArgs(device="cpu"))
params = SamplingParams.from_values(dict(prompt="a red circle", width=32, height=32, num_inference_steps=1, seed=1))
with torch.inference_mode():
    req = pipeline.admit("r", params)
    pipeline.run_unit("text_encode", [req])
print(req.text is not None)
{LIBRARIES}
"""


def as_published(directory: Path) -> None:
    """CLIP's tokenizer without a `tokenizer.json`."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_pipeline_is_built_and_reads_a_text_without_the_libraries(family: str, tmp_path: Path) -> None:
    """Importing them is most of a worker's start."""
    checkpoint = FAMILIES[family][0](tmp_path / family)
    for name in ("tokenizer", "tokenizer_2") if family == "sd3" else ("tokenizer",):
        as_published(checkpoint / name)
    command = [sys.executable, "-P", "-c", ENCODES_A_TEXT, str(checkpoint)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == ["True", "[]"]
