"""Tokenizers of chat models: a prompt becomes a conversation, as the checkpoint's own template says.

Importing this module imports transformers, which takes seconds: only pipelines that need it do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer, TokenizedText


class ChatPromptTokenizer:
    """A tokenizer and the conversation that a prompt stands in; a TextTokenizer."""

    def __init__(self, tokenizer: TextTokenizer, conversation: Callable[[str], str]) -> None:
        """`conversation` writes the prompt into the template."""
        self.tokenizer = tokenizer
        self.conversation = conversation

    def __call__(self, text: str, *, max_length: int) -> TokenizedText:
        """See TextTokenizer; the template's tokens count as the text's."""
        return self.tokenizer(self.conversation(text), max_length=max_length)


@dataclass(frozen=True)
class ChatTokenizer:
    """A component: the tokenizer, with what its template is told besides the conversation, by name."""

    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> ChatPromptTokenizer:
        """Raises CorruptCheckpoint without a tokenizer or without a template."""
        tokenizer = context.source.tokenizer(directory)
        # Weights without a checkpoint have no template either.
        conversation = _template_of(directory, dict(self.options)) if directory.is_dir() else str
        return ChatPromptTokenizer(tokenizer, conversation)


def _template_of(directory: Path, options: dict[str, Any]) -> Callable[[str], str]:
    try:
        chat = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise CorruptCheckpoint(f"{directory.name} holds no tokenizer that can be read: {error}") from error
    if chat.chat_template is None:
        raise CorruptCheckpoint(f"{directory.name} has no chat template; download the checkpoint again")

    def conversation(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    return conversation
