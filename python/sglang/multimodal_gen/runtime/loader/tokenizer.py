"""Text to token ids with the checkpoint's own `tokenizer.json`, or with what CLIP's has in its place.

The tokenizers library alone is used there: importing transformers costs a worker's start seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tokenizers

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.loader.clip_tokenizer import clip_tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Token ids with the special tokens; `num_tokens` is how many the whole text would have."""

    ids: tuple[int, ...]
    num_tokens: int

    @property
    def was_cut(self) -> bool:
        """Whether the text did not fit."""
        return len(self.ids) < self.num_tokens


class TextTokenizer(Protocol):
    """What turns a prompt into token ids."""

    def __call__(self, text: str, *, max_length: int) -> TokenizedText:
        """At most `max_length` ids; a longer text loses its end but keeps the special tokens around it."""
        ...


class PromptTokenizer:
    """One checkpoint's tokenizer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, pad_id: int = 0) -> None:
        """`pad_id` is the id of padding, where a model sees any."""
        self._tokenizer = tokenizer
        self.pad_id = pad_id
        # A file may carry the settings of its last use.
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def __call__(self, text: str, *, max_length: int) -> TokenizedText:
        """See TextTokenizer."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        num_tokens = len(encoding.ids) + num_special
        encoding.truncate(max(0, max_length - num_special))
        return TokenizedText(ids=tuple(self._tokenizer.post_process(encoding).ids[:max_length]), num_tokens=num_tokens)

    def id_of(self, token: str) -> int | None:
        """A token's id; None when there is no such token."""
        return self._tokenizer.token_to_id(token)


def load_tokenizer(directory: Path) -> PromptTokenizer:
    """The tokenizer in a checkpoint's directory. Raises CorruptCheckpoint when there is none."""
    path = directory / "tokenizer.json"
    if path.is_file():
        content = read_json_object(path)
        if not isinstance(content.get("model"), dict):
            raise CorruptCheckpoint(f"{directory.name}/tokenizer.json has no model; download the checkpoint again")
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        return PromptTokenizer(tokenizer, pad_id=_pad_id(directory, tokenizer))
    if not (directory / "tokenizer_config.json").is_file():
        raise CorruptCheckpoint(f"{directory.name} holds no tokenizer.json; download the checkpoint again")
    converted = clip_tokenizer(directory) or _converted(directory)
    return PromptTokenizer(converted, pad_id=_pad_id(directory, converted))


def _pad_id(directory: Path, tokenizer: tokenizers.Tokenizer) -> int:
    """The id of the `pad_token` that the checkpoint's files name; 0, the usual one, when they name none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            token = read_json_object(directory / name).get("pad_token")
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and (found := tokenizer.token_to_id(content)) is not None:
                return found
    return 0


def _converted(directory: Path) -> tokenizers.Tokenizer:
    """The fast form of a tokenizer that was saved in an older format, such as a SentencePiece model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise CorruptCheckpoint(f"{directory.name} holds no tokenizer that can be read: {error}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CorruptCheckpoint(f"{directory.name} has no fast tokenizer; save it with transformers once")
    return tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
