"""Reading safetensors: which files hold the weights, what is in them, and the tensors themselves, mapped into memory.

Every file's header is checked against its size before a single tensor is touched, because reading a mapped file past
its end kills the process.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sglang.multimodal_gen.errors import CorruptCheckpoint, PickleRefused
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.loader.parallel_reading import DTYPES, Convert, Part, read_tensors

_PREFERRED = ("diffusion_pytorch_model", "model")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_READABLE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
_QUANTIZED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
# The format's own limit for the header.
_MAX_HEADER_BYTES = 100_000_000
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies, `offset` bytes from the file's beginning, and what its header says. With `halves_swapped`
    its second half of rows comes first."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    halves_swapped: bool = False


@dataclass(frozen=True)
class _SwappedHalves:
    """All of a tensor of an even number of rows, the second half first."""

    num_rows: int
    dim: int = 0

    def pieces(self) -> tuple[tuple[int, int], ...]:
        half = self.num_rows // 2
        return (half, half), (0, half)

    def cut(self, whole: Tensor) -> Tensor:
        return torch.cat([whole.narrow(0, begin, length) for begin, length in self.pieces()])


@dataclass(frozen=True)
class StoredWeights:
    """All tensors of one component by name; `directory` may also be their only file."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    def load(
        self,
        names: Collection[str],
        convert: Convert,
        *,
        device: torch.device = _CPU,
        parts: Mapping[str, Part] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """The named tensors, or this rank's parts of them, each passed through `convert(name, tensor)` on the device as
        soon as it is there; see `parallel_reading`.

        On a CPU the tensor given to `convert` is a view of the mapped file: it costs memory only where it is touched.

        Raises: CorruptCheckpoint when a file cannot be read.
        """
        places = {name: self.tensors[name] for name in names}
        swapped = {name: _SwappedHalves(p.shape[0]) for name, p in places.items() if p.halves_swapped}
        assert not swapped.keys() & parts.keys(), "no layer with swapped halves is cut"
        return read_tensors(places, convert, device=device, parts={**parts, **swapped})

    def num_bytes(self, names: Collection[str]) -> int:
        """Of the named tensors, as they are stored."""
        return sum(math.prod(t.shape) * DTYPES[t.dtype].itemsize for t in map(self.tensors.__getitem__, names))


def open_weights(directory: Path, *, quantized: bool = False) -> StoredWeights:
    """The weights in a component's directory: one safetensors file, or shards with an index. In fp8 only with
    `quantized`.

    Raises:
        PickleRefused: there are only pickled weights.
        CorruptCheckpoint: no weights, a missing shard, or a file that is truncated or no safetensors file.
    """
    tensors: dict[str, StoredTensor] = {}
    expected: dict[str, str] = {}
    index = _find(directory, ".safetensors.index.json")
    if index is None:
        files = [_single_file(directory)]
    else:
        expected = _read_index(index)
        files = [directory / name for name in sorted(set(expected.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CorruptCheckpoint(
                f"{_shown(index)} lists {len(files)} files, but {', '.join(missing[:8])} "
                f"{'is' if len(missing) == 1 else 'are'} missing; download the checkpoint again"
            )
    for file in files:
        tensors.update(read_header(file, quantized=quantized))
    absent = [name for name, file in expected.items() if name not in tensors or tensors[name].file.name != file]
    if absent:
        raise CorruptCheckpoint(
            f"{_shown(directory)}: {len(absent)} tensors are not in the file that the index names, such as {absent[0]}"
        )
    return StoredWeights(directory, tensors)


def _find(directory: Path, ending: str) -> Path | None:
    """`diffusion_pytorch_model<ending>` or `model<ending>`, else the only file that ends so."""
    for stem in _PREFERRED:
        if (directory / (stem + ending)).is_file():
            return directory / (stem + ending)
    found = sorted(directory.glob("*" + ending))
    return found[0] if len(found) == 1 else None


def _single_file(directory: Path) -> Path:
    found = _find(directory, ".safetensors")
    if found is not None:
        return found
    several = sorted(file.name for file in directory.glob("*.safetensors"))
    if several:
        raise CorruptCheckpoint(
            f"{_shown(directory)} holds {len(several)} safetensors files ({', '.join(several[:4])}) but no index file "
            "that says how they belong together; download the checkpoint again"
        )
    pickles = sorted(file.name for file in directory.glob("*") if file.suffix in PICKLE_ENDINGS)
    if pickles:
        raise PickleRefused(
            f"{_shown(directory)} holds pickled weights only ({pickles[0]}), which can run code when they are read; "
            "where you trust them, load them once with diffusers and call save_pretrained(..., safe_serialization=True)"
        )
    raise CorruptCheckpoint(f"{_shown(directory)} holds no safetensors weights; download the checkpoint again")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name in the same directory."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(f"{_shown(path)} has no weight_map; download the checkpoint again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CorruptCheckpoint(f"{_shown(path)} names {file!r}; accepted are safetensors files beside it")
    return weight_map


def read_header(path: Path, *, quantized: bool = False) -> dict[str, StoredTensor]:
    """What the header lists, after the file's size was found to fit it. Numbers in fp8 only with `quantized`."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptCheckpoint(f"{_shown(path)} is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"{_shown(path)} has a header that cannot be read: {error}") from error
    if size != end:
        raise CorruptCheckpoint(
            f"{_shown(path)} has {size} bytes, but its header wants {end}; the file is "
            f"{'truncated' if size < end else 'damaged'}, download it again"
        )
    _refuse_dtypes(path, found, quantized=quantized)
    return found


def _refuse_dtypes(path: Path, found: Mapping[str, StoredTensor], *, quantized: bool) -> None:
    readable = _READABLE_DTYPES | _QUANTIZED_DTYPES if quantized else _READABLE_DTYPES
    unreadable = {tensor.dtype for tensor in found.values()} - readable
    if unreadable:
        accepted = "F32, F16, BF16, F8_E4M3, F8_E5M2 and I8" if quantized else "F32, F16 and BF16"
        raise CorruptCheckpoint(
            f"{_shown(path)} stores {', '.join(sorted(unreadable))}; accepted are {accepted} here, and quantised "
            "weights of transformers that run natively alone"
        )


def refuse_fp8(directory: Path) -> None:
    """For components whose library would read numbers in fp8 and leave their scales out. Raises CorruptCheckpoint;
    what else is wrong with a file the library finds."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            found = read_header(file, quantized=True)
        except CorruptCheckpoint:
            continue
        _refuse_dtypes(file, found, quantized=False)


def _stored(path: Path, entry: Mapping[str, Any], begin: int) -> StoredTensor:
    shape = entry["shape"]
    if not isinstance(shape, list):
        raise ValueError("a shape is no list")
    offset = begin + int(entry["data_offsets"][0])
    return StoredTensor(file=path, shape=tuple(shape), dtype=str(entry["dtype"]), offset=offset)


def _shown(path: Path) -> str:
    """Component and file: enough to find it, without this machine's directories."""
    return f"{path.parent.name}/{path.name}"


def tensors_of(module: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()
