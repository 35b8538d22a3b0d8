"""Which exact attention kernel was measured to be the fastest at which shapes, on one GPU with one set of packages.

The table is a JSON file of the cache directory, for each GPU's name and versions another one. Who reads it gets equal
choices for as long as nobody adds to it, which only happens while no request runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.attention.registry import KERNELS
from sglang.multimodal_gen.runtime.postprocess.pending_file import write_whole

SCHEMA_VERSION = 1
WORTHWHILE = 0.03
"""A kernel goes before the one that the fixed order has only if it takes less time by this share: below that equal
machines would choose apart."""
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class AttentionShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a choice is made for: heads of this rank, and tokens rounded up by `token_bucket`."""

    precision: str
    head_dim: int
    num_heads: int
    queries: int
    keys: int
    masked: bool

    @classmethod
    def of(cls, query: Tensor, key: Tensor, *, masked: bool) -> AttentionShape:
        """Of [B, S, H, E] and [B, L, H, E]."""
        return cls(
            precision=_PRECISIONS.get(query.dtype, str(query.dtype)),
            head_dim=query.shape[3],
            num_heads=query.shape[2],
            queries=token_bucket(query.shape[1]),
            keys=token_bucket(key.shape[1]),
            masked=masked,
        )

    def __str__(self) -> str:
        masked = ", masked" if self.masked else ""
        return f"{self.num_heads} heads of {self.head_dim}, {self.queries} x {self.keys} tokens{masked}"


class TableEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The kernels that were measured at a shape, the one to be taken first of all, and what a call of each takes."""

    shape: AttentionShape
    kernels: tuple[str, ...]
    seconds: dict[str, float]


class TableFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file holds; `identity` is that of the device and the packages that were measured."""

    schema_version: int
    identity: dict[str, str]
    entries: tuple[TableEntry, ...]


def token_bucket(tokens: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16 … that is not smaller."""
    power = 1 << max(0, (tokens - 1).bit_length())
    between = power * 3 // 4
    return between if power >= 4 and tokens <= between else power


def ranked(seconds: Mapping[str, float], usual: str) -> tuple[str, ...]:
    """Kernels in the order in which they should be taken; `usual` first unless another is faster by `WORTHWHILE`."""
    by_time = sorted(seconds, key=lambda name: seconds[name])
    if usual in seconds and seconds[by_time[0]] > (1 - WORTHWHILE) * seconds[usual]:
        by_time.remove(usual)
        by_time.insert(0, usual)
    return tuple(by_time)


class ChoiceTable:
    """Entries by shape. `origin` says in words where they come from, empty where there are none."""

    def __init__(self, entries: Sequence[TableEntry] = (), *, origin: str = "") -> None:
        self._entries = {entry.shape: entry for entry in entries}
        self.origin = origin
        self.generation = 0

    @property
    def entries(self) -> tuple[TableEntry, ...]:
        """All of them."""
        return tuple(self._entries.values())

    def knows(self, precision: str, head_dim: int | None) -> bool:
        """Whether anything was measured of such heads."""
        return any((shape.precision, shape.head_dim) == (precision, head_dim) for shape in self._entries)

    def kernels_for(self, shape: AttentionShape) -> tuple[str, ...]:
        """The kernels to be tried for it in this order; none for a shape that was not measured."""
        entry = self._entries.get(shape)
        return () if entry is None else entry.kernels

    def add(self, entries: Sequence[TableEntry], *, origin: str) -> None:
        """While no request runs: these too, in place of what there was for their shapes."""
        self._entries |= {entry.shape: entry for entry in entries}
        self.origin = origin
        self.generation += 1


def identity_of(device: torch.device) -> dict[str, str]:
    """What a measurement is valid for: the device's name, and the versions of torch and of the kernels' packages."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    versions = {"device": name, "torch": str(torch.__version__)} | ({} if cudnn is None else {"cudnn": str(cudnn)})
    for package in sorted({entry.package for entry in KERNELS.values()} - {"torch"}):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def table_path(directory: Path, identity: Mapping[str, str]) -> Path:
    """Where the table of such a device is, in the cache directory."""
    digest = hashlib.sha256(msgspec.json.encode(sorted(identity.items()))).hexdigest()[:12]
    slug = re.sub(r"[^a-z0-9]+", "-", identity["device"].lower()).strip("-")
    return directory / "attention" / f"{slug}-{digest}.json"


def read_table(path: Path, identity: Mapping[str, str]) -> tuple[tuple[TableEntry, ...], str]:
    """The entries of a file, and in a sentence why there are none; that is empty for a good file and for no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return (), ""
    except OSError as error:
        return (), f"the attention table {path.name} is ignored: {error.strerror}"
    try:
        found = msgspec.json.decode(data, type=TableFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return (), f"the attention table {path.name} is ignored: {error}"
    if found.schema_version != SCHEMA_VERSION:
        return (), f"the attention table {path.name} is ignored: its schema is {found.schema_version}"
    if found.identity != dict(identity):
        return (), f"the attention table {path.name} is ignored: it was measured on another GPU or with other packages"
    for entry in found.entries:
        if unknown := [name for name in entry.kernels if name not in KERNELS]:
            return (), f"the attention table {path.name} is ignored: it names {unknown[0]!r}, which is no kernel"
    return found.entries, ""


def write_table(path: Path, identity: Mapping[str, str], entries: Sequence[TableEntry]) -> None:
    """At once or not at all: another process reads the old file or the new one. Raises OSError."""
    content = TableFile(schema_version=SCHEMA_VERSION, identity=dict(identity), entries=tuple(entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, msgspec.json.format(msgspec.json.encode(content), indent=1))


def merge_into_table(path: Path, identity: Mapping[str, str], entries: Sequence[TableEntry]) -> None:
    """Add to what the file has; a shape that was measured again takes the new entry. Raises OSError."""
    before, _ = read_table(path, identity)
    write_table(path, identity, tuple(({e.shape: e for e in before} | {e.shape: e for e in entries}).values()))
