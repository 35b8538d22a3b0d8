"""The module of diffusers or transformers that a checkpoint names, with our module's very tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sglang.multimodal_gen.errors import MissingPackage
from sglang.multimodal_gen.registry import load_object, read_json_object


def require_reference() -> None:
    """Raises MissingPackage naming what a comparison needs and this environment lacks."""
    for package in ("diffusers", "transformers", "accelerate"):
        try:
            load_object(f"{package}:__version__")
        except ImportError as error:
            raise MissingPackage(
                f"compare: needs the package {package}, which cannot be imported ({error}); install it with pip",
                param="compare",
            ) from None


def reference_module(directory: Path, listed: tuple[str, str], ours: nn.Module) -> nn.Module:
    """The module that `listed`, a [library, class] pair of model_index.json, names for a component's directory.

    It is constructed without memory for its parameters and takes ours; its buffers are its own.
    """
    library, class_name = listed
    module_class = load_object(f"{library}:{class_name}")
    config = read_json_object(directory / "config.json")
    with load_object("accelerate:init_empty_weights")(include_buffers=False):
        module: nn.Module = _construct(module_class, config)
    # In the order of memory that its own checkpoint would have.
    state = {name: tensor.contiguous() for name, tensor in ours.state_dict().items()}
    for alias, name in getattr(ours, "key_aliases", {}).items():
        state[alias] = state[name]
    # A module of transformers lists a tensor that it shares under one name or under both.
    wanted = module.state_dict().keys()
    module.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted}, strict=True, assign=True)
    device = next(ours.parameters()).device
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))
    return module.eval().requires_grad_(False)


def _construct(module_class: Any, config: Mapping[str, Any]) -> nn.Module:
    if hasattr(module_class, "config_class") and module_class.config_class is not None:
        return module_class(module_class.config_class(**config))
    return module_class.from_config(dict(config))
