"""From the tensors of an adapter's file, in any of the layouts in the wild, to low-rank updates of a model's layers.

A layer is looked up by name in a table of all names that it has (`LayerNames`), dots and underscores being the same, as
some trainers flatten names. Source of LoRA: arXiv:2106.09685.

Shapes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.models.foreign_names import ForeignName
from sglang.multimodal_gen.errors_lora import InvalidLora, LoraDoesNotFit
from sglang.multimodal_gen.runtime.layers.shards import shards_of

_DOWN, _UP, _BIAS, _ALPHA = "down", "up", "bias", "alpha"
# A peft state may carry the adapter's name behind lora_A; `.down.weight` alone stands in attention processors.
_ENDINGS = (
    (re.compile(r"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down|down)(\.\w+)?\.weight$"), _DOWN),
    (re.compile(r"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up|up)(\.\w+)?\.weight$"), _UP),
    (re.compile(r"\.(lora_B(\.\w+)?\.bias|diff_b)$"), _BIAS),
    (re.compile(r"\.alpha$"), _ALPHA),
)
# What other methods than plain LoRA store: DoRA, LoHa, LoKr, (IA)3, OFT.
_OTHER_METHODS = re.compile(r"dora_scale|lora_magnitude_vector|hada_w|lokr_w|ia3|oft_|\.on_input$")
# Differences of whole tensors, such as weights of norms, which are no low-rank update.
_DIFFERENCE = re.compile(r"\.diff$|(norm\w*|modulation)\.diff_b$")
_PROCESSOR = re.compile(r"\.processor\.((?:to|add)_\w+?)_lora$")
_MODEL_PREFIXES = re.compile(
    r"^(base_model\.model|model|diffusion_model|transformer|unet)\.|^(lora_unet|lora_transformer|lycoris)_"
)
_COMPONENTS = (
    (re.compile(r"^transformer_(?P<number>\d)\."), "transformer"),
    (re.compile(r"^text_encoder(_(?P<number>\d))?\."), "text_encoder"),
    (re.compile(r"^lora_te(?P<number>\d)?_"), "text_encoder"),
    (re.compile(r"^text_encoders\.clip_l\."), "text_encoder"),
    (re.compile(r"^text_encoders\.clip_g\."), "text_encoder_2"),
    (re.compile(r"^text_encoders\.\w+\."), "text_encoder of another kind"),
)
# Names of text encoders may begin with those of models around them.
_TEXT_PREFIXES = re.compile(r"^(transformer|text_model|language_model|model)[._]")
MAIN_COMPONENT = "transformer"


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The update factor · up · down of one layer's weight [O, I], and what is added to its outputs besides.

    down [R, I], up [O, R], bias [O] or None; dtypes as stored.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    factor: float = 1.0

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def scaled_up(self) -> Tensor:
        """factor · up, fp32."""
        return self.up.float() * self.factor


Updates = dict[str, LowRank]
"""By the name of the layer in its model."""


@dataclass(frozen=True, kw_only=True)
class AdapterTensors:
    """An adapter sorted by the components that it changes, whose own names its layers have. `notes`: what is left
    out."""

    updates: Mapping[str, Updates]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AlphaRule:
    """How much an update counts where its file does not say: alpha / rank, from peft's config. Patterns name layers by
    the end of their path."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    override: float | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any], *, override: float | None = None) -> AlphaRule:
        """Of an `adapter_config.json`, or of what diffusers stores in the file's metadata. Raises InvalidLora."""
        alpha, pattern = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        numbers = [alpha, *(pattern.values() if isinstance(pattern, Mapping) else ["no table"])]
        if any(isinstance(n, bool) or not isinstance(n, int | float | None) for n in numbers):
            raise InvalidLora("its config has an alpha that is no number")
        if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
            raise InvalidLora("it was made by another method; accepted is plain LoRA")
        return cls(
            alpha=alpha, alpha_pattern=pattern, rank_stabilised=bool(config.get("use_rslora")), override=override
        )

    def factor(self, path: str, rank: int, stored: float | None) -> float:
        """Of a layer whose file says the alpha `stored`, or says none."""
        if self.override is not None:
            return self.override / rank
        if stored is not None:
            return stored / rank
        alpha = next((a for end, a in self.alpha_pattern.items() if _ends_with(path, end)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _ends_with(path: str, pattern: str) -> bool:
    """As peft reads patterns."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error:
        return path == pattern or path.endswith(f".{pattern}")


@dataclass(frozen=True)
class _Target:
    """Layers that share an input, by name and number of outputs."""

    layers: tuple[tuple[str, int], ...]
    in_features: int
    halves_swapped: bool = False

    @property
    def out_features(self) -> int:
        return sum(size for _, size in self.layers)


class LayerNames:
    """The linear layers of a model, under each name by which adapters know them."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes = _linear_sizes(model)
        self._targets = {_flat(name): _Target(((name, out),), in_) for name, (out, in_) in self.sizes.items()}
        config = getattr(model, "config", None)
        self._reads_texts = not isinstance(config, TransformerConfig)
        for rule in config.foreign_names if isinstance(config, TransformerConfig) else ():
            self._add(rule)

    def find(self, path: str) -> _Target | None:
        """The layers that an adapter means by a path from which what stands before the model's own part is taken."""
        own = _PROCESSOR.sub(r".\1", path)
        while (found := self._targets.get(_flat(own)) or self._targets.get(_flat(f"{own}.0"))) is None:
            prefix = _TEXT_PREFIXES.match(own) if self._reads_texts else None
            if prefix is None:
                return None
            own = own[prefix.end() :]
        return found

    def _add(self, rule: ForeignName) -> None:
        if not rule.own:
            return
        first = re.compile(re.escape(rule.own[0]).replace(r"\{\}", r"(\d+)") + "$")
        for name in self.sizes:
            if found := first.match(name):
                layers = [own.format(*found.groups()) for own in rule.own]
                sizes = tuple((layer, self.sizes[layer][0]) for layer in layers if layer in self.sizes)
                if len(sizes) == len(layers):
                    target = _Target(sizes, self.sizes[name][1], rule.halves_swapped)
                    self._targets.setdefault(_flat(rule.name.format(*found.groups())), target)


def _linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the whole layers, whatever part of them this rank holds."""
    shards, sizes = shards_of(model), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            shape, shard = tuple(layer.weight.shape), shards.get(f"{name}.weight")
            out, in_ = shape if shard is None else shard.whole_shape(shape)
            sizes[name] = (out, in_)
    return sizes


def _flat(name: str) -> str:
    return name.replace(".", "_")


@dataclass
class _Parts:
    """What a file holds of one path, with the keys."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def sort_tensors(
    tensors: Mapping[str, Tensor], names: Mapping[str, LayerNames], rules: Mapping[str, AlphaRule]
) -> AdapterTensors:
    """The updates of each component that has names here. `rules` are by component too; one may be missing.

    Raises:
        InvalidLora: no adapter, not of plain LoRA, or one whose parts do not fit together.
        LoraDoesNotFit: layers or shapes that the model has not.
    """
    grouped, left_out = _grouped(tensors)
    updates: dict[str, Updates] = {}
    unknown: list[str] = []
    num_others = 0
    for (component, _), parts in grouped.items():
        if component not in names:
            num_others += len(parts.tensors)
            continue
        target = names[component].find(parts.path)
        if target is None and parts.tensors.keys() == {_BIAS}:
            left_out += parts.keys.values()  # of a norm or a convolution
            continue
        if target is None:
            unknown += parts.keys.values()
            continue
        found = _updates_of(parts, target, rules.get(component, AlphaRule()))
        own = updates.setdefault(component, {})
        if twice := found.keys() & own.keys():
            raise InvalidLora(f"it changes {min(twice)} twice, under two names")
        own |= found
    if unknown:
        raise LoraDoesNotFit("the model has no such linear layers", unknown, "it was made for another model")
    if not updates:
        raise InvalidLora("none of its tensors belongs to this model; accepted are LoRA weights of its own")
    notes = [f"{num_others} tensors of a text encoder that the model has not are left out"] if num_others else []
    if left_out:
        notes.append(f"{len(left_out)} tensors that are no low-rank update are left out, such as {left_out[0]}")
    return AdapterTensors(updates=updates, notes=tuple(notes))


def _grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[tuple[str, str], _Parts], list[str]]:
    """By component and path; and the keys of what is no low-rank update, but for zeros."""
    others = [key for key in tensors if _OTHER_METHODS.search(key)]
    if others:
        raise InvalidLora(f"{others[0]} belongs to another method than LoRA; accepted is plain LoRA")
    grouped: dict[tuple[str, str], _Parts] = {}
    left_out, unread = [], []
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidLora(f"{key} holds values that are not finite")
        if _DIFFERENCE.search(key):
            left_out += [key] if tensor.any() else []
            continue
        ending = next(((found.start(), part) for pattern, part in _ENDINGS if (found := pattern.search(key))), None)
        if ending is None:
            unread.append(key)
            continue
        component, path = split_component(key[: ending[0]])
        parts = grouped.setdefault((component, path), _Parts(path))
        if ending[1] in parts.tensors:
            raise InvalidLora(f"{key} and {parts.keys[ending[1]]} are the same part of the same layer")
        parts.tensors[ending[1]], parts.keys[ending[1]] = tensor, key
    if unread:
        raise LoraDoesNotFit("keys that no LoRA layout has", unread, "accepted are those of diffusers, peft and kohya")
    return grouped, left_out


def split_component(path: str) -> tuple[str, str]:
    """`lora_unet_blocks_0_q` -> (`transformer`, `blocks_0_q`); a number says which of several, `text_encoder_2`."""
    for pattern, component in _COMPONENTS:
        if found := pattern.match(path):
            number = found.groupdict().get("number") or "1"
            return (component if number == "1" else f"{component}_{number}"), path[found.end() :]
    while found := _MODEL_PREFIXES.match(path):
        path = path[found.end() :]
        if any(pattern.match(path) for pattern, _ in _COMPONENTS):
            return split_component(path)
    return MAIN_COMPONENT, path


def _updates_of(parts: _Parts, target: _Target, rule: AlphaRule) -> Updates:
    """One update for each layer of the target."""
    if _DOWN not in parts.tensors and _UP not in parts.tensors and _BIAS in parts.tensors:
        like = parts.tensors[_BIAS]
        down, up = like.new_zeros(1, target.in_features), like.new_zeros(target.out_features, 1)
    else:
        down, up = (_matrix(parts, part) for part in (_DOWN, _UP))
    _check_shapes(parts, target, down, up)
    alpha = parts.tensors.get(_ALPHA)
    if alpha is not None and alpha.numel() != 1:
        raise InvalidLora(f"{parts.keys[_ALPHA]} is no number")
    whole = LowRank(
        down=down,
        up=up,
        bias=parts.tensors.get(_BIAS),
        factor=rule.factor(parts.path, down.shape[0], None if alpha is None else float(alpha)),
    )
    if target.halves_swapped:
        bias = None if whole.bias is None else whole.bias.roll(target.out_features // 2)
        whole = replace(whole, up=whole.up.roll(target.out_features // 2, dims=0), bias=bias)
    return dict(_split(whole, target.layers))


def _matrix(parts: _Parts, part: str) -> Tensor:
    """A 1x1 convolution is a linear layer too."""
    if part not in parts.tensors:
        present = next(iter(parts.keys.values()))
        raise InvalidLora(f"{present} has no counterpart: both factors of an update are needed")
    tensor = parts.tensors[part]
    while tensor.ndim > 2 and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise InvalidLora(f"{parts.keys[part]} is no matrix, its shape is {_shape(tensor)}")
    return tensor


def _check_shapes(parts: _Parts, target: _Target, down: Tensor, up: Tensor) -> None:
    name = "+".join(layer for layer, _ in target.layers)
    if down.shape[0] != up.shape[1]:
        raise InvalidLora(f"{parts.keys[_DOWN]} has rank {down.shape[0]}, {parts.keys[_UP]} has {up.shape[1]}")
    problems = []
    if down.shape[1] != target.in_features:
        problems.append(f"{parts.keys.get(_DOWN)} {_shape(down)} for {target.in_features} inputs")
    if up.shape[0] != target.out_features:
        problems.append(f"{parts.keys.get(_UP)} {_shape(up)} for {target.out_features} outputs")
    bias = parts.tensors.get(_BIAS)
    if bias is not None and tuple(bias.shape) != (target.out_features,):
        problems.append(f"{parts.keys[_BIAS]} {_shape(bias)} for {target.out_features} outputs")
    if problems:
        raise LoraDoesNotFit(f"the shape of {name} is another one", problems, "it was made for a model of other sizes")


def _split(whole: LowRank, layers: Iterable[tuple[str, int]]) -> Iterable[tuple[str, LowRank]]:
    """The outputs dealt to the layers, each with the columns of `up` that are not all zeros there.

    Trainers that know the layers apart store a block-diagonal `up`, where a layer has a rank of its own.
    """
    layers = list(layers)
    if len(layers) == 1:
        yield layers[0][0], whole
        return
    start = 0
    for name, size in layers:
        up = whole.up[start : start + size]
        bias = None if whole.bias is None else whole.bias[start : start + size]
        start += size
        used = up.any(0).nonzero().flatten()
        if len(used):
            yield name, replace(whole, down=whole.down[used], up=up[:, used], bias=bias)
        elif bias is not None and bias.any():
            yield name, replace(whole, down=whole.down[:1], up=up[:, :1], bias=bias)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def metadata_rules(metadata: Mapping[str, str], *, override: float | None = None) -> dict[str, AlphaRule]:
    """What diffusers stores of peft's config in a file's metadata, by component. Raises InvalidLora."""
    try:
        stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise InvalidLora("its metadata cannot be read") from error
    if not isinstance(stored, dict):
        raise InvalidLora("its metadata is no table")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in stored.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    return {component: AlphaRule.of_config(config, override=override) for component, config in configs.items()}
