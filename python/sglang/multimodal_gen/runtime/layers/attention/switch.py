"""Which attention kernels a model runs with: said once at start-up, and exchanged for the requests that ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from sglang.multimodal_gen.configs.attention import ATTENTION_ROLES, AttentionOptions, Wish, wish_for
from sglang.multimodal_gen.runtime.layers.attention.attention import Attention
from sglang.multimodal_gen.runtime.layers.attention.dispatch import KernelSelector
from sglang.multimodal_gen.runtime.layers.attention.kernels import AttentionKernel
from sglang.multimodal_gen.runtime.layers.attention.tabled import ChoiceMemory


@dataclass(frozen=True)
class _Setting:
    """A kernel for each layer, and their names by role, for batch keys."""

    kernels: tuple[AttentionKernel, ...]
    names: str


class AttentionSwitch:
    """The attention layers of one model, and the kernels with which they serve a request.

    Nothing is touched for requests that ask for no kernel.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = _attention_layers([model])
        self._settings: dict[tuple[Wish | None, ...], _Setting] = {}

    def names(self, options: AttentionOptions) -> str:
        """The kernels that a request runs with, such as `self=fa3,cross=torch_sdpa`; requests may share a forward only
        if these are equal.

        Raises: AttentionNotAvailable when a kernel that it asks for cannot serve.
        """
        return self._setting(options).names

    @contextmanager
    def using(self, options: AttentionOptions) -> Iterator[None]:
        """Run the model with a request's kernels inside the `with` block. Raises AttentionNotAvailable."""
        if not any(_wishes(options)):
            yield
            return
        wanted = self._setting(options).kernels
        usual = tuple(layer.kernel for layer in self._layers)
        try:
            self._set(wanted)
            yield
        finally:
            self._set(usual)

    def _set(self, kernels: Sequence[AttentionKernel]) -> None:
        for layer, kernel in zip(self._layers, kernels, strict=True):
            layer.kernel = kernel

    def _setting(self, options: AttentionOptions) -> _Setting:
        wishes = _wishes(options)
        if wishes not in self._settings:
            self._settings[wishes] = self._resolve(dict(zip(ATTENTION_ROLES, wishes, strict=True)))
        return self._settings[wishes]

    def _resolve(self, wishes: dict[str, Wish | None]) -> _Setting:
        kernels = tuple(layer.source.kernel(layer.needs, wishes[layer.source.role]) for layer in self._layers)
        names: dict[str, dict[str, None]] = {role: {} for role in ATTENTION_ROLES}
        for layer, kernel in zip(self._layers, kernels, strict=True):
            names[layer.source.role][kernel.name] = None
        return _Setting(kernels, ",".join(f"{role}={'+'.join(found)}" for role, found in names.items() if found))


def explain_kernels(models: Iterable[nn.Module]) -> list[str]:
    """For each role a sentence that says which kernel its layers use and why; several where layers differ."""
    sentences: dict[str, None] = {}
    for layer in _attention_layers(models):
        if isinstance(layer.source, KernelSelector):
            sentences[f"{layer.source.role}-attention {layer.source.explain(layer.needs)}"] = None
    return list(sentences)


def choice_memory_of(models: Iterable[nn.Module]) -> ChoiceMemory | None:
    """That from which layers without a wish get their kernels; None where none has one."""
    sources = (layer.source for layer in _attention_layers(models))
    memories = (source.memory for source in sources if isinstance(source, KernelSelector) and source.wish is None)
    return next((memory for memory in memories if memory is not None), None)


def _attention_layers(models: Iterable[nn.Module]) -> list[Attention]:
    return [module for model in models for module in model.modules() if isinstance(module, Attention)]


def _wishes(options: AttentionOptions) -> tuple[Wish | None, ...]:
    return tuple(wish_for(role, options) for role in ATTENTION_ROLES)
