"""Autoencoders that diffusers builds.

Importing this module imports diffusers, which takes seconds: only pipelines that need it do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from sglang.multimodal_gen.runtime.loader.component_loader import Checkpoint, LoadContext
from sglang.multimodal_gen.runtime.loader.library_module import LibraryModule
from sglang.multimodal_gen.runtime.models.vaes.library_strips import deal_pictures

# Its bars and advice belong into no server's log; what is wrong with a checkpoint is said here.
diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class LibraryAutoencoderModule(LibraryModule):
    """An autoencoder of which several ranks each do a strip of the picture."""

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> nn.Module:
        """See LibraryModule."""
        cls, dtype = self.class_of(directory, class_name), context.dtype_of(directory.name)
        if isinstance(context.source, Checkpoint):
            module = self.stored(cls, directory, dtype)
        else:
            module = self.filled(cls, directory, dtype, context, shared=False)
        module = module.to(context.device_of(directory.name)).eval().requires_grad_(False)
        deal_pictures(module, context.layers.strips)
        return module

    def constructed(self, cls: Any, directory: Path) -> nn.Module:
        """See LibraryModule."""
        module: nn.Module = cls.from_config(cls.load_config(directory, local_files_only=True))
        return module


def diffusers_autoencoder(*class_names: str) -> LibraryModule:
    """An autoencoder of one of these classes of diffusers."""
    return LibraryAutoencoderModule(class_names, diffusers)
