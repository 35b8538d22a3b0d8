"""Which attention kernel a layer uses: the one asked for, or the best for device and layer, with the reason.

The choice is a function of data alone: what the device is, what is installed, what the layer needs, what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang.multimodal_gen.configs.attention import AttentionRole, Wish
from sglang.multimodal_gen.errors import AttentionNotAvailable
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel
from sglang.multimodal_gen.runtime.layers.attention.registry import (
    KERNELS,
    device_facts,
    load_kernel,
    members,
    preferred,
)
from sglang.multimodal_gen.runtime.layers.attention.traits import DeviceFacts, KernelTraits, LayerNeeds


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """A kernel's name and why it was taken."""

    name: str
    reason: str


def obstacle(name: str, facts: DeviceFacts, needs: LayerNeeds) -> str | None:
    """Why a kernel cannot serve, as a phrase that follows its name; None when it can."""
    traits = KERNELS[name].traits
    # What is installed comes last: finding out may import a large package.
    return (
        traits.device_obstacle(facts.device_type, facts.capability)
        or traits.needs_obstacle(needs)
        or facts.problem_of(name)
    )


def choose_kernel(needs: LayerNeeds, facts: DeviceFacts, *, wish: Wish | None = None) -> KernelChoice:
    """The kernel asked for, or the best of the exact ones.

    Raises:
        AttentionNotAvailable: the kernel asked for does not exist or cannot serve here.
    """
    candidates = preferred(facts) if wish is None else members(wish.backend, facts)
    problems: dict[str, str] = {}
    for name in candidates:
        problem = obstacle(name, facts, needs)
        if problem is None:
            why = f"the fastest for {facts}, {needs}" if wish is None else f"{wish.param} asks for {wish.backend}"
            return KernelChoice(name=name, reason="; ".join([why, *_sentences(problems)]))
        problems[name] = problem
    assert wish is not None, f"no kernel serves {needs} on {facts}: {problems}"
    usable = [name for name in KERNELS if obstacle(name, facts, needs) is None]
    shared = len(set(problems.values())) == 1
    reasons = [f"{wish.backend} {next(iter(problems.values()))}"] if shared else _sentences(problems)
    raise AttentionNotAvailable(*wish, reason="; ".join(reasons) or "there is no such kernel", usable=usable)


def _sentences(problems: Mapping[str, str]) -> list[str]:
    return [f"{name} {problem}" for name, problem in problems.items()]


class KernelSource(Protocol):
    """Where the attention layers of one role get their kernels."""

    @property
    def role(self) -> AttentionRole: ...

    def kernel(self, needs: LayerNeeds, wish: Wish | None = None) -> AttentionKernel:
        """A kernel for a layer; a request's wish goes before the engine's."""
        ...


@dataclass(frozen=True, kw_only=True)
class KernelSelector:
    """Chooses the kernels of one role, as the engine's options wish."""

    role: AttentionRole
    facts: DeviceFacts
    wish: Wish | None = None

    def choose(self, needs: LayerNeeds, wish: Wish | None = None) -> KernelChoice:
        """See `choose_kernel`; without a wish of the request's own, the engine's counts."""
        return choose_kernel(needs, self.facts, wish=wish or self.wish)

    def kernel(self, needs: LayerNeeds, wish: Wish | None = None) -> AttentionKernel:
        """See `KernelSource`. Raises AttentionNotAvailable."""
        return load_kernel(self.choose(needs, wish).name)


@dataclass(frozen=True, kw_only=True)
class FixedKernel:
    """One kernel for every layer of a role, which options cannot change."""

    role: AttentionRole
    fixed: AttentionKernel

    def kernel(self, needs: LayerNeeds, wish: Wish | None = None) -> AttentionKernel:
        """See `KernelSource`. Raises AttentionNotAvailable when another kernel is asked for."""
        if wish is not None and wish.backend != self.fixed.name:
            raise AttentionNotAvailable(
                *wish, reason=f"the {self.role}-attention of this model is fixed", usable=[self.fixed.name]
            )
        return self.fixed


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """A kernel, what it can do, and why it cannot run on the device: None when it can."""

    name: str
    traits: KernelTraits
    problem: str | None


def describe_kernels(device: torch.device) -> list[KernelReport]:
    """Every kernel as seen from a device; packages that suit it are imported. `load_kernel` gives those that run."""
    facts = device_facts(device)
    return [
        KernelReport(
            name=name,
            traits=entry.traits,
            problem=entry.traits.device_obstacle(facts.device_type, facts.capability) or facts.problem_of(name),
        )
        for name, entry in KERNELS.items()
    ]
