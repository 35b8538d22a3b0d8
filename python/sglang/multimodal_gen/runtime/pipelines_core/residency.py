"""Where a worker's weights are: the plan for its GPU, carried out on the components that were loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.cost_model import H100, HARDWARE, Hardware
from sglang.multimodal_gen.configs.memory_args import ALL_RESIDENT, MemoryArgs, Residency, share_of
from sglang.multimodal_gen.configs.memory_plan import (
    GIB,
    TRANSFORMERS,
    MemoryPlan,
    MemoryWish,
    plan_memory,
    size_of,
    spread,
)
from sglang.multimodal_gen.configs.model_outline import outline_of
from sglang.multimodal_gen.configs.request_plan import Lane
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
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
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

_AUTOENCODER = "vae"
# Of the host's free memory, what weights may be copied into; else they stay in the files.
_HOST_SHARE = 0.85


def plan_for(
    resolved: ResolvedModel,
    memory: MemoryArgs,
    execution: ExecutionArgs,
    placement: Placement,
    parallel: ParallelContext,
    sized: SamplingParams | None = None,
) -> MemoryPlan | None:
    """Where the model's weights shall be for requests of the size of `sized`, or of the model's own; None where all are
    simply loaded.

    Raises: InvalidValue for options that this model or GPU cannot follow.
    """
    device = placement.device
    if device.type == "cpu" and memory == ALL_RESIDENT:
        return None
    try:
        outline = None if resolved.is_fallback else outline_of(resolved)
    except UnsupportedModel:
        outline = None
    if outline is None:
        refuse_wishes(memory, resolved.name)
        return None
    free = least(free_bytes(device), parallel.world)
    limit = memory.gpu_memory_limit
    wish = MemoryWish(
        gpu_bytes=free if limit is None else min(free, limit * GIB),
        hardware=_hardware(device),
        args=memory,
        shape=parallel.shape,
        element_bytes=placement.dtype.itemsize,
        encoder_parallel=execution.encoder_parallel,
        quantized=execution.quantization is not None,
        size=size_of(sized, outline),
    )
    return plan_memory(outline, outline.work(sized), wish)


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


def components_on_host(plan: MemoryPlan | None) -> frozenset[str]:
    """Those that are loaded there at first. An autoencoder settles its weights by the device that it runs on."""
    modes = {} if plan is None else plan.modes
    return frozenset(name for name, mode in modes.items() if mode != "resident" and name != _AUTOENCODER)


@dataclass(frozen=True)
class StreamedBlocks:
    """Those of a component that come one after the other, the tensors of each that nothing else holds, and their bytes;
    the layers around them, and all other tensors."""

    component: str
    layers: list[nn.Module]
    tensors: list[list[Tensor]]
    sizes: list[int]
    around: list[nn.Module]
    outside: list[Tensor]

    @classmethod
    def of(cls, component: str, module: nn.Module) -> StreamedBlocks:
        layers = [block for blocks in _block_lists(module) for block in blocks]
        inside = {id(layer) for block in layers for layer in block.modules()}
        around = [layer for layer in module.modules() if id(layer) not in inside]
        outside = held_tensors(around)
        tensors = [held_tensors(block.modules()) for block in layers]
        count = Counter(id(tensor) for own in (*tensors, outside) for tensor in own)
        shared = {id(tensor): tensor for own in tensors for tensor in own if count[id(tensor)] > 1}
        alone = [[tensor for tensor in own if count[id(tensor)] == 1] for own in tensors]
        others = {id(each): each for each in (*outside, *shared.values())}
        return cls(component, layers, alone, list(map(packed_bytes, alone)), around, list(others.values()))


def _block_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks that are in no other such list."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in _block_lists(child)]


@dataclass
class WeightRoom:
    """What weights take on the device beside those that stay there: bytes of the largest component that comes when a
    step is denoised, and of the largest that comes for anything else. `kept_bytes`: of blocks that stay there though
    they could come as others do."""

    room: MovingRoom | None = None
    denoising_bytes: int = 0
    other_bytes: int = 0
    kept_bytes: int = 0

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
        needed = sum(sum(blocks.sizes) for blocks in self.streamed) + sum(map(packed_bytes, self.moved.values()))
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
        found = WeightRoom(kept_bytes=self._stream())
        for name, tensors in self.moved.items():
            self._move(found, name, tensors, self.modules[name].modules())
            self.modules[name].comes_whole = True  # type: ignore[assignment]
        for blocks in self.streamed:
            if blocks.component in TRANSFORMERS:
                place_on(self.device, blocks.outside)
            else:  # the table of words alone is as large as several blocks
                self._move(found, blocks.component, blocks.outside, blocks.around)
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

    def _stream(self) -> int:
        """Let blocks come; the bytes of those that stay."""
        leaving: list[tuple[StreamedBlocks, list[int]]] = []
        for blocks in self.streamed:
            kept = self._kept(blocks)
            place_on(self.device, [each for n in kept for each in blocks.tensors[n]])
            leaving.append((blocks, [n for n in range(len(blocks.layers)) if n not in kept]))
        sizes = [blocks.sizes[n] for blocks, chosen in leaving for n in chosen]
        kept_bytes = sum(sum(blocks.sizes) for blocks in self.streamed) - sum(sizes)
        if not sizes:
            return kept_bytes
        number = min(self.plan.num_slots, len(sizes))
        pool = SlotPool(self.link, self.device, num_slots=number, slot_bytes=max(sizes))
        for blocks, chosen in leaving:
            pool.follow([blocks.layers[n] for n in chosen], [self._on_host(blocks.tensors[n]) for n in chosen])
        return kept_bytes

    def _kept(self, blocks: StreamedBlocks) -> list[int]:
        """Those that stay on the device: so many as are asked for, or the part of their bytes that the plan has room
        for."""
        if blocks.component not in TRANSFORMERS:
            return []
        policy, asked = self.args.dit_layerwise_residency_policy, self.args.dit_layerwise_resident_layers
        if asked is not None:
            return spread([1] * len(blocks.layers), share_of(asked, len(blocks.layers)), policy=policy)
        return spread(blocks.sizes, self.plan.kept_share * sum(blocks.sizes), policy=policy)


def settle_weights(
    modules: Mapping[str, nn.Module], plan: MemoryPlan | None, args: MemoryArgs, device: torch.device
) -> WeightRoom:
    """Let the weights of loaded components be where the plan says. Their modules then come and go by themselves."""
    return WeightRoom() if plan is None or not plan.offloads else _Settling(modules, plan, args, device).run()
