"""What a pipeline of diffusers is put together from where there are no weights: our components with our random numbers.

Importing this module imports diffusers and transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sglang.multimodal_gen.configs.quantization_args import QuantizationArgs
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.registry import load_object, read_json_object, read_model_index
from sglang.multimodal_gen.runtime.bench.worker.model import BenchModel
from sglang.multimodal_gen.runtime.bench.worker.reference_module import reference_module
from sglang.multimodal_gen.runtime.loader.chat_tokenizer import ChatTokenizer
from sglang.multimodal_gen.runtime.loader.component_loader import (
    ComponentLoader,
    LoadContext,
    NativeModule,
    SchedulerConfig,
    Tokenizer,
)
from sglang.multimodal_gen.runtime.loader.library_module import LibraryModule
from sglang.multimodal_gen.runtime.loader.tokenizer import TextTokenizer

_PAD_TOKEN = 0
_NO_COMPONENT = [None, None]


def random_components(pipeline_class: Any, model: BenchModel, context: LoadContext) -> dict[str, Any]:
    """The constructor's arguments: a counterpart of each of our components and the plain values of model_index.json.

    Raises: UnsupportedModel for a component that has no counterpart without a checkpoint.
    """
    # Quantised weights are compared with the same ones as they were, as those of a checkpoint are.
    context = dataclasses.replace(context, quantization=QuantizationArgs(), compile_blocks=False, cuda_graphs=False)
    index, components = read_model_index(model.directory), dict[str, Any]()
    for name in inspect.signature(pipeline_class.__init__).parameters:
        value = index.get(name)
        if name in index and not isinstance(value, list):
            components[name] = value
        elif value == _NO_COMPONENT or model.pipeline_class.leaves_out(name, index):
            components[name] = None
    for name, load in model.pipeline_class.components.items():
        if not model.pipeline_class.leaves_out(name, index):
            components[name] = _counterpart(load, model.directory / name, model.listed(name), context)
    return components


def _counterpart(load: ComponentLoader, directory: Path, listed: tuple[str, str], context: LoadContext) -> Any:
    """What diffusers would load for a component of ours."""
    library, class_name = listed
    if isinstance(load, NativeModule):
        return reference_module(directory, listed, load(directory, class_name, context))
    if isinstance(load, LibraryModule):
        # It is the library's own class already. A pipeline of diffusers gets all of it, whatever we use.
        whole = dataclasses.replace(load, part="")
        module: nn.Module = whole(directory, class_name, context)
        return module
    if isinstance(load, SchedulerConfig):
        config = read_json_object(directory / "scheduler_config.json")
        return load_object(f"{library}:{class_name}").from_config(config)
    if isinstance(load, Tokenizer | ChatTokenizer):
        if directory.is_dir():
            return load_object(f"{library}:{class_name}").from_pretrained(directory, local_files_only=True)
        stand_in = load(directory, class_name, context)
        return TransformersTokenizer(stand_in, model_max_length=_positions_of_encoder(directory))
    raise UnsupportedModel(
        f"compare: diffusers' pipeline wants a {class_name} as its {directory.name}, which cannot be made for "
        "random weights; compare a checkpoint, without random_weights",
        param="compare",
    )


def _positions_of_encoder(directory: Path) -> int:
    """How many tokens the text encoder of a tokenizer's directory has positions for; they have the same number."""
    encoder = directory.with_name(directory.name.replace("tokenizer", "text_encoder", 1))
    return int(read_json_object(encoder / "config.json").get("max_position_embeddings", sys.maxsize))


class TransformersTokenizer:
    """A stand-in for a tokenizer with the calls of transformers', as far as pipelines use them."""

    added_tokens_encoder: Mapping[str, int] = {}
    """Words that a user taught: none."""

    def __init__(self, tokenizer: TextTokenizer, *, model_max_length: int) -> None:
        """`model_max_length`: tokens that the text encoder has positions for."""
        self._tokenizer = tokenizer
        self.model_max_length = model_max_length

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        **_: Any,
    ) -> Any:
        """`input_ids` and `attention_mask` [B, L]: L is what `padding` says, "max_length" or else the longest text."""
        texts = [text] if isinstance(text, str) else text
        longest = self.model_max_length if max_length is None else max_length
        rows = [self._tokenizer(each, max_length=longest if truncation else sys.maxsize).ids for each in texts]
        length = longest if padding == "max_length" else max(map(len, rows))
        ids = torch.full((len(rows), length), _PAD_TOKEN)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def tokenize(self, text: str) -> list[str]:
        """Nothing: it is asked in search of words that a user taught."""
        return []

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        """The ids themselves, since what was cut is only shown."""
        return [" ".join(str(int(token)) for token in row) for row in rows]

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> str:
        """What is said, without a template, as our engine has it then."""
        return "\n".join(message["content"] for message in messages)
