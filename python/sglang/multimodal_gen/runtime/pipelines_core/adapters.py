"""The adapters of one worker: read and kept on the CPU, brought into slots of the device when a forward needs them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from sglang.multimodal_gen.configs.sample.lora_params import LoraUse
from sglang.multimodal_gen.errors_lora import InvalidLora, LoraNotSupported, UnknownLora
from sglang.multimodal_gen.errors_quantization import MergeNotPossible
from sglang.multimodal_gen.runtime.layers.host_weights import compute_device
from sglang.multimodal_gen.runtime.layers.linear import AdaptableLinear
from sglang.multimodal_gen.runtime.layers.lora import (
    EMPTY_SLOT,
    AdapterRows,
    LayerUpdate,
    SlotTable,
    SlotUse,
    update_of,
)
from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource, read_adapter
from sglang.multimodal_gen.runtime.loader.lora_formats import MAIN_COMPONENT, AdapterTensors, LayerNames, Updates
from sglang.multimodal_gen.runtime.pipelines_core.original_weights import OriginalWeights

NUM_SLOTS = 8
"""Slots at first; a batch with more adapters gets more."""
ALL = "all"
"""The target of an adapter that changes every transformer, and text encoders where it has parts for them."""
_TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One that is loaded: this rank's updates, on the CPU, by component and layer. `digest` is of its values, and
    `changes_texts` says whether texts mean something else with it."""

    updates: Mapping[str, Mapping[str, LayerUpdate]]
    digest: str
    changes_texts: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class AdapterUse:
    """An adapter of a request, and how much it counts."""

    adapter: Adapter
    scale: float


@dataclass
class Adapters:
    """All of a pipeline. `transformers`: the modules that rows of a forward go through, by component; `encoders` those
    that read texts, with the rows that each of them follows.

    `held_bytes` are those of the slots on the device. What is loaded is known by an id; a request holds the adapters
    themselves, so that it ends with what it began with. `park` sends back weights that are on the device for a while:
    what is merged into those would be gone with them.
    """

    transformers: Mapping[str, nn.Module]
    encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    loaded: dict[str, Adapter] = field(default_factory=dict)
    merged: tuple[AdapterUse, ...] = ()
    held_bytes: int = 0
    park: Callable[[], None] = lambda: None
    _slots: dict[int, Adapter] = field(default_factory=dict)
    _originals: OriginalWeights = field(default_factory=OriginalWeights)
    _names: dict[str, LayerNames] = field(default_factory=dict)
    _text_rows: AdapterRows = field(default_factory=AdapterRows)

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], *, park: Callable[[], None] = lambda: None) -> Adapters:
        """Of those components that follow adapters."""
        found = {n: m for n, m in modules.items() if isinstance(getattr(m, "adapters", None), AdapterRows)}
        texts = {n: m for n, m in modules.items() if n.startswith(_TEXT_ENCODER)}
        return cls(found, texts if found else {}, park=park)

    @property
    def components(self) -> dict[str, nn.Module]:
        """All that an adapter may change."""
        return {**self.transformers, **self.encoders}

    # -- loading --

    def read(self, source: LoraSource, target: str = ALL) -> Adapter:
        """What the source says, ready for this rank; nothing is kept yet. Any thread may call it.

        Raises: LoraNotSupported, or InvalidLora for what cannot be used.
        """
        if not self.transformers:
            raise LoraNotSupported("this model is run by a library; adapters are for the models with native pipelines")
        if target != ALL and target not in self.components:
            raise InvalidLora(f"the target {target} is none of {', '.join([ALL, *self.components])}")
        names = self._names or {name: LayerNames(module) for name, module in self.components.items()}
        self._names = names
        tensors = read_adapter(source, names)
        updates = self._aimed(tensors, target)
        return Adapter(
            updates={component: self._of_rank(component, own) for component, own in updates.items()},
            digest=_digest(updates),
            changes_texts=any(component in self.encoders for component in updates),
            notes=tensors.notes,
        )

    def load(self, adapter_id: str, source: LoraSource, target: str = ALL) -> Adapter:
        """Read and keep it."""
        self.loaded[adapter_id] = adapter = self.read(source, target)
        return adapter

    def _aimed(self, tensors: AdapterTensors, target: str) -> dict[str, Updates]:
        """By the components that the file names, else by those that the target says."""
        texts = {name: own for name, own in tensors.updates.items() if name in self.encoders}
        if target in self.encoders:
            if target not in texts:
                raise InvalidLora(f"it changes nothing of the target {target}")
            return {target: texts[target]}
        others = {name: own for name, own in tensors.updates.items() if name not in texts}
        if set(others) <= {MAIN_COMPONENT}:
            aimed = self.transformers if target == ALL else [target]
            found = {name: own for own in others.values() for name in aimed}
            return {**found, **texts} if target == ALL else found
        if target != ALL:
            raise InvalidLora(f"the file itself says which transformer it changes; the target {target} says another")
        return dict(tensors.updates)

    def _of_rank(self, component: str, updates: Updates) -> dict[str, LayerUpdate]:
        found = {}
        for name, update in updates.items():
            layer = self._layer(component, name)
            down, up, bias = update.down.float(), update.scaled_up(), update.bias
            found[name] = update_of(layer, down, up, None if bias is None else bias.float())
        return found

    def forget(self, adapter_id: str) -> None:
        """No new request has it; idempotent. With the last one go the copies of what was merged into."""
        self.loaded.pop(adapter_id, None)
        if not self.loaded and not self.merged:
            self._originals.clear()

    def find(self, uses: Iterable[LoraUse], ids: Mapping[str, str] | None = None) -> tuple[AdapterUse, ...]:
        """Those that a request names; `ids` says under which id a nickname is loaded, by itself where it says nothing.

        Raises: UnknownLora.
        """
        found = []
        for use in uses:
            adapter = self.loaded.get((ids or {}).get(use.name, use.name))
            if adapter is None:
                raise UnknownLora(use.name, sorted(self.loaded) if ids is None else sorted(ids))
            found.append(AdapterUse(adapter, use.scale))
        return tuple(found)

    # -- beside the weights --

    @contextmanager
    def using(self, transformer: nn.Module, rows: Sequence[Sequence[AdapterUse]]) -> Iterator[None]:
        """Run this transformer inside the `with` block for a batch whose rows have these adapters."""
        if not any(rows):
            yield
            return
        slots = self._placed({id(use.adapter): use.adapter for uses in rows for use in uses})
        uses = [[SlotUse(slots[id(use.adapter)], use.scale) for use in own] for own in rows]
        followed: AdapterRows = transformer.adapters  # type: ignore[assignment]
        with followed.using(uses, compute_device(transformer)):
            yield

    @contextmanager
    def encoding(self, uses: Sequence[AdapterUse]) -> Iterator[None]:
        """Texts that are encoded inside the `with` block are read with these adapters."""
        own = [use for use in uses if use.adapter.changes_texts]
        if not own:
            yield
            return
        slots = self._placed({id(use.adapter): use.adapter for use in own})
        row = [SlotUse(slots[id(use.adapter)], use.scale) for use in own]
        # One row that stands for as many as there are: encoders may read equal texts once.
        with self._text_rows.using([row], compute_device(next(iter(self.encoders.values())))):
            yield

    def text_key(self, uses: Sequence[AdapterUse]) -> tuple[tuple[str, float], ...]:
        """What a text's meaning depends on, beside the text."""
        return tuple((use.adapter.digest, use.scale) for use in (*self.merged, *uses) if use.adapter.changes_texts)

    def _placed(self, wanted: Mapping[int, Adapter]) -> dict[int, int]:
        """The slot of each, after those that were used longest ago made room."""
        held = {id(adapter): slot for slot, adapter in self._slots.items()}
        free = [slot for slot in range(EMPTY_SLOT + 1, NUM_SLOTS + 1) if slot not in self._slots]
        idle = [slot for slot, adapter in self._slots.items() if id(adapter) not in wanted]
        for key, adapter in wanted.items():
            if key not in held:
                slot = (free or idle or [len(self._slots) + 1]).pop(0)
                self._fill(slot, adapter)
                held[key] = slot
            # Last in the order is what was used last.
            self._slots[held[key]] = self._slots.pop(held[key])
        return held

    def _fill(self, slot: int, adapter: Adapter) -> None:
        before = self._slots.pop(slot, None)
        for component in self.components:
            old = {} if before is None else before.updates.get(component, {})
            new = adapter.updates.get(component, {})
            for name in old.keys() | new.keys():
                self._table(component, name).put(slot, new.get(name))
        self._slots[slot] = adapter
        self.held_bytes = self._table_bytes()

    def _table(self, component: str, name: str) -> SlotTable:
        layer = self._layer(component, name)
        if layer.adapters is None:
            module = self.components[component]
            rows = self._text_rows if component in self.encoders else module.adapters
            assert isinstance(rows, AdapterRows), "it follows adapters"
            layer.adapters = SlotTable(layer, rows, NUM_SLOTS + 1, device=compute_device(module))
        return layer.adapters

    def _layer(self, component: str, name: str) -> AdaptableLinear:
        layer = self.components[component].get_submodule(name)
        if type(layer) is nn.Linear:  # of a library; it becomes the same with room for adapters
            layer.__class__ = AdaptableLinear
        assert isinstance(layer, AdaptableLinear), "names are of such layers"
        return layer

    def _table_bytes(self) -> int:
        return sum(
            layer.adapters.nbytes
            for module in self.components.values()
            for layer in module.modules()
            if isinstance(layer, AdaptableLinear) and layer.adapters is not None
        )

    # -- in the weights --

    def merge(self, uses: Sequence[AdapterUse]) -> None:
        """Make these part of the weights, and no others; computed in fp32 from the weights of the checkpoint.

        Raises, with the weights as they were: InvalidLora for a bias where the layer has none, MergeNotPossible for a
            layer whose weights are quantised.
        """
        changed = self._changed_by(uses)
        try:
            self._apply(changed)
        except BaseException:
            self._apply(self._changed_by(self.merged))
            raise
        self.merged = tuple(uses)
        if not uses:
            self.unmerge()

    def _changed_by(self, uses: Sequence[AdapterUse]) -> dict[AdaptableLinear, list[tuple[LayerUpdate, float]]]:
        changed: dict[AdaptableLinear, list[tuple[LayerUpdate, float]]] = {}
        for use in uses:
            for component, updates in use.adapter.updates.items():
                for name, update in updates.items():
                    layer = self._layer(component, name)
                    if layer.quantization is not None:
                        raise MergeNotPossible(name)
                    if update.bias is not None and layer.bias is None:
                        raise InvalidLora(f"it adds to the outputs of {name}, which has no bias to merge that into")
                    changed.setdefault(layer, []).append((update, use.scale))
        return changed

    def _apply(self, changed: Mapping[AdaptableLinear, Sequence[tuple[LayerUpdate, float]]]) -> None:
        """These layers hold the checkpoint's weights and what is added to them, all others the checkpoint's."""
        self.park()
        self._originals.restore(but=changed)
        self._originals.keep(changed)
        for layer, updates in changed.items():
            _merge_into(layer, self._originals, updates)

    def merge_ids(self, uses: Iterable[tuple[str, float]]) -> None:
        """`merge` of what is loaded under these ids; those that are merged already need no copies."""
        chosen = [AdapterUse(self.loaded[adapter_id], scale) for adapter_id, scale in uses]
        if [(id(use.adapter), use.scale) for use in chosen] != [(id(use.adapter), use.scale) for use in self.merged]:
            self.merge(chosen)

    def unmerge(self) -> None:
        """The weights of the checkpoint again, bit for bit."""
        self.park()
        self._originals.restore()
        self.merged = ()


def _merge_into(
    layer: AdaptableLinear, originals: OriginalWeights, updates: Sequence[tuple[LayerUpdate, float]]
) -> None:
    device = compute_device(layer)
    # First to the device: what changes place and dtype at once becomes wider on the host.
    weight, bias = originals.of(layer)
    weight = weight.to(device, non_blocking=True).to(torch.float32, copy=True)
    wide_bias = None if bias is None else bias.to(device).to(torch.float32, copy=True)
    for update, scale in updates:
        down, up = (part.to(device, torch.float32) for part in (update.down, update.up))
        weight.addmm_(up.t(), down, alpha=scale)
        if update.bias is not None and wide_bias is not None:
            wide_bias.add_(update.bias.to(device, torch.float32), alpha=scale)
    # In place: several layers' weights may be views of one tensor.
    layer.weight.data.copy_(weight)
    if wide_bias is not None:
        layer.bias.data.copy_(wide_bias)


def _digest(updates: Mapping[str, Updates]) -> str:
    found = hashlib.sha256()
    for component, own in sorted(updates.items()):
        for name, update in sorted(own.items()):
            found.update(f"{component}.{name}:{update.factor!r}".encode())
            for part in (update.down, update.up, update.bias):
                if part is not None:
                    found.update(part.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
