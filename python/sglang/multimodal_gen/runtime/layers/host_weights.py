"""Weights that lie on the host and come to the device for the time that their layers run.

What runs a while after another is *streamed*: the blocks of a transformer take turns in a few slots of the device, and
while one computes, the next are on their way. What runs at once is *moved*: whole components take turns in one room.
Outside its turn a layer's tensors are those on the host, so that whoever looks at them finds the true values.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

_ALIGNMENT = 256
"""Of tensors in a slot, as the caching allocator gives them out."""
_PAGE_BYTES = 4096


class TensorHolder(Protocol):
    """What keeps tensors for a module and is none itself, such as a product that several layers share."""

    def held_tensors(self) -> Iterator[Tensor]:
        """The tensors whose place must change with the layers'."""
        ...


def compute_device(module: nn.Module) -> torch.device:
    """Where a module's forward runs, wherever its weights are at the moment."""
    found: torch.device | None = getattr(module, "runs_on", None)
    return next(module.parameters()).device if found is None else found


def has_its_weights(module: nn.Module) -> bool:
    """Whether any of its layers can run by itself: all weights are where they compute, or come when a layer runs."""
    if getattr(module, "comes_whole", False):
        return True
    device = compute_device(module)
    return all(weight.device == device for weight in module.parameters())


def held_tensors(layers: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters, buffers and what else these layers hold themselves, each once."""
    found: dict[int, Tensor] = {}
    for layer in layers:
        own = itertools.chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
        holders = (value for value in vars(layer).values() if hasattr(value, "held_tensors"))
        for tensor in itertools.chain(own, *(holder.held_tensors() for holder in holders)):
            found[id(tensor)] = tensor
    return list(found.values())


def packed_bytes(tensors: Sequence[Tensor]) -> int:
    """What they take side by side."""
    return _laid_out(tensors)[2]


def place_on(device: torch.device, tensors: Sequence[Tensor]) -> None:
    """Bring tensors of the host to the device for good; those that share memory go on to do so."""
    weights = HostWeights(tensors, keeps_files=True)
    with torch.inference_mode(False):
        buffer = torch.empty(weights.num_bytes, dtype=torch.uint8, device=device)
    weights.copy_to(buffer)
    weights.place(weights.views(buffer))


@dataclass(frozen=True)
class Span:
    """Neighbouring bytes of one storage that go to `offset` of a slot."""

    source: Tensor
    offset: int


class HostWeights:
    """Tensors of some layers on the host, to be packed side by side into a buffer of `num_bytes` on the device.

    Tensors that share memory, such as the parts of one product, share it in the buffer too. With `keeps_files` they
    stay where they are, on the host or in a mapped file; else they are copied into one piece of the host's memory,
    `pin`ned on request.
    """

    def __init__(self, tensors: Sequence[Tensor], *, keeps_files: bool = False, pin: bool = False) -> None:
        self.tensors = list(tensors)
        spans, self._places, self.num_bytes = _laid_out(self.tensors)
        if keeps_files:
            self.spans = spans
            self._masters = [tensor.data for tensor in self.tensors]
            return
        packed = host_memory(self.num_bytes, pin=pin)
        for span in spans:
            packed[span.offset : span.offset + len(span.source)].copy_(span.source)
        self.spans = [Span(packed, 0)]
        self._masters = self.views(packed)
        self.park()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as they lie in a buffer, uint8 [at least num_bytes]."""
        with torch.inference_mode(False):
            return [place(buffer) for place in self._places]

    def copy_to(self, buffer: Tensor) -> None:
        """Into a buffer, without waiting where the host's memory is pinned."""
        for span in self.spans:
            buffer[span.offset : span.offset + len(span.source)].copy_(span.source, non_blocking=True)

    def parts(self, most: int) -> Iterator[tuple[int, list[Span]]]:
        """The spans in groups that take at most so many bytes of the buffer, and where each group begins there."""
        begin, group = 0, list[Span]()
        for span in self.spans:
            for start in range(0, len(span.source), most):
                piece = Span(span.source[start : start + most], span.offset + start)
                if group and piece.offset + len(piece.source) - begin > most:
                    yield begin, group
                    group = []
                begin = begin if group else piece.offset
                group.append(piece)
        if group:
            yield begin, group

    def place(self, views: Sequence[Tensor]) -> None:
        """The layers compute with these from now on."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def park(self) -> None:
        """The layers' tensors are those on the host."""
        self.place(self._masters)


def _laid_out(tensors: Sequence[Tensor]) -> tuple[list[Span], list[Callable[[Tensor], Tensor]], int]:
    """Bytes of the tensors' storages that they cover, how each is found in a buffer, and the buffer's size."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    spans, found, offset = [], {}, 0
    for members in by_storage.values():
        for start, stop, inside in _merged(members):
            source = torch.empty(0, dtype=torch.uint8, device=members[0].device)
            source.set_(members[0].untyped_storage(), start, (stop - start,), (1,))
            spans.append(Span(source, offset))
            for tensor in inside:
                found[id(tensor)] = _place_of(tensor, offset + _first_byte(tensor) - start)
            offset += -(-(stop - start) // _ALIGNMENT) * _ALIGNMENT
    return spans, [found[id(tensor)] for tensor in tensors], offset


def _merged(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """First byte, byte after the last, and members of each group of tensors that overlap."""
    ordered = sorted(tensors, key=_first_byte)
    start = stop = _first_byte(ordered[0])
    inside: list[Tensor] = []
    for tensor in ordered:
        if inside and _first_byte(tensor) >= stop:
            yield start, stop, inside
            start, inside = _first_byte(tensor), []
        stop = max(stop, _first_byte(tensor) + _extent(tensor))
        inside.append(tensor)
    yield start, stop, inside


def _first_byte(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _extent(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _place_of(tensor: Tensor, offset: int) -> Callable[[Tensor], Tensor]:
    shape, stride, dtype, extent = tuple(tensor.shape), tensor.stride(), tensor.dtype, _extent(tensor)

    def place(buffer: Tensor) -> Tensor:
        part = buffer[offset : offset + extent].view(dtype)
        return part.as_strided(shape, stride, part.storage_offset())

    return place


def host_memory(num_bytes: int, *, pin: bool) -> Tensor:
    """Bytes of the host; `pin`: which a GPU reads by itself. Not from torch's pinned allocator, which rounds up to a
    power of two, and in pages of their own, since no page can be registered twice.

    Raises: OSError for too little memory, RuntimeError for more than may be pinned.
    """
    if not pin or not num_bytes:
        return torch.empty(num_bytes, dtype=torch.uint8)
    with torch.inference_mode(False):
        return torch.frombuffer(_PinnedPages(num_bytes), dtype=torch.uint8)


def _forget_error() -> None:
    """The runtime remembers a failed call, and torch would blame the next kernel for it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


class _PinnedPages(mmap.mmap):
    """Pages of the host that a GPU reads by itself, for as long as a tensor lies in them."""

    def __new__(cls, num_bytes: int) -> Self:
        pages = super().__new__(cls, -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them has small ones
                pages.madvise(mmap.MADV_HUGEPAGE)
        numbers = torch.frombuffer(pages, dtype=torch.uint8)
        # One in each page, by several threads: registering would have one thread get the pages from the system.
        numbers[::_PAGE_BYTES].fill_(0)
        pages.cudart = torch.cuda.cudart()
        pages.address = numbers.data_ptr()
        try:
            torch.cuda.check_error(pages.cudart.cudaHostRegister(pages.address, num_bytes, 0))
        except RuntimeError:
            _forget_error()
            raise
        pages.registered = True
        return pages

    cudart: Any
    address: int
    registered = False

    def __del__(self) -> None:
        # Before they are unmapped: the next pages may get their address, and none can be registered twice.
        if self.registered and not sys.is_finalizing():
            torch.cuda.synchronize()
            self.cudart.cudaHostUnregister(self.address)


class Link(Protocol):
    """How weights get to the device. What `send` and `mark` return is only handed back."""

    def send(self, weights: HostWeights, buffer: Tensor, after: Any) -> Any:
        """Begin to copy into the buffer as soon as what was `mark`ed as `after` is done; returns what to wait for."""
        ...

    def wait(self, sent: Any) -> None:
        """What the device computes from now on begins when the copy is there."""
        ...

    def mark(self) -> Any:
        """The moment at which all is done that the device was given until now."""
        ...


class HostLink:
    """On a CPU: there is one memory, and everything is done at once."""

    def send(self, weights: HostWeights, buffer: Tensor, after: Any) -> Any:
        """See Link."""
        weights.copy_to(buffer)

    def wait(self, sent: Any) -> None:
        """See Link."""

    def mark(self) -> Any:
        """See Link."""


class CudaLink:
    """From pinned memory, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, weights: HostWeights, buffer: Tensor, after: Any) -> Any:
        """See Link."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            weights.copy_to(buffer)
            return self._stream.record_event()

    def wait(self, sent: Any) -> None:
        """See Link."""
        torch.cuda.current_stream(self._device).wait_event(sent)

    def mark(self) -> Any:
        """See Link."""
        return torch.cuda.current_stream(self._device).record_event()


@dataclass
class _Staging:
    memory: Tensor
    sent: Any = None


class StagedLink:
    """From memory that is not pinned, such as mapped files: a thread brings it into pinned memory piece by piece."""

    def __init__(self, device: torch.device, *, staging_bytes: int = 128 << 20) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._staging = [_Staging(host_memory(staging_bytes, pin=True)) for _ in range(2)]

    def send(self, weights: HostWeights, buffer: Tensor, after: Any) -> Future[Any]:
        """See Link."""
        return self._thread.submit(self._copy, weights, buffer, after)

    @torch.inference_mode()  # which is each thread's own: without it, tensors made under it could not be written
    def _copy(self, weights: HostWeights, buffer: Tensor, after: Any) -> Any:
        self._stream.wait_event(after)
        for begin, spans in weights.parts(len(self._staging[0].memory)):
            staging = self._staging[0]
            self._staging.reverse()
            if staging.sent is not None:
                staging.sent.synchronize()
            for span in spans:
                start = span.offset - begin
                staging.memory[start : start + len(span.source)].copy_(span.source)
            size = spans[-1].offset + len(spans[-1].source) - begin
            with torch.cuda.stream(self._stream):
                buffer[begin : begin + size].copy_(staging.memory[:size], non_blocking=True)
                staging.sent = self._stream.record_event()
        return self._stream.record_event()

    def wait(self, sent: Future[Any]) -> None:
        """See Link."""
        torch.cuda.current_stream(self._device).wait_event(sent.result())

    def mark(self) -> Any:
        """See Link."""
        return torch.cuda.current_stream(self._device).record_event()


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    free: Any
    """When the device has done with what was in it."""
    holds: HostWeights | None = None
    sent: Any = None
    seen: dict[HostWeights, list[Tensor]] = field(default_factory=dict)

    def views(self, weights: HostWeights) -> list[Tensor]:
        if weights not in self.seen:
            self.seen[weights] = weights.views(self.buffer)
        return self.seen[weights]


class SlotPool:
    """Slots of equal size on the device, through which layers come that run one after another, over and over.

    All layers of a process share them, since one forward runs at a time. What runs next is known from the last time.
    """

    def __init__(self, link: Link, device: torch.device, *, num_slots: int, slot_bytes: int) -> None:
        self.link = link
        # Tensors made under inference mode could not be weights outside of it.
        with torch.inference_mode(False):
            buffers = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self._slots = [_Slot(buffer, link.mark()) for buffer in buffers]
        self._next: dict[HostWeights, HostWeights] = {}
        self._last: HostWeights | None = None

    def follow(self, layers: Sequence[nn.Module], weights: Sequence[HostWeights]) -> None:
        """Let these layers come whenever they run, at first in this order."""
        for index, layer in enumerate(layers):
            own = weights[index]
            self._next[own] = weights[(index + 1) % len(weights)]
            layer.register_forward_pre_hook(lambda *_, own=own: self.enter(own))
            # Also when it fails: until then its slot was in use.
            layer.register_forward_hook(lambda *_, own=own: self.leave(own), always_call=True)

    def enter(self, weights: HostWeights) -> None:
        """The layers compute on the device from now on."""
        slot = self._slot_of(weights) or self._fetch(weights, keep=())
        assert slot is not None, "there is a slot"
        self.link.wait(slot.sent)
        weights.place(slot.views(weights))
        if self._last is not None:
            self._next[self._last] = weights
        self._last = weights
        self._prefetch(weights)

    def leave(self, weights: HostWeights) -> None:
        """They have been given all that they compute for now."""
        weights.park()
        slot = self._slot_of(weights)
        if slot is None:
            return  # it failed before it got there
        slot.free = self.link.mark()
        # What was used last is overwritten last.
        self._slots.remove(slot)
        self._slots.append(slot)

    def _prefetch(self, weights: HostWeights) -> None:
        """Send those that run next, as far as there are slots that none of them needs."""
        coming = [weights]
        while len(coming) < len(self._slots) and (after := self._next.get(coming[-1])) not in coming and after:
            coming.append(after)
        for each in coming[1:]:
            if self._slot_of(each) is None and self._fetch(each, keep=coming) is None:
                return

    def _slot_of(self, weights: HostWeights) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds is weights), None)

    def _fetch(self, weights: HostWeights, *, keep: Sequence[HostWeights]) -> _Slot | None:
        slot = next((slot for slot in self._slots if not any(slot.holds is each for each in keep)), None)
        if slot is not None:
            slot.holds = weights
            slot.sent = self.link.send(weights, slot.buffer, slot.free)
        return slot


class MovingRoom:
    """Room on the device for one component at a time, of those that take turns in it."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link = link
        self.device = device
        self._present: HostWeights | None = None

    @property
    def held_bytes(self) -> int:
        """What is on the device now."""
        return 0 if self._present is None else self._present.num_bytes

    def follow(self, layers: Iterable[nn.Module], weights: HostWeights) -> None:
        """Let the weights of a component come whenever any of these layers runs."""

        def enter(*_: Any) -> None:
            if self._present is not weights:
                self.enter(weights)

        for layer in layers:
            layer.register_forward_pre_hook(enter)

    def enter(self, weights: HostWeights) -> None:
        """In place of what was there."""
        self.clear()
        with torch.inference_mode(False):
            buffer = torch.empty(weights.num_bytes, dtype=torch.uint8, device=self.device)
        self.link.wait(self.link.send(weights, buffer, self.link.mark()))
        weights.place(weights.views(buffer))
        self._present = weights

    def clear(self) -> None:
        """Nothing is on the device."""
        if self._present is not None:
            self._present.park()
            self._present = None
