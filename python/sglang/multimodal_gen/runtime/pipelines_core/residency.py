"""Where a worker's weights are: the plan for its GPU, carried out on the components that were loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.cost_model import H100, HARDWARE, Hardware
from sglang.multimodal_gen.configs.memory_args import ALL_RESIDENT, MemoryArgs, Residency, share_of
from sglang.multimodal_gen.configs.memory_plan import GIB, TRANSFORMERS, MemoryPlan, MemoryWish, plan_memory, spread
from sglang.multimodal_gen.configs.model_outline import outline_of
from sglang.multimodal_gen.configs.request_plan import Lane
from sglang.multimodal_gen.errors import InvalidValue, UnsupportedModel
from sglang.multimodal_gen.registry import ResolvedModel
from sglang.multimodal_gen.runtime.distributed.collectives import least
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext
from sglang.multimodal_gen.runtime.layers.host_weights import (
    CudaLink,
    HostLink,
    HostWeights,
    Link,
    MovingRoom,
    SlotPool,
    StagedLink,
    held_tensors,
    packed_bytes,
    place_on,
)
from sglang.multimodal_gen.runtime.pipelines_core.memory import free_bytes
from sglang.multimodal_gen.runtime.pipelines_core.placement import Placement

_AUTOENCODER = "vae"
# Of the host's free memory, what weights may be copied into; else they stay in the files.
_HOST_SHARE = 0.85


def plan_for(
    resolved: ResolvedModel,
    args: MemoryArgs,
    placement: Placement,
    *,
    parallel: ParallelContext,
    encoder_parallel: str = "auto",
    quantized: bool = False,
) -> MemoryPlan | None:
    """Where the model's weights shall be; None where all are simply loaded.

    Raises: InvalidValue for options that this model or GPU cannot follow.
    """
    device = placement.device
    if device.type == "cpu" and args == ALL_RESIDENT:
        return None
    try:
        outline = None if resolved.is_fallback else outline_of(resolved)
    except UnsupportedModel:
        outline = None
    if outline is None:
        refuse_wishes(args, resolved.name)
        return None
    free = least(free_bytes(device), parallel.world)
    limit = args.gpu_memory_limit
    wish = MemoryWish(
        gpu_bytes=free if limit is None else min(free, limit * GIB),
        hardware=_hardware(device),
        args=args,
        shape=parallel.shape,
        element_bytes=placement.dtype.itemsize,
        encoder_parallel=encoder_parallel,
        quantized=quantized,
    )
    return plan_memory(outline, outline.work(), wish)


def refuse_wishes(args: MemoryArgs, name: str) -> None:
    """For a model of which too little is known to move its weights. Raises InvalidValue when that is asked for."""
    plain = MemoryArgs(performance_mode=args.performance_mode, gpu_memory_limit=args.gpu_memory_limit)
    for option, value in vars(args).items():
        if value != getattr(plain, option):
            raise InvalidValue(option, value, f"nothing for {name}, whose weights all stay on the device")
    if args.performance_mode == "memory":
        raise InvalidValue(
            "performance_mode", "memory", f"auto, speed or manual for {name}, whose weights all stay on the device"
        )


def _hardware(device: torch.device) -> Hardware:
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((hardware for key, hardware in HARDWARE.items() if key in name), H100)


def loads_on_host(mode: Residency, component: str) -> bool:
    """Whether a component is loaded there at first. An autoencoder settles its weights by the device it runs on."""
    return mode != "resident" and component != _AUTOENCODER


@dataclass(frozen=True)
class StreamedBlocks:
    """Those of a component that come one after the other, and the tensors of each that nothing else holds."""

    component: str
    layers: list[nn.Module]
    tensors: list[list[Tensor]]
    outside: list[Tensor]

    @classmethod
    def of(cls, component: str, module: nn.Module) -> StreamedBlocks:
        layers = [block for blocks in _block_lists(module) for block in blocks]
        inside = {id(layer) for block in layers for layer in block.modules()}
        outside = held_tensors(layer for layer in module.modules() if id(layer) not in inside)
        tensors = [held_tensors(block.modules()) for block in layers]
        count = Counter(id(tensor) for own in (*tensors, outside) for tensor in own)
        shared = {id(tensor): tensor for own in tensors for tensor in own if count[id(tensor)] > 1}
        alone = [[tensor for tensor in own if count[id(tensor)] == 1] for own in tensors]
        return cls(component, layers, alone, list({id(each): each for each in (*outside, *shared.values())}.values()))


def _block_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks that are in no other such list."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in _block_lists(child)]


@dataclass
class WeightRoom:
    """What weights take on the device beside those that stay there: bytes of the largest component that comes when a
    step is denoised, and of the largest that comes for anything else."""

    room: MovingRoom | None = None
    denoising_bytes: int = 0
    other_bytes: int = 0

    @property
    def present_bytes(self) -> int:
        """What is there now, and can be sent back."""
        return 0 if self.room is None else self.room.held_bytes

    def bytes_for(self, lane: Lane) -> int:
        """What comes to the device for a unit of this lane."""
        return self.denoising_bytes if lane == "denoise" else max(self.denoising_bytes, self.other_bytes)

    def begin(self, lane: Lane) -> None:
        """A step needs the device's memory more than what was encoded or decoded with before."""
        if lane == "denoise" and not self.denoising_bytes:
            self.clear()

    def clear(self) -> None:
        """Send back what can be fetched again."""
        if self.room is not None:
            self.room.clear()


class _Settling:
    """One plan being carried out."""

    def __init__(self, modules: Mapping[str, nn.Module], plan: MemoryPlan, args: MemoryArgs, device: torch.device):
        self.plan, self.args, self.device = plan, args, device
        self.modules = modules
        self.streamed = [StreamedBlocks.of(name, modules[name]) for name in self._named("layerwise-offload")]
        self.moved = {name: held_tensors(modules[name].modules()) for name in self._named("component-offload")}
        leaving = [own for blocks in self.streamed for own in blocks.tensors] + list(self.moved.values())
        needed = sum(map(packed_bytes, leaving))
        self.keeps_files = not args.pin_cpu_memory or needed > _HOST_SHARE * free_bytes(torch.device("cpu"))
        self.link = self._link()

    def _named(self, mode: Residency) -> list[str]:
        return [name for name, own in self.plan.modes.items() if own == mode and name in self.modules]

    def _link(self) -> Link:
        if self.device.type != "cuda":
            return HostLink()
        return StagedLink(self.device) if self.keeps_files else CudaLink(self.device)

    def run(self) -> WeightRoom:
        """Nothing of the components' forwards has run."""
        self._stream()
        found = WeightRoom()
        for name, tensors in self.moved.items():
            self._move(found, name, tensors, self.modules[name].modules())
        for blocks in self.streamed:
            if blocks.component in TRANSFORMERS:
                place_on(self.device, blocks.outside)
            else:  # the table of words alone is as large as several blocks
                inside = {id(layer) for block in blocks.layers for layer in block.modules()}
                layers = [layer for layer in self.modules[blocks.component].modules() if id(layer) not in inside]
                self._move(found, blocks.component, blocks.outside, layers)
        for name in (*self.moved, *(blocks.component for blocks in self.streamed)):
            for layer in self.modules[name].modules():
                layer.runs_on = self.device  # type: ignore[assignment]
        return found

    def _move(self, found: WeightRoom, component: str, tensors: list[Tensor], layers: Iterable[nn.Module]) -> None:
        if found.room is None:
            found.room = MovingRoom(self.link, self.device)
        weights = self._on_host(tensors)
        found.room.follow(layers, weights)
        if component in TRANSFORMERS:
            found.denoising_bytes = max(found.denoising_bytes, weights.num_bytes)
        else:
            found.other_bytes = max(found.other_bytes, weights.num_bytes)

    def _on_host(self, tensors: list[Tensor]) -> HostWeights:
        on_host = all(tensor.device.type == "cpu" for tensor in tensors)
        pin = self.device.type == "cuda" and not self.keeps_files
        return HostWeights(tensors, keeps_files=self.keeps_files and on_host, pin=pin)

    def _stream(self) -> None:
        sizes = {blocks.component: list(map(packed_bytes, blocks.tensors)) for blocks in self.streamed}
        largest = max((size for own in sizes.values() for size in own), default=0)
        kept = self._kept(sizes, num_bytes=self.plan.num_slots * largest)
        leaving = {
            blocks.component: [n for n in range(len(blocks.layers)) if n not in kept[blocks.component]]
            for blocks in self.streamed
        }
        for blocks in self.streamed:
            place_on(self.device, [each for n in kept[blocks.component] for each in blocks.tensors[n]])
        number = min(self.plan.num_slots, sum(map(len, leaving.values())))
        if not number:
            return
        slot_bytes = max(sizes[name][n] for name, own in leaving.items() for n in own)
        pool = SlotPool(self.link, self.device, num_slots=number, slot_bytes=slot_bytes)
        for blocks in self.streamed:
            chosen = leaving[blocks.component]
            pool.follow([blocks.layers[n] for n in chosen], [self._on_host(blocks.tensors[n]) for n in chosen])

    def _kept(self, sizes: Mapping[str, list[int]], *, num_bytes: int) -> dict[str, list[int]]:
        """Which blocks of each component stay on the device, beside slots of so many bytes."""
        transformers = [name for name in sizes if name in TRANSFORMERS]
        kept: dict[str, list[int]] = {name: [] for name in sizes}
        policy, wanted = self.args.dit_layerwise_residency_policy, self.plan.resident_blocks
        if wanted is None and self.args.performance_mode == "memory":
            return kept
        resident = [held_tensors(self.modules[name].modules()) for name in self._named("resident")]
        resident += [blocks.outside for blocks in self.streamed if blocks.component in TRANSFORMERS]
        moved = [tensors for name, tensors in self.moved.items() if name in TRANSFORMERS]
        # Components that are not there, as in a benchmark of one alone, have their place all the same.
        absent = [
            need.num_bytes
            for need in self.plan.components
            if need.name not in self.modules and self.plan.modes[need.name] == "resident"
        ]
        used = sum(absent) + sum(map(packed_bytes, resident)) + max(map(packed_bytes, moved), default=0) + num_bytes
        spare, total = self.plan.weight_bytes - used, sum(sum(sizes[name]) for name in transformers)
        for name in transformers:
            if wanted is not None:
                kept[name] = spread([1] * len(sizes[name]), share_of(wanted, len(sizes[name])), policy=policy)
            else:
                kept[name] = spread(sizes[name], max(0.0, spare) * sum(sizes[name]) / total, policy=policy)
        return kept


def settle_weights(
    modules: Mapping[str, nn.Module], plan: MemoryPlan | None, args: MemoryArgs, device: torch.device
) -> WeightRoom:
    """Let the weights of loaded components be where the plan says. Their modules then come and go by themselves."""
    return WeightRoom() if plan is None or not plan.offloads else _Settling(modules, plan, args, device).run()
