"""Which exact attention kernel was measured to be the fastest at which shapes, on one GPU with one set of packages.

The table is a JSON file of the cache directory, for each GPU's name and versions another one. Who reads it gets equal
choices for as long as nobody adds to it, which only happens while no request runs.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.attention.registry import KERNELS
from sglang.multimodal_gen.runtime.layers.measured_file import MeasuredFile, device_identity

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
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    versions = device_identity(device) | ({} if cudnn is None else {"cudnn": str(cudnn)})
    for package in sorted({entry.package for entry in KERNELS.values()} - {"torch"}):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def attention_file(directory: Path, identity: Mapping[str, str]) -> MeasuredFile[TableEntry]:
    """The table of such a device, in the cache directory."""
    return MeasuredFile(directory, "attention", TableEntry, identity, schema_version=SCHEMA_VERSION)


def read_table(file: MeasuredFile[TableEntry]) -> tuple[tuple[TableEntry, ...], str]:
    """The entries of a file, and in a sentence why there are none; that is empty for a good file and for no file."""
    entries, problem = file.read()
    unknown = [name for entry in entries for name in entry.kernels if name not in KERNELS]
    if unknown:
        return (), file.ignored(f"it names {unknown[0]!r}, which is no kernel")
    return entries, problem


def merge_into_table(file: MeasuredFile[TableEntry], entries: Sequence[TableEntry]) -> None:
    """Add to what the file has; a shape that was measured again takes the new entry. Raises OSError."""
    before, _ = read_table(file)
    file.write(tuple(({e.shape: e for e in before} | {e.shape: e for e in entries}).values()))
