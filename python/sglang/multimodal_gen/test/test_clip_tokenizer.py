"""CLIP's tokenizer without transformers, against it: the same serialised tokenizer, and the same ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.runtime.loader.clip_tokenizer import clip_tokenizer
from sglang.multimodal_gen.runtime.loader.tokenizer import load_tokenizer

TEXTS = [
    "",
    " ",
    "a red circle moving right",
    "A  Red\tcircle,\n\nmoving; RIGHT! ",
    "it's the dogs' 'tis we'll they'd I'm you've 'RE",
    "1234 5 67.89 x2 ² ½ Ⅷ",
    "Ünïcode naïve cafe\u0301 ÇA İstanbul ßtraße ﬁ Ω",
    "日本語のテキスト 中文，标点。 한국어 كتاب שלום हिन्दी ไทย",
    "😀👩‍👩‍👧🏽 ✨ ❤️ a🇫🇷b",
    "<|startoftext|> a <|endoftext|> b <|ENDOFTEXT|>! <|other|> ! !!",
    "a\u00a0b\u2003c\u200bd\u3000e\u2028f\x00g\ufeff",
    "$%^&*()_+-=[]{}|;:'\",.<>/?`~ … — “quoted”",
    "word " * 200,
    "antidisestablishmentarianism" * 9,
]
PLAIN = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


def added(content: str, *, normalized: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, "normalized": normalized, **flags}


def table(start: int, *, normalized_end: bool, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """As published: the second encoder of Stable Diffusion 3 pads with a sign."""
    tokens = {
        str(start): added("<|startoftext|>", normalized=True),
        str(start + 1): added("<|endoftext|>", normalized=normalized_end),
    }
    return {"added_tokens_decoder": (more or {}) | tokens}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of CLIP's form: all bytes, each also at a word's end, then merges, then the two special ones."""
    directory = tmp_path_factory.mktemp("files")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [
        "r e",
        "re d</w>",
        "c i",
        "ci r",
        "o v",
        "m ov",
        "t h",
        "th e</w>",
        "' s</w>",
        "a n",
        "ð Ł",
        "! !</w>",
        "Ã ©</w>",
    ]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(pair.replace(" ", "") for pair in pairs)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    return directory


def checkpoint(files: Path, directory: Path, config: dict[str, Any], roles: dict[str, Any] | None = None) -> Path:
    for name in ("vocab.json", "merges.txt"):
        (directory / name).write_bytes((files / name).read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if roles is not None:
        (directory / "special_tokens_map.json").write_text(json.dumps(roles))
    return directory


NORMALIZED_ROLES = {role: added(PLAIN[role], normalized=True) for role in ("bos_token", "eos_token", "unk_token")}
OF_ALL_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "plain": (PLAIN, None),
    "nothing said": ({"tokenizer_class": "CLIPTokenizer"}, None),
    "of the fast class": (PLAIN | {"tokenizer_class": "CLIPTokenizerFast", "do_lower_case": True, "errors": "x"}, None),
    "table": (PLAIN | table(525, normalized_end=True), NORMALIZED_ROLES),
    "not normalized": (PLAIN | table(525, normalized_end=False), None),
    "pads with a sign": (PLAIN | table(525, normalized_end=False) | {"pad_token": "!"}, None),
    "sign in the table": (
        PLAIN | table(525, normalized_end=False, more={"0": added("!", normalized=False)}) | {"pad_token": "!"},
        None,
    ),
    "roles in a file": ({"tokenizer_class": "CLIPTokenizer"}, NORMALIZED_ROLES | {"pad_token": "!"}),
    "roles as tokens": (
        PLAIN | {"bos_token": {"__type": "AddedToken", **added("<|startoftext|>", normalized=True)}},
        None,
    ),
}


@pytest.mark.parametrize("kind", OF_ALL_KINDS)
def test_it_is_the_tokenizer_of_transformers(kind: str, files: Path, tmp_path: Path) -> None:
    directory = checkpoint(files, tmp_path, *OF_ALL_KINDS[kind])
    reference = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ours = clip_tokenizer(directory)
    assert ours is not None
    assert json.loads(ours.to_str()) == json.loads(reference.backend_tokenizer.to_str())
    loaded = load_tokenizer(directory)
    if "pad_token" in OF_ALL_KINDS[kind][0]:
        assert loaded.pad_id == reference.pad_token_id
    for text in TEXTS:
        for max_length in (77, 5, 1000):
            expected = reference(text, truncation=True, max_length=max_length).input_ids
            assert list(loaded(text, max_length=max_length).ids) == expected, text


@pytest.mark.parametrize(
    "config",
    [
        PLAIN | {"tokenizer_class": "GPT2Tokenizer"},
        PLAIN | {"extra_special_tokens": ["<new>"]},
        PLAIN | {"added_tokens_decoder": {"x": 3}},
        PLAIN | {"pad_token": None},
        PLAIN | {"a_new_setting": True},
    ],
)
def test_what_is_not_known_here_is_left_to_transformers(config: dict[str, Any], files: Path, tmp_path: Path) -> None:
    assert clip_tokenizer(checkpoint(files, tmp_path, config)) is None


@pytest.mark.parametrize("line", ["only", "a zz", "a b c"])
def test_merges_of_no_tokens_are_a_corrupt_checkpoint(line: str, files: Path, tmp_path: Path) -> None:
    directory = checkpoint(files, tmp_path, PLAIN)
    (directory / "merges.txt").write_text(f"#version: 0.2\nr e\n{line}\n")
    with pytest.raises(CorruptCheckpoint, match=r"merges.txt: line 3 merges no two tokens"):
        load_tokenizer(directory)


def test_it_needs_no_transformers(files: Path, tmp_path: Path) -> None:
    program = """
import sys, pathlib
from sglang.multimodal_gen.runtime.loader.tokenizer import load_tokenizer
print(load_tokenizer(pathlib.Path(sys.argv[1]))("red", max_length=77).num_tokens, "transformers" in sys.modules)
"""
    command = [sys.executable, "-P", "-c", program, str(checkpoint(files, tmp_path, PLAIN))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["3", "False"]
