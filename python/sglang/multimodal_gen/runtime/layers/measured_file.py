"""Files of what was measured on one GPU with one set of packages: JSON files of the cache directory, by kind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import torch

from sglang.multimodal_gen.runtime.postprocess.pending_file import write_whole

Entry = TypeVar("Entry", bound=msgspec.Struct)


class _Content(msgspec.Struct, Generic[Entry], frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema_version: int
    identity: dict[str, str]
    entries: tuple[Entry, ...]


class MeasuredFile(Generic[Entry]):
    """Entries of a kind, such as "attention", that are valid for an `identity`: device and versions, by name."""

    def __init__(
        self, directory: Path, kind: str, entry: type[Entry], identity: Mapping[str, str], *, schema_version: int
    ) -> None:
        digest = hashlib.sha256(msgspec.json.encode(sorted(identity.items()))).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9]+", "-", identity["device"].lower()).strip("-")
        self.path = directory / kind / f"{slug}-{digest}.json"
        self._kind, self._entry = kind, entry
        self._identity, self._schema_version = dict(identity), schema_version

    def read(self) -> tuple[tuple[Entry, ...], str]:
        """The entries, and in a sentence why there are none; that is empty for a good file and for no file."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return (), ""
        except OSError as error:
            return (), self.ignored(error.strerror or str(error))
        try:
            found = msgspec.json.decode(data, type=_Content[self._entry])  # type: ignore[name-defined]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return (), self.ignored(str(error))
        if found.schema_version != self._schema_version:
            return (), self.ignored(f"its schema is {found.schema_version}")
        if found.identity != self._identity:
            return (), self.ignored("it was measured on another GPU or with other packages")
        return found.entries, ""

    def ignored(self, why: str) -> str:
        """How a file is reported that cannot be used."""
        return f"the {self._kind} table {self.path.name} is ignored: {why}"

    def write(self, entries: Sequence[Entry]) -> None:
        """At once or not at all: another process reads the old file or the new one. Raises OSError."""
        content = _Content(schema_version=self._schema_version, identity=self._identity, entries=tuple(entries))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, msgspec.json.format(msgspec.json.encode(content), indent=1))


def device_identity(device: torch.device) -> dict[str, str]:
    """The device's name and the version of torch, to begin an identity with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, "torch": str(torch.__version__)}
