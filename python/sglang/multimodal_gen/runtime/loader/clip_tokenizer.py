"""CLIP's tokenizer from the files `vocab.json` and `merges.txt`, all that most published checkpoints have of it.

Source: https://github.com/openai/CLIP (byte-level BPE with lower case and an end on each word), in the form that
transformers gives it, to the letter of the serialised tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.registry import read_json_object

_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
# In the order in which those that files do not list get ids.
_NAMED = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_NAMED |= {"pad_token": "<|endoftext|>"}
_WITHOUT_EFFECT = frozenset(
    {
        *("add_prefix_space", "backend", "clean_up_tokenization_spaces", "do_lower_case", "errors", "model_max_length"),
        *("name_or_path", "processor_class", "special_tokens_map_file", "tokenizer_class", "tokenizer_file"),
        "is_local",
    }
)
"""Settings that change no id, in transformers either."""
_EMPTY = frozenset({"additional_special_tokens", "extra_special_tokens"})
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Words are letters without end, single digits, and signs without end; some English endings are words."""


def clip_tokenizer(directory: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of these files; None where they are another class's, or say something that is not known here.

    Raises: CorruptCheckpoint when a file cannot be read.
    """
    paths = [directory / name for name in ("vocab.json", "merges.txt")]
    config = read_json_object(directory / "tokenizer_config.json")
    if config.get("tokenizer_class") not in _CLASSES or not all(path.is_file() for path in paths):
        return None
    known = _WITHOUT_EFFECT | _NAMED.keys() | {"added_tokens_decoder"}
    if (directory / "added_tokens.json").is_file() or any(
        key not in known and not (key in _EMPTY and not value) for key, value in config.items()
    ):
        return None
    try:
        listed = _listed_tokens(config)
        named = _named_tokens(directory, config, listed)
    except (TypeError, ValueError, KeyError):
        return None
    vocabulary = read_json_object(paths[0])
    return _built(vocabulary, _merges(paths[1], vocabulary), listed, named)


def _listed_tokens(config: Mapping[str, Any]) -> list[AddedToken]:
    """What the config's table lists, by id."""
    table: Mapping[str, Any] = config.get("added_tokens_decoder", {})
    return [AddedToken(**token) for _, token in sorted(table.items(), key=lambda item: int(item[0]))]


def _named_tokens(directory: Path, config: Mapping[str, Any], listed: Iterable[AddedToken]) -> dict[str, AddedToken]:
    """The tokens with a role. An older file of its own says them where the config has no table."""
    named: dict[str, Any] = {role: config.get(role, usual) for role, usual in _NAMED.items()}
    path = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and path.is_file():
        for role, token in read_json_object(path).items():
            if role not in _NAMED:
                raise KeyError(role)
            named[role] = token
    by_content = {token.content: token for token in listed}
    return {role: by_content.get(_content(token), _special(token)) for role, token in named.items()}


def _content(token: Any) -> str:
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(content)
    return content


def _special(token: Any) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(token, special=True)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"} | {"special": True})


def _merges(path: Path, vocabulary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, the most frequent first. Raises CorruptCheckpoint for what is no pair, or is of no words."""
    merges = []
    # Other line ends than these two are parts of words.
    for number, line in enumerate(path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        first, _, second = line.partition(" ")
        if not {first, second, first + second} <= vocabulary.keys():
            raise CorruptCheckpoint(
                f"{path.parent.name}/merges.txt: line {number} merges no two tokens of vocab.json into a third; "
                "download the checkpoint again"
            )
        merges.append((first, second))
    return merges


def _built(
    vocabulary: Mapping[str, Any],
    merges: list[tuple[str, str]],
    listed: list[AddedToken],
    named: Mapping[str, AddedToken],
) -> tokenizers.Tokenizer:
    model = models.BPE(
        vocab=dict(vocabulary),
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=named["unk_token"].content,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list({token.content: token for token in (*listed, *named.values())}.values()))
    begin, end = (_with_id(tokenizer, named[role]) for role in ("bos_token", "eos_token"))
    tokenizer.post_processor = processors.RobertaProcessing(end, begin, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def _with_id(tokenizer: tokenizers.Tokenizer, token: AddedToken) -> tuple[str, int]:
    found = tokenizer.token_to_id(token.content)
    assert found is not None, "it was added"
    return token.content, found
