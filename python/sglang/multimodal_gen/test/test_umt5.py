"""The text encoder and the tokenizer against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from sglang.multimodal_gen.configs.models.encoders import UMT5EncoderConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.loader.component_loader import load_module
from sglang.multimodal_gen.runtime.loader.tokenizer import load_tokenizer
from sglang.multimodal_gen.runtime.models.encoders.t5 import distance_buckets
from sglang.multimodal_gen.runtime.models.encoders.umt5 import UMT5EncoderModel
from sglang.multimodal_gen.test.tiny_checkpoints import TinyWan, tiny_text_encoder

TEXTS = [
    "",
    "a red circle",
    "A  Red\tstar, moving; right!",
    "zebra " * 30,
    "Ünïcode ✨ </s> <pad>",
    "a red circle " * 9,
]


def test_hidden_states_match_transformers_in_fp32() -> None:
    """The tolerance covers the order of summation only; texts of different lengths share the batch."""
    reference = tiny_text_encoder(TinyWan())
    ours = UMT5EncoderModel(UMT5EncoderConfig.from_dict(reference.config.to_dict()))
    ours.load_state_dict(
        {k: v for k, v in reference.state_dict().items() if k != "encoder.embed_tokens.weight"}, strict=True
    )
    lengths = torch.tensor([3, 50, 17])
    ids = torch.randint(0, 64, (3, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(50)[None] < lengths[:, None]
    with torch.inference_mode():
        expected = reference(ids, mask.long()).last_hidden_state
        found = ours(ids, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20)])
def test_distance_buckets_match_transformers(num_buckets: int, max_distance: int) -> None:
    config = transformers.UMT5Config(
        vocab_size=8,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
    )
    attention = transformers.UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    distances = torch.arange(-600, 601)
    expected = attention._relative_position_bucket(distances)
    assert torch.equal(distance_buckets(distances, num_buckets=num_buckets, max_distance=max_distance), expected)


@pytest.mark.parametrize("max_length", [512, 16])
def test_token_ids_match_transformers(wan_checkpoint: Callable[[str], Path], max_length: int) -> None:
    directory = wan_checkpoint("plain") / "tokenizer"
    reference = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ours = load_tokenizer(directory)
    for text in TEXTS:
        expected = reference(text, truncation=True, max_length=max_length, add_special_tokens=True).input_ids
        found = ours(text, max_length=max_length)
        assert list(found.ids) == expected, text
        assert found.num_tokens == len(reference(text).input_ids)
        assert found.was_cut == (found.num_tokens > max_length)


def test_settings_saved_in_a_tokenizer_file_change_nothing(
    wan_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = wan_checkpoint("plain") / "tokenizer"
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a red circle moving right and a blue star"
    assert load_tokenizer(tmp_path)(text, max_length=512) == load_tokenizer(source)(text, max_length=512)


def test_fp16_keeps_the_layer_that_overflows_in_fp32(wan_checkpoint: Callable[[str], Path]) -> None:
    directory = wan_checkpoint("plain") / "text_encoder"
    config = UMT5EncoderConfig.from_dict(tiny_text_encoder(TinyWan()).config.to_dict())
    dtypes = {}
    for dtype in (torch.float16, torch.bfloat16):
        module = load_module(
            UMT5EncoderModel, config, directory, dtype=dtype, device=torch.device("cpu"), context=LayerContext()
        )
        dtypes[dtype] = module.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype
        with torch.inference_mode():
            assert module(torch.ones(1, 5, dtype=torch.long), torch.tensor([5])).isfinite().all()
    assert dtypes == {torch.float16: torch.float32, torch.bfloat16: torch.bfloat16}


@pytest.mark.parametrize("change", [{"model_type": "t5"}, {"feed_forward_proj": "gated-silu"}, {"num_heads": "six"}])
def test_other_architectures_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(change))):
        UMT5EncoderConfig.from_dict({"model_type": "umt5"} | change)
