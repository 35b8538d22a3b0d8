"""Tensors from files to the device by several threads, also those of one file.

On a CPU a tensor is the mapped file. To a GPU its bytes go through a few buffers that the GPU can read by itself:
threads fill them from the page cache while others are on their way, so no tensor ever lies in host memory, and what
there is besides the page cache is the buffers. The caller's thread sends them, and makes and converts the tensors: what
torch does in several threads at once has them wait for the interpreter's lock longer than for the files. All copies are
in one stream, the caller's: nothing else runs there while a model loads, and what is computed on a tensor next is in
order by itself.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sglang.multimodal_gen.errors import CorruptCheckpoint

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What the format's names of dtypes mean."""
_MOST_THREADS = 8
_BUFFERS_OF_A_THREAD = 3
"""One is filled while others wait for their turn and are on their way."""

Convert = Callable[[str, Tensor], Tensor]
"""What a tensor becomes, given its name and the tensor on the device."""


class StoredPlace(Protocol):
    """Where a tensor lies; `offset` counts bytes from the file's beginning, `dtype` is a name of the format."""

    @property
    def file(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def offset(self) -> int: ...


class Part(Protocol):
    """What of a tensor is read, and in which order."""

    @property
    def dim(self) -> int: ...

    def pieces(self) -> tuple[tuple[int, int], ...]:
        """Where each begins along `dim` of the whole tensor, and how long it is."""
        ...

    def cut(self, whole: Tensor) -> Tensor:
        """The pieces side by side, contiguous."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How many threads read, and what each of their buffers holds."""

    num_threads: int = field(default_factory=lambda: min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    buffer_bytes: int = 4 << 20


def read_tensors(
    places: Mapping[str, StoredPlace],
    convert: Convert,
    *,
    device: torch.device,
    parts: Mapping[str, Part] = MappingProxyType({}),
    reading: Reading | None = None,
    staged: bool | None = None,
) -> dict[str, Tensor]:
    """Each tensor, or the part of it that is named, on the device and passed through `convert`, in the order given.

    Of a part along the first dimension no other bytes are read. `staged`: through buffers, as to a GPU; None: to a GPU.

    Raises: CorruptCheckpoint when a file is not what its header says, or cannot be read. All threads have ended then.
    """
    reading = reading or Reading()
    for path in {place.file for place in places.values()}:
        _check(path)
    if not (device.type != "cpu" if staged is None else staged):
        return _mapped_tensors(places, convert, parts, device, reading.num_threads)
    with ExitStack() as files:
        opened = {path: files.enter_context(_Opened(path)) for path in {place.file for place in places.values()}}
        jobs = [
            _Job.of_file(name, place, opened[place.file], parts.get(name), device, reading.buffer_bytes)
            for name, place in places.items()
        ]
        return _StagedRead(jobs, convert, device, reading).run()


def send_tensors(
    tensors: Mapping[str, Tensor], convert: Convert, *, device: torch.device, reading: Reading | None = None
) -> dict[str, Tensor]:
    """Tensors in host memory, such as mapped files that a library opened, to the device in the same way."""
    reading = reading or Reading()
    jobs = [_Job.of_tensor(name, tensor, device, reading.buffer_bytes) for name, tensor in tensors.items()]
    return _StagedRead(jobs, convert, device, reading).run()


def _check(path: Path) -> None:
    """That the library which defines the format takes the file: it looks for gaps and overlaps."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{_shown(path)} is not a valid safetensors file: {error}") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{_shown(path)} cannot be read ({error})") from error


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


# --- mapped ---


def _mapped_tensors(
    places: Mapping[str, StoredPlace],
    convert: Convert,
    parts: Mapping[str, Part],
    device: torch.device,
    num_threads: int,
) -> dict[str, Tensor]:
    files = {path: _mapped_bytes(path) for path in {place.file for place in places.values()}}

    def tensor(name: str) -> Tensor:
        place = places[name]
        view, part = _view(files[place.file], place), parts.get(name)
        return convert(name, (view if part is None else part.cut(view)).to(device))

    with ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="load") as pool:
        return dict(zip(places, pool.map(tensor, places), strict=True))


def _mapped_bytes(path: Path) -> Tensor:
    """The file as bytes; who writes into them writes into a copy of his own."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _view(data: Tensor, place: StoredPlace) -> Tensor:
    dtype = DTYPES[place.dtype]
    own = data[place.offset : place.offset + math.prod(place.shape) * dtype.itemsize]
    if place.offset % dtype.itemsize:
        own = own.clone()  # the format does not promise alignment
    return own.view(dtype).view(place.shape)


# --- through buffers ---


class _Opened(AbstractContextManager["_Opened"]):
    """An open file, and on demand its mapping, for what is read with gaps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self._mapped: Tensor | None = None

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def mapped(self) -> Tensor:
        """All bytes."""
        if self._mapped is None:
            self._mapped = _mapped_bytes(self.path)
        return self._mapped

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from this byte on. Raises CorruptCheckpoint when the file ends before, or cannot be read."""
        while buffer:
            try:
                count = os.preadv(self._fd, [buffer], offset)
            except OSError as error:
                raise CorruptCheckpoint(f"{_shown(self.path)} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CorruptCheckpoint(f"{_shown(self.path)} became shorter while it was read; it is truncated")
            buffer, offset = buffer[count:], offset + count


class _Buffer:
    """Bytes in host memory; on a GPU's side pinned, so that it reads them while the host goes on. `bytes` are those of
    `data`, for who fills it without torch."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.data = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.bytes = self.data.numpy().data
        self._sent = torch.cuda.Event() if pinned else None

    def mark_sent(self, stream: torch.cuda.Stream | None) -> None:
        """What was sent is in the stream."""
        if self._sent is not None:
            self._sent.record(stream)

    def has_arrived(self) -> bool:
        """Whether what was sent from it is there."""
        return self._sent is None or self._sent.query()

    def wait(self) -> None:
        """Until it is."""
        if self._sent is not None:
            self._sent.synchronize()


class _Chunk(Protocol):
    """What goes through a buffer at once."""

    @property
    def num_bytes(self) -> int: ...

    def fill(self, buffer: _Buffer) -> None:
        """Put it into the buffer, in one of the threads that read."""
        ...

    def send(self, buffer: _Buffer, target: Tensor) -> None:
        """From the buffer to its place in the job's tensor, in the caller's thread."""
        ...


@dataclass(frozen=True)
class _Bytes:
    """Of a file, which lie together there and in the tensor."""

    file: _Opened
    offset: int
    target_offset: int
    num_bytes: int

    def fill(self, buffer: _Buffer) -> None:
        # Nothing of torch here: each of its operations gives the interpreter's lock to another thread and waits for it.
        self.file.read_into(buffer.bytes[: self.num_bytes], self.offset)

    def send(self, buffer: _Buffer, target: Tensor) -> None:
        own = target.view(-1).view(torch.uint8)[self.target_offset : self.target_offset + self.num_bytes]
        own.copy_(buffer.data[: self.num_bytes], non_blocking=True)


@dataclass(frozen=True)
class _Rows:
    """Of a tensor in host memory, which may have gaps; `place` is where in the target's `dim` they come."""

    source: Tensor
    rows: slice
    dim: int
    place: slice

    @property
    def num_bytes(self) -> int:
        return self.source[self.rows].nbytes

    def fill(self, buffer: _Buffer) -> None:
        own = self.source[self.rows]
        if own.is_contiguous():
            # Not by torch, which would have all cores copy for each of the threads that read.
            np.copyto(buffer.data[: own.nbytes].numpy(), own.view(-1).view(torch.uint8).numpy())
        else:
            self._in(buffer, own).copy_(own)

    def send(self, buffer: _Buffer, target: Tensor) -> None:
        within = (self.rows, *(slice(None),) * (self.dim - 1), self.place) if self.dim else (self.rows,)
        whole = target.view(-1) if self.source.ndim == 1 else target  # one without gaps goes as one row of numbers
        whole[within].copy_(self._in(buffer, self.source[self.rows]), non_blocking=True)

    def _in(self, buffer: _Buffer, own: Tensor) -> Tensor:
        return buffer.data[: own.nbytes].view(own.dtype).view(own.shape)


@dataclass
class _Job:
    """One tensor on its way. `make` allocates it; `chunks_left` are not sent yet."""

    name: str
    make: Callable[[], Tensor]
    chunks: Sequence[_Chunk]
    target: Tensor | None = None
    chunks_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.chunks_left = len(self.chunks)

    @classmethod
    def of_file(
        cls,
        name: str,
        place: StoredPlace,
        file: _Opened,
        part: Part | None,
        device: torch.device,
        buffer_bytes: int,
    ) -> _Job:
        """A stored tensor or a part of it."""
        dtype, shape = DTYPES[place.dtype], place.shape
        dim, pieces = (0, ((0, shape[0] if shape else 1),)) if part is None else (part.dim, part.pieces())
        own_shape = shape if part is None else (*shape[:dim], sum(length for _, length in pieces), *shape[dim + 1 :])
        if dim == 0:
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            chunks: list[_Chunk] = list(_byte_chunks(file, place.offset, row_bytes, pieces, buffer_bytes))
        else:
            view = _view(file.mapped(), place)
            chunks = list(_strided_chunks(view, dim, pieces, buffer_bytes))
        return cls(name, lambda: torch.empty(own_shape, dtype=dtype, device=device), chunks)

    @classmethod
    def of_tensor(cls, name: str, tensor: Tensor, device: torch.device, buffer_bytes: int) -> _Job:
        """A tensor in host memory."""
        source = tensor.view(-1) if tensor.is_contiguous() else tensor
        chunks = list(_row_chunks(source, 0, slice(None), buffer_bytes))
        return cls(name, lambda: torch.empty(tensor.shape, dtype=tensor.dtype, device=device), chunks)


def _byte_chunks(
    file: _Opened, offset: int, row_bytes: int, pieces: Sequence[tuple[int, int]], most: int
) -> Iterator[_Bytes]:
    target = 0
    for first_row, num_rows in pieces:
        start, left = offset + first_row * row_bytes, num_rows * row_bytes
        while left:
            length = min(left, most)
            yield _Bytes(file, start, target, length)
            start, target, left = start + length, target + length, left - length


def _strided_chunks(view: Tensor, dim: int, pieces: Sequence[tuple[int, int]], most: int) -> Iterator[_Rows]:
    place = 0
    for start, length in pieces:
        yield from _row_chunks(view.narrow(dim, start, length), dim, slice(place, place + length), most)
        place += length


def _row_chunks(source: Tensor, dim: int, place: slice, most: int) -> Iterator[_Rows]:
    if not source.numel():
        return
    row_bytes = source[0].numel() * source.element_size()
    step = max(1, most // row_bytes)
    for first in range(0, source.shape[0], step):
        yield _Rows(source, slice(first, min(first + step, source.shape[0])), dim, place)


class _StagedRead:
    """Threads that fill buffers, chunk after chunk in the order of the files. The caller's thread does the rest."""

    def __init__(self, jobs: Sequence[_Job], convert: Convert, device: torch.device, reading: Reading) -> None:
        self._jobs, self._convert, self._device, self._reading = jobs, convert, device, reading
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._results: dict[str, Tensor] = {}
        self._free: SimpleQueue[_Buffer | None] = SimpleQueue()
        self._filled: SimpleQueue[tuple[_Job, _Chunk, _Buffer] | BaseException] = SimpleQueue()
        self._on_their_way: deque[_Buffer] = deque()
        self._largest = max((chunk.num_bytes for job in jobs for chunk in job.chunks), default=1)
        self._chunks = ((job, chunk) for job in jobs for chunk in job.chunks)

    def run(self) -> dict[str, Tensor]:
        """The tensors in the order of the jobs."""
        for job in self._jobs:
            if not job.chunks:
                self._results[job.name] = self._convert(job.name, job.make())
        num_chunks = sum(len(job.chunks) for job in self._jobs)
        num_threads = max(1, min(self._reading.num_threads, num_chunks))
        with ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="load") as pool:
            for _ in range(num_threads):
                pool.submit(self._fill_buffers)
            try:
                for _ in range(num_chunks):
                    self._send(*self._next_filled())
            finally:
                for _ in range(num_threads):
                    self._free.put(None)  # of the threads that an error left at work each ends at one
        if self._stream is not None:
            self._stream.synchronize()
        return {job.name: self._results[job.name] for job in self._jobs}

    def _fill_buffers(self) -> None:
        try:
            with nullcontext() if self._stream is None else torch.cuda.device(self._device):
                for _ in range(_BUFFERS_OF_A_THREAD):
                    self._free.put(_Buffer(self._largest, self._device))
            while (taken := self._next()) is not None:
                if (buffer := self._free.get()) is None:
                    return
                taken[1].fill(buffer)
                self._filled.put((*taken, buffer))
        except BaseException as error:
            self._filled.put(error)

    def _next(self) -> tuple[_Job, _Chunk] | None:
        with self._lock:
            return next(self._chunks, None)

    def _next_filled(self) -> tuple[_Job, _Chunk, _Buffer]:
        while True:
            while self._on_their_way and self._on_their_way[0].has_arrived():
                self._free.put(self._on_their_way.popleft())
            try:
                filled = self._filled.get(block=not self._on_their_way)
            except Empty:
                self._on_their_way[0].wait()
                continue
            if isinstance(filled, BaseException):
                raise filled
            return filled

    def _send(self, job: _Job, chunk: _Chunk, buffer: _Buffer) -> None:
        if job.target is None:
            job.target = job.make()
        chunk.send(buffer, job.target)
        buffer.mark_sent(self._stream)
        self._on_their_way.append(buffer)
        job.chunks_left -= 1
        if job.chunks_left == 0:
            self._results[job.name] = self._convert(job.name, job.target)
            job.target = None
