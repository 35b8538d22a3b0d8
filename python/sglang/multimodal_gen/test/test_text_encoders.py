"""Our text encoders against transformers', on random weights in every form that the pipelines use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.encoders import T5EncoderConfig
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidRequest
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear
from sglang.multimodal_gen.runtime.loader.component_loader import load_module
from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel
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


def assert_equal_states(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """fp32 on the CPU: the tolerance covers the order of summation only."""
    torch.testing.assert_close(found, expected, rtol=1e-5 * scale, atol=1e-5 * scale)


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
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


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


def linear_names(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, kind)}


def test_layers_that_adapters_change_have_their_usual_names(tmp_path: Path) -> None:
    reference = saved_t5(tmp_path)
    assert linear_names(t5_from(tmp_path), AdaptableLinear) == linear_names(reference, nn.Linear)
