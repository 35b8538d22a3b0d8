"""Text encoders of transformers, dealt to ranks: their linear layers are replaced by ours that hold a part each.

Which layers are cut, and how, is what the model's config declares (`base_model_tp_plan`); transformers' own way of
following it belongs to `torchrun`, and knows no replica's axes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sglang.multimodal_gen.configs.encoder_dealing import EncoderSize
from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis
from sglang.multimodal_gen.runtime.layers.context import EncoderAxes
from sglang.multimodal_gen.runtime.layers.embedding_shards import VocabParallelEmbedding
from sglang.multimodal_gen.runtime.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.multimodal_gen.runtime.layers.shards import Sharded
from sglang.multimodal_gen.runtime.loader.component_loader import built_without_memory

# These stay as they are: norms over one head, for which only training has to do something.
_WHOLE_STYLES = frozenset({"replicated_with_grad_allreduce"})
_STYLES = frozenset({"colwise", "rowwise"})
# Numbers of an attention layer that are fewer on each rank; the code of some versions of transformers reads them.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """The part of a model that has a plan, and what of it is cut: dotted name in that part -> style."""

    part: PreTrainedModel
    cuts: Mapping[str, str]


def library_encoder_size(module: nn.Module) -> EncoderSize | str:
    """What of the module can be dealt, or why nothing can."""
    planned = _planned(module)
    if planned is None:
        return f"there is no tensor-parallel plan for {type(module).__name__}"
    layers = {name: planned.part.get_submodule(name) for name in planned.cuts}
    for name, style in planned.cuts.items():
        if style not in _STYLES or not isinstance(layers[name], nn.Linear):
            return f"its tensor-parallel plan wants {name} to be {style}, which is not known here"
    config: Any = planned.part.config
    widths = [
        layer.out_features
        for name, layer in layers.items()
        if planned.cuts[name] == "colwise" and isinstance(layer, nn.Linear) and not _is_attention(name)
    ]
    return EncoderSize(
        num_heads=config.num_attention_heads,
        num_key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        ffn_dim=math.gcd(*widths),
        vocab_size=_embedding_of(planned.part).num_embeddings,
    )


def deal_library_encoder(module: nn.Module, axes: EncoderAxes) -> None:
    """Replace what the axes deal by this rank's parts, in place; the parts are copies, and the whole can go."""
    planned = _planned(module)
    if planned is None:
        return
    for name, style in planned.cuts.items():
        parent_name, _, own = name.rpartition(".")
        parent, axis = planned.part.get_submodule(parent_name), axes.features
        if _is_attention(name):
            axis = axes.heads
        if axis.size > 1:
            setattr(parent, own, _cut(getattr(parent, own), style, axis))
    for attention in {name.rpartition(".")[0] for name in planned.cuts if _is_attention(name)}:
        _count_own_heads(planned.part.get_submodule(attention), axes.heads)
    _deal_vocabulary(module, planned.part, axes.vocabulary)


def _planned(module: nn.Module) -> _Planned | None:
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            patterns = {_pattern(key): style for key, style in _plan_of(part).items() if style not in _WHOLE_STYLES}
            cuts = {
                name: style
                for name, _ in part.named_modules()
                for pattern, style in patterns.items()
                if pattern.fullmatch(name)
            }
            if cuts:
                return _Planned(part=part, cuts=cuts)
    return None


def _plan_of(part: PreTrainedModel) -> Mapping[str, str]:
    return getattr(part.config, "base_model_tp_plan", None) or {}


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\*", r"\d+"))


def _is_attention(name: str) -> bool:
    """Whether a layer is dealt by heads: it belongs to what transformers calls attention."""
    return "attention" in name.split(".")[-2].lower() or name.split(".")[-2].endswith("attn")


def _cut(layer: nn.Module, style: str, axis: ProcessAxis) -> nn.Module:
    assert isinstance(layer, nn.Linear), "its kind was checked with the plan"
    cls = ColumnParallelLinear if style == "colwise" else RowParallelLinear
    return _filled(layer, cls, layer.in_features, layer.out_features, bias=layer.bias is not None, axis=axis)


def _filled(whole: nn.Module, cls: type[nn.Module], *args: int, **options: Any) -> nn.Module:
    """A layer of this class with what is this rank's of the whole one's parameters."""
    with built_without_memory():
        part = cls(*args, **options)
    assert isinstance(part, Sharded), "it is made to hold a part"
    shards = part.shards()
    for name, parameter in whole.named_parameters(recurse=False):
        own = shards[name].cut(parameter.data).clone() if name in shards else parameter.data
        setattr(part, name, nn.Parameter(own, requires_grad=False))
    return part


def _count_own_heads(attention: Any, axis: ProcessAxis) -> None:
    for name in _HEAD_COUNTS:
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, axis.share(getattr(attention, name), name))


def _deal_vocabulary(module: nn.Module, part: PreTrainedModel, axis: ProcessAxis) -> None:
    """The embedding of tokens, under all of its names."""
    if axis.size == 1:
        return
    whole = _embedding_of(part)
    dealt = _filled(whole, VocabParallelEmbedding, whole.num_embeddings, whole.embedding_dim, axis=axis)
    for holder in list(module.modules()):
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Embedding) and child.weight is whole.weight:
                setattr(holder, name, dealt)


def _embedding_of(part: PreTrainedModel) -> nn.Embedding:
    found = part.get_input_embeddings()
    assert isinstance(found, nn.Embedding), "a text encoder looks its tokens up"
    return found
