"""The reference's module through torch's compiler, as the library's own method compiles it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sglang.multimodal_gen.errors import IncompatibleParameters
from sglang.multimodal_gen.runtime.bench.options import DIFFUSERS, DIFFUSERS_COMPILED
from sglang.multimodal_gen.runtime.layers.compiled_blocks import INDUCTOR, Backend


def compile_reference(module: nn.Module, *, backend: Backend = INDUCTOR) -> str:
    """Let a module of diffusers be compiled with its first forward: the blocks that its class repeats, or all of it
    where it does not say which they are. The names of what is compiled."""
    blocks: list[str] = getattr(module, "_repeated_blocks", [])
    if not blocks:
        module.compile(backend=backend)
        return type(module).__name__
    module.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]
    found = {type(part).__name__ for part in module.modules()}
    return " and ".join(name for name in blocks if name in found)


@contextmanager
def compiler_failures_told(names: str) -> Iterator[None]:
    """Raises IncompatibleParameters when torch's compiler fails inside the block."""
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        raise IncompatibleParameters(
            f"compare: {DIFFUSERS_COMPILED} is not possible here, torch's compiler failed on {names} "
            f"({_reason(error)}); {DIFFUSERS} compares with the same uncompiled",
            param="compare",
        ) from None


def _reason(error: BaseException) -> str:
    """The first line of what the compiler's backend met, which torch wraps, and who raised it."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
