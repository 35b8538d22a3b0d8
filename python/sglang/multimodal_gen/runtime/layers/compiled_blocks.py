"""A transformer's repeated blocks through torch's compiler, once for each class of block.

Weights are inputs of what is compiled, so that all blocks of a class share it, and sizes are symbols, so that a new
size compiles nothing. Attention stays as it is: its kernels are compiled already, and exchanges between ranks are no
graph's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRunner

Backend = str | Callable[..., Any]
INDUCTOR: Backend = "inductor"
_COMPUTES, _SENDS = ("forward", "begin"), ("send", "send_packed")

logger = logging.getLogger(__name__)


class CompiledClass:
    """The forward of a class of blocks, compiled at its first call. `failure` says why it is not, once that failed."""

    def __init__(self, block_class: type[nn.Module], backend: Backend) -> None:
        self.name = block_class.__name__
        self.plain: Callable[..., Any] = block_class.forward
        self.failure: str | None = None
        self._backend = backend
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the block's own forward returns."""
        if self.failure is not None:
            return self.plain(block, *args, **kwargs)
        if self._compiled is None:  # late: the compiler takes seconds to import
            self._compiled = torch.compile(self.plain, dynamic=True, backend=self._backend)
        try:
            return self._compiled(block, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.failure = next(iter(str(error).splitlines()), type(error).__name__)
            logger.warning("%s runs uncompiled: %s", self.name, self.failure)
            return self.plain(block, *args, **kwargs)


class CompiledBlock:
    """In place of one block's `forward`. Rows with adapters, whose layers read tables, run as they always do."""

    def __init__(self, block: nn.Module, runner: BlockRunner, compiled: CompiledClass) -> None:
        self._block, self._runner, self.compiled = block, runner, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's own forward returns."""
        if self._runner.adapters.uses is not None or torch.is_grad_enabled():
            return self.compiled.plain(self._block, *args, **kwargs)
        return self.compiled(self._block, *args, **kwargs)


def use_compiled_blocks(module: nn.Module, *, backend: Backend = INDUCTOR) -> str:
    """Compile the blocks of a transformer when they run first, and say which ones, or why none are."""
    name = type(module).__name__
    runner = getattr(module, "block_runner", None)
    if not isinstance(runner, BlockRunner):
        return f"enable_torch_compile: {name} is not compiled, since it does not say which its blocks are"
    if runner.shares_features:
        return f"enable_torch_compile: {name} is not compiled, since tensor-parallel ranks talk within its blocks"
    if backend == INDUCTOR:
        envs.keep_compiled_code()
    classes: dict[type[nn.Module], CompiledClass] = {}
    for block in _repeated_blocks(module):
        cls = type(block)
        if cls not in classes:
            classes[cls] = CompiledClass(cls, backend)
        block.forward = CompiledBlock(block, runner, classes[cls])
        for layer in block.modules():
            if isinstance(layer, Attention):
                for method in (*_COMPUTES, *_SENDS) if layer.layout.overlaps else _COMPUTES:
                    setattr(layer, method, torch.compiler.disable(getattr(layer, method)))
    names = ", ".join(compiled.name for compiled in classes.values())
    return f"enable_torch_compile: {names} of {name} compiled with their first request; rows with adapters are not"


def compiled_classes_of(module: nn.Module) -> list[CompiledClass]:
    """Of a module's blocks."""
    forwards = (part.forward for part in module.modules())
    return list(dict.fromkeys(each.compiled for each in forwards if isinstance(each, CompiledBlock)))


def _repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Of each list of the module, if all are of one class."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and _are_alike(child):
            yield from child


def _are_alike(blocks: Iterable[nn.Module]) -> bool:
    return len({type(block) for block in blocks}) == 1
