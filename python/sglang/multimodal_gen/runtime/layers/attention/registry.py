"""Every attention kernel by name: what it can do, how it is built, and in which order they are tried."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sglang.multimodal_gen.runtime.layers.attention.fp8 import FlashAttention3FP8
from sglang.multimodal_gen.runtime.layers.attention.kernels import (
    AttentionKernel,
    TorchCudnnSDPA,
    TorchReference,
    TorchSDPA,
)
from sglang.multimodal_gen.runtime.layers.attention.third_party import (
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    SageAttention,
)
from sglang.multimodal_gen.runtime.layers.attention.traits import DeviceFacts, KernelTraits


@dataclass(frozen=True)
class KernelEntry:
    """A kernel's traits, the package it comes with, and what builds it: that raises ImportError without the package."""

    traits: KernelTraits
    package: str
    build: Callable[[], AttentionKernel]


KERNELS: Mapping[str, KernelEntry] = types.MappingProxyType(
    {
        kernel.name: KernelEntry(kernel.traits, kernel.package, kernel)
        for kernel in (
            TorchSDPA,
            TorchCudnnSDPA,
            FlashAttention2,
            FlashAttention3,
            FlashAttention4,
            FlashAttention3FP8,
            SageAttention,
            TorchReference,
        )
    }
)
FAMILIES: Mapping[str, tuple[str, ...]] = types.MappingProxyType({"fa": ("fa3", "fa4", "fa2")})
"""A name that stands for whichever of its members suits the device best."""

# By major compute capability, best first. On Hopper a forward over 32,760 tokens takes 537 ms with FlashAttention 3,
# 601 with cuDNN, 605 with torch's own choice (docs/performance.md). Measured by others: cuDNN takes half of
# FlashAttention 2's time there, on Blackwell (10.x) less than FlashAttention 4's, elsewhere no less than torch's own
# choice: huggingface/transformers#48163, sgl-project/sglang#30090, sgl-project/sglang#33655.
_PREFERRED: Mapping[int, tuple[str, ...]] = types.MappingProxyType(
    {
        9: ("fa3", "torch_cudnn_sdpa", "fa4", "fa2", "torch_sdpa"),
        10: ("torch_cudnn_sdpa", "fa4", "fa2", "torch_sdpa"),
    }
)
_PREFERRED_ON_OTHER_GPUS = ("fa2", "torch_sdpa")
# For what nothing else can do.
_LAST = TorchReference.name


def preferred(facts: DeviceFacts) -> tuple[str, ...]:
    """The kernels that may be chosen without being asked for, best first. No lossy one is."""
    if facts.capability is None:
        return (TorchSDPA.name, _LAST)
    return (*_PREFERRED.get(facts.capability[0], _PREFERRED_ON_OTHER_GPUS), _LAST)


def preference_in_words() -> dict[str, tuple[str, ...]]:
    """The order for each kind of device, best first."""
    by_capability = {f"compute capability {major}.x": (*names, _LAST) for major, names in _PREFERRED.items()}
    return {**by_capability, "other GPUs": (*_PREFERRED_ON_OTHER_GPUS, _LAST), "CPUs": (TorchSDPA.name, _LAST)}


def members(name: str, facts: DeviceFacts) -> tuple[str, ...]:
    """The kernels that a name stands for, best first; none for a name that does not exist."""
    if name not in FAMILIES:
        return (name,) if name in KERNELS else ()
    order = preferred(facts)
    ranked = [member for member in order if member in FAMILIES[name]]
    return (*ranked, *(member for member in FAMILIES[name] if member not in ranked))


@functools.cache
def load_kernel(name: str) -> AttentionKernel:
    """The kernel of that name in KERNELS, the same object each time. Raises ImportError when its package is missing."""
    return KERNELS[name].build()


@functools.cache
def loading_problem(name: str) -> str | None:
    """Why the kernel does not load, as a phrase that follows its name; None when it does."""
    try:
        load_kernel(name)
    except ImportError as error:
        return str(error)
    return None


def device_facts(device: torch.device) -> DeviceFacts:
    """What the choice of a kernel needs to know of a device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return DeviceFacts(device_type=device.type, capability=capability, problem_of=loading_problem)
