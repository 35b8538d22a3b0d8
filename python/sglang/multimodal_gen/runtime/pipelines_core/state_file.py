"""Saved states of requests: a tree of tensors and plain values as one safetensors file, whole or absent.

The tree's shape stands as JSON in the file's header, its tensors are the file's tensors; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sglang.multimodal_gen.errors import InvalidState
from sglang.multimodal_gen.runtime.postprocess.pending_file import write_whole

_FORMAT = "sglang-request-state-2"


def to_host(tree: Any) -> Any:
    """A copy of the tree on the CPU that later steps cannot change."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True).contiguous()
    if isinstance(tree, Mapping):
        return {name: to_host(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [to_host(value) for value in tree]
    return tree


def write_state(path: Path, tree: Mapping[str, Any], *, identity: str) -> None:
    """Write `tree`: dicts, lists, CPU tensors, numbers, texts and None. `identity` says what it belongs to.

    The bytes are on the disk when this returns. Raises: OSError.
    """
    tensors: dict[str, Tensor] = {}
    shape = json.dumps(_shape_of(tree, tensors))
    write_whole(path, save(tensors, metadata={"format": _FORMAT, "identity": identity, "shape": shape}))


def read_state(path: Path, *, identity: str, device: torch.device) -> dict[str, Any]:
    """The tree with its tensors on `device`.

    Raises: InvalidState for a file that is missing, cut short, of another version, or that belongs to something else.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InvalidState("the saved state has another format than this version writes")
            if metadata.get("identity") != identity:
                raise InvalidState("the saved state belongs to another request or model")
            # Copies: the last bits of a processor's products depend on where a tensor begins, and in a file that is
            # anywhere.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
            tree = _tree_of(json.loads(metadata["shape"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InvalidState("the saved state cannot be read: the file is missing or damaged") from error
    assert isinstance(tree, dict), "written by write_state"
    return tree


def _shape_of(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON: a tensor becomes {"tensor": name}, a dict {"dict": …}; the rest stands for itself."""
    if isinstance(tree, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": {name: _shape_of(value, tensors) for name, value in tree.items()}}
    if isinstance(tree, list):
        return [_shape_of(value, tensors) for value in tree]
    assert tree is None or isinstance(tree, bool | int | float | str), f"a state cannot hold {type(tree).__name__}"
    return tree


def _tree_of(shape: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(shape, list):
        return [_tree_of(value, tensors) for value in shape]
    if isinstance(shape, dict):
        if "tensor" in shape:
            return tensors[shape["tensor"]]
        return {name: _tree_of(value, tensors) for name, value in shape["dict"].items()}
    return shape
