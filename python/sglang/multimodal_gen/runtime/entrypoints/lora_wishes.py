"""What users say of adapters, in Python and over HTTP, as requests to the engine, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.configs.declare import arg, build
from sglang.multimodal_gen.configs.lora_args import MERGE_MODES
from sglang.multimodal_gen.configs.sample.lora_params import MAX_LORAS, MAX_SCALE, name_problem
from sglang.multimodal_gen.errors import InvalidValue, MissingParameter, UnsupportedParameter
from sglang.multimodal_gen.runtime.managers.messages import LoraReply, LoraRequest, LoraWish

_ALL = "all"


@dataclass(frozen=True, kw_only=True)
class SetLoraFields:
    """Of `set_lora`; where several values are given, there are as many as nicknames."""

    lora_nickname: str | tuple[str, ...] | None = arg(
        None,
        help="Name of the adapter, or names; an empty list sets none.",
        group="lora",
        check=name_problem,
        may_be_empty=True,
        max_items=MAX_LORAS,
    )
    lora_path: str | tuple[str, ...] | None = arg(
        None,
        help="A safetensors file, a directory or an `owner/name` of the hub; not needed for what is loaded: an "
        "empty text in a list.",
        group="lora",
        unset="the adapters are loaded",
        max_length=4096,
        max_items=MAX_LORAS,
    )
    target: str | tuple[str, ...] = arg(
        _ALL, help="The transformer that it changes, or `all`.", group="lora", max_length=64, max_items=MAX_LORAS
    )
    strength: float | tuple[float, ...] = arg(
        1.0, help="How much it counts.", group="lora", minimum=-MAX_SCALE, maximum=MAX_SCALE, max_items=MAX_LORAS
    )
    merge_mode: str = arg(
        "auto",
        help="`merge` makes them part of the weights, once the requests before have ended; the others compute them "
        "beside the weights of requests that come later.",
        group="lora",
        choices=MERGE_MODES,
    )
    lora_alpha: float | None = arg(
        None, help="Alpha in place of the file's.", group="lora", unset="the file's", minimum=0.0, maximum=1e6
    )
    lora_weight_name: str | None = arg(
        None,
        help="File of the directory or repository, where it holds several.",
        group="lora",
        unset="the usual one, or the only one",
        max_length=512,
    )


@dataclass(frozen=True, kw_only=True)
class MergeLoraFields:
    """Of `merge_lora_weights`."""

    target: str = arg(_ALL, help="Only `all` is accepted: an adapter says itself what it changes.", group="lora")
    strength: float = arg(
        1.0, help="Factor of the scales that are set.", group="lora", minimum=-MAX_SCALE, maximum=MAX_SCALE
    )


@dataclass(frozen=True, kw_only=True)
class UnmergeLoraFields:
    """Of `unmerge_lora_weights`."""

    target: str = arg(_ALL, help="Only `all` is accepted: all weights are the checkpoint's again.", group="lora")


@dataclass(frozen=True, kw_only=True)
class RemoveLoraFields:
    """Of `remove_lora`."""

    lora_nickname: str | tuple[str, ...] | None = arg(
        None, help="Name of the adapter, or names.", group="lora", check=name_problem, max_items=MAX_LORAS
    )


def set_request(values: Mapping[str, Any], *, what: str = "field") -> LoraRequest:
    """Raises InvalidRequest for values that are not accepted, or lists of different lengths."""
    fields: SetLoraFields = build(SetLoraFields, _given(values), what=what)
    names = _names(fields.lora_nickname)
    paths = _as_many("lora_path", fields.lora_path, names)
    targets = _as_many("target", fields.target, names)
    strengths = _as_many("strength", fields.strength, names)
    if isinstance(fields.lora_path, str) and len(names) > 1:
        raise InvalidValue("lora_path", fields.lora_path, f"as many as nicknames, which are {len(names)}")
    adapters = tuple(
        LoraWish(
            name=name,
            scale=strength,
            path=_absolute(path) if path else None,
            weight_name=fields.lora_weight_name,
            alpha=fields.lora_alpha,
            target=target,
        )
        for name, path, target, strength in zip(names, paths, targets, strengths, strict=True)
    )
    return LoraRequest(query_id="", operation="set", adapters=adapters, merge=fields.merge_mode == "merge")


def merge_request(values: Mapping[str, Any], *, what: str = "field") -> LoraRequest:
    """Raises InvalidRequest."""
    fields: MergeLoraFields = build(MergeLoraFields, _given(values), what=what)
    _refuse_target(fields.target)
    return LoraRequest(query_id="", operation="merge", scale=fields.strength)


def unmerge_request(values: Mapping[str, Any], *, what: str = "field") -> LoraRequest:
    """Raises InvalidRequest."""
    fields: UnmergeLoraFields = build(UnmergeLoraFields, _given(values), what=what)
    _refuse_target(fields.target)
    return LoraRequest(query_id="", operation="unmerge")


def remove_request(values: Mapping[str, Any], *, what: str = "field") -> LoraRequest:
    """Raises InvalidRequest."""
    fields: RemoveLoraFields = build(RemoveLoraFields, _given(values), what=what)
    adapters = tuple(LoraWish(name=name) for name in _names(fields.lora_nickname))
    return LoraRequest(query_id="", operation="remove", adapters=adapters)


LIST_REQUEST = LoraRequest(query_id="", operation="list")


def listed(reply: LoraReply) -> dict[str, Any]:
    """What is loaded; and by target what is `active`: set for requests that name none, or in the weights of all."""
    active: dict[str, list[dict[str, Any]]] = {}
    for each in reply.adapters:
        if each.scale is not None:
            mode = "merged" if each.merged else "unmerged"
            entry = {"nickname": each.name, "path": each.path, "strength": each.scale, "merged": each.merged}
            active.setdefault(each.target, []).append(entry | {"mode": mode})
    loaded = [{"nickname": each.name, "path": each.path, "target": each.target} for each in reply.adapters]
    return {"loaded_adapters": loaded, "active": active}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _names(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if given is None:
        raise MissingParameter("lora_nickname: not given, accepted is a name or a list of names", param="lora_nickname")
    names = (given,) if isinstance(given, str) else given
    if len(set(names)) < len(names):
        raise InvalidValue("lora_nickname", list(names), "each name once")
    return names


def _as_many(field: str, value: Any, names: Sequence[str]) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * len(names)
    if len(value) != len(names):
        raise InvalidValue(field, list(value), f"as many as nicknames, which are {len(names)}")
    return value


def _absolute(path: str) -> str:
    """Workers may run elsewhere; what is no path here may be a name of the hub."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path


def _refuse_target(target: str) -> None:
    if target != _ALL:
        raise UnsupportedParameter("target", "an adapter says itself what it changes; accepted is all")
