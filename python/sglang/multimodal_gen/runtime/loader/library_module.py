"""Components that a library builds: text and image encoders of transformers.

Importing this module imports transformers, which takes seconds: only pipelines that need it do.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from sglang.multimodal_gen.errors import CorruptCheckpoint, UnsupportedModel
from sglang.multimodal_gen.runtime.loader.component_loader import (
    Checkpoint,
    LoadContext,
    built_uninitialised,
    weight_totals,
)
from sglang.multimodal_gen.runtime.loader.library_sharding import deal_library_encoder, library_encoder_size
from sglang.multimodal_gen.runtime.loader.parallel_reading import send_tensors
from sglang.multimodal_gen.runtime.loader.weight_utils import open_weights, refuse_fp8

_SHOWN_KEYS = 8
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Its bars and advice belong into no server's log; what is wrong with a checkpoint is said here.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class LibraryModule:
    """A component of one of these classes, looked up in the library by name; the first is the usual one."""

    class_names: tuple[str, ...]
    library: Any
    optional_keys: tuple[str, ...] = ()
    """Parts of names of weights that a file may lack, since no forward of ours reads them."""
    part: str = ""
    """Dotted name of the submodule that is used; the rest never gets to the device."""

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> nn.Module:
        """Raises UnsupportedModel for another class, CorruptCheckpoint when config or weights do not fit."""
        cls, dtype = self.class_of(directory, class_name), context.dtype_of(directory.name)
        device = context.device_of(directory.name)
        shared = context.layers.parallel.world.size > 1
        in_parts = device.type == "cuda" or directory.name in context.on_host
        if not isinstance(context.source, Checkpoint):
            module = self._used(self.filled(cls, directory, dtype, context, shared=shared))
        elif shared or in_parts:
            # In the files' own dtype its tensors are the mapped files: a rank reads what it keeps.
            whole = self.stored(cls, directory, _dtype_of_most(directory))
            module, fp32_names = self._used(whole), _names_in_fp32(whole, dtype)
            if shared:
                self._deal(module, directory, dtype, context)
            begin = time.perf_counter()
            _send(module, fp32_names, dtype, device)
            num_bytes = sum(parameter.nbytes for parameter in module.parameters())
            context.source.note(directory.name, num_bytes, time.perf_counter() - begin)
        else:
            module = self._used(self.stored(cls, directory, dtype))
        return module.to(device).eval().requires_grad_(False)

    def class_of(self, directory: Path, class_name: str) -> Any:
        """The library's class. Raises UnsupportedModel for another one."""
        if class_name not in self.class_names:
            raise UnsupportedModel(
                f"the checkpoint's {directory.name} is a {class_name}; supported is {' or '.join(self.class_names)}"
            )
        return getattr(self.library, class_name)

    def constructed(self, cls: Any, directory: Path) -> nn.Module:
        """One of this class as the config says, with any weights."""
        return cls(cls.config_class.from_pretrained(directory, local_files_only=True))

    def _used(self, module: nn.Module) -> Any:
        return attrgetter(self.part)(module) if self.part else module

    @staticmethod
    def _deal(module: nn.Module, directory: Path, dtype: torch.dtype, context: LoadContext) -> None:
        """To the ranks of the replica, where it is an encoder for which that pays."""
        weight_bytes = weight_totals([module])[0] * dtype.itemsize
        size = library_encoder_size(module)
        deal_library_encoder(module, context.encoder_axes(directory.name, size, weight_bytes=weight_bytes))

    def stored(self, cls: Any, directory: Path, dtype: torch.dtype) -> nn.Module:
        """With the checkpoint's weights."""
        if not (directory / "config.json").is_file():
            raise CorruptCheckpoint(f"{directory.name}/config.json is missing; download or export the checkpoint again")
        refuse_fp8(directory)
        try:
            module, found = cls.from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                dtype=dtype,
            )
        except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
            raise CorruptCheckpoint(_explained(directory, error)) from error
        missing = [key for key in found["missing_keys"] if not any(part in key for part in self.optional_keys)]
        _refuse_misfits(directory, {"missing": missing, "mis-shaped": [str(key) for key in found["mismatched_keys"]]})
        return module

    def filled(self, cls: Any, directory: Path, dtype: torch.dtype, context: LoadContext, *, shared: bool) -> nn.Module:
        """With what the source gives in place of weights; only the config is read."""
        device = context.device_of(directory.name)
        with built_uninitialised(device, dtype):  # the library draws billions of numbers on one core
            module = self.constructed(cls, directory)
        if shared:
            self._deal(self._used(module), directory, dtype, context)
        module = module.to(device, dtype)
        # Tied weights are one tensor under several names: the last one filled stays.
        tensors = context.source.tensors_for(directory, module, dtype_of=lambda _: dtype, device=device)
        module.load_state_dict(tensors, strict=False)
        return module


def _send(module: nn.Module, fp32_names: frozenset[str], dtype: torch.dtype, device: torch.device) -> None:
    """The module's parameters to the device, in fp32 those of which a part of the name says so, else in `dtype`."""
    parameters = dict(module.named_parameters())

    def place(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32 if fp32_names.intersection(name.split(".")) else dtype)

    held = {name: parameter.data for name, parameter in parameters.items()}
    if device.type == "cpu":
        sent = {name: place(name, tensor) for name, tensor in held.items()}  # mapped files stay what they are
    else:
        sent = send_tensors(held, place, device=device)
    for name, parameter in parameters.items():
        parameter.data = sent[name]


def transformers_module(*class_names: str, optional_keys: tuple[str, ...] = (), part: str = "") -> LibraryModule:
    """A component of one of these classes of transformers."""
    return LibraryModule(class_names, transformers, optional_keys, part)


def _dtype_of_most(directory: Path) -> torch.dtype:
    """Of most numbers in the files."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in open_weights(directory).tensors.values():
        if tensor.dtype in _FLOATS:
            counts[_FLOATS[tensor.dtype]] += math.prod(tensor.shape)
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _names_in_fp32(module: Any, dtype: torch.dtype) -> frozenset[str]:
    """Parts of names whose parameters transformers keeps in fp32."""
    names: set[str] = set()
    if dtype == torch.float16:
        names.update(module._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        names.update(module._keep_in_fp32_modules_strict or ())
    return frozenset(names)


def _explained(directory: Path, error: Exception) -> str:
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        reason = "has pickled weights, which are not read; save them as safetensors" if pickled else "has no weights"
        return f"{directory.name} {reason}"
    return f"{directory.name} cannot be read ({type(error).__name__}); download or export the checkpoint again"


def _refuse_misfits(directory: Path, problems: dict[str, Sequence[str]]) -> None:
    sentences = [
        f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN_KEYS])}{', …' if len(keys) > _SHOWN_KEYS else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if sentences:
        raise CorruptCheckpoint(
            f"the weights in {directory.name} do not fit {directory.name}/config.json: {'; '.join(sentences)}"
        )
