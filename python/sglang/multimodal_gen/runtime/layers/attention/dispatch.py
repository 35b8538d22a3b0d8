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
from sglang.multimodal_gen.runtime.layers.attention.tabled import ChoiceMemory, TabledKernel
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

    def usual_name(self, needs: LayerNeeds) -> str:
        """The kernel that a layer has whatever the shapes of a call."""
        ...


@dataclass(frozen=True, kw_only=True)
class KernelSelector:
    """Chooses the kernels of one role, as the engine's options wish; where they do not, by shape from the memory."""

    role: AttentionRole
    facts: DeviceFacts
    wish: Wish | None = None
    memory: ChoiceMemory | None = None

    def choose(self, needs: LayerNeeds, wish: Wish | None = None) -> KernelChoice:
        """See `choose_kernel`; without a wish of the request's own, the engine's counts."""
        return choose_kernel(needs, self.facts, wish=wish or self.wish)

    def kernel(self, needs: LayerNeeds, wish: Wish | None = None) -> AttentionKernel:
        """See `KernelSource`. Raises AttentionNotAvailable."""
        usual = load_kernel(self.choose(needs, wish).name)
        if wish is not None or self.wish is not None or self.memory is None or not self.memory.is_of_use(needs):
            return usual
        return TabledKernel(usual, self.memory, needs, lambda name: self.is_admissible(name, needs))

    def usual_name(self, needs: LayerNeeds) -> str:
        """See `KernelSource`. Raises AttentionNotAvailable."""
        return self.choose(needs).name

    def is_admissible(self, name: str, needs: LayerNeeds) -> bool:
        """Whether a table's word is enough for this kernel: it exists, is exact, and can serve the layer here."""
        return name in KERNELS and not KERNELS[name].traits.lossy and obstacle(name, self.facts, needs) is None

    def explain(self, needs: LayerNeeds) -> str:
        """The choice and where it comes from, in words."""
        choice = self.choose(needs)
        if self.wish is not None or self.memory is None:
            return f"{choice.name}: {choice.reason}"
        chosen = {
            str(entry.shape): name
            for entry in self.memory.table.entries
            if entry.shape.precision == needs.precision and entry.shape.head_dim == needs.head_dim
            if (name := next((name for name in entry.kernels if self.is_admissible(name, needs)), choice.name))
            != choice.name
            and entry.shape.masked <= needs.mask
        }
        if not chosen:
            return f"{choice.name}: {choice.reason}"
        shapes = "; ".join(f"{name} for {shape}" for shape, name in chosen.items())
        return f"{choice.name}: {choice.reason}; but by {self.memory.table.origin} {shapes}"


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

    def usual_name(self, needs: LayerNeeds) -> str:
        """See `KernelSource`."""
        return self.fixed.name


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
