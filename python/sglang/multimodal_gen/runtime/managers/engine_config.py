"""What every process of an engine is told when it starts: plain data, the same for all but for a worker's place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang.multimodal_gen import registry
from sglang.multimodal_gen.runtime.managers.messages import PROTOCOL_VERSION
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.state_dir import StateDir
from sglang.multimodal_gen.runtime.server_args import ServerArgs


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options, the run directory, and what `register_configs` added in the parent process.

    `sources` says where each option came from, as far as that is known. `python_path` lets a worker import pipeline
    classes from where the parent could. The ranks of a replica meet over the file `rendezvous`; `replica` and `rank`
    say which of them a worker is.
    """

    args: ServerArgs
    run_dir: str
    serves_http: bool = False
    sources: dict[str, str] = {}
    registrations: tuple[dict[str, Any], ...] = ()
    python_path: tuple[str, ...] = ()
    protocol_version: int = PROTOCOL_VERSION
    replica: int = 0
    rank: int = 0
    rendezvous: str = ""

    @property
    def worker_index(self) -> int:
        """Which of all workers of the engine this one is, counted replica by replica."""
        return self.replica * self.args.parallel.replica.num_ranks + self.rank

    @classmethod
    def of_this_process(
        cls, args: ServerArgs, run_dir: str, *, serves_http: bool = False, sources: Mapping[str, str] | None = None
    ) -> EngineConfig:
        """The configuration for children of this process."""
        return cls(
            args=args,
            run_dir=run_dir,
            serves_http=serves_http,
            sources=dict(sources or {}),
            registrations=tuple(registry.registrations()),
            python_path=tuple(entry or str(Path.cwd()) for entry in sys.path),  # "" in a REPL: the working directory
        )

    def state_dir(self) -> StateDir:
        """What belongs to this server beyond its processes' lives; without a directory, beyond none."""
        given = self.args.storage.state_dir
        return StateDir(RunDir.at(self.run_dir).private_state if given is None else Path(given))

    def checkpoint_dir(self) -> Path:
        """Where requests' states are saved."""
        return self.state_dir().checkpoints

    def profile_dir(self) -> Path:
        """Where profiles go; made when the first one is asked for."""
        storage = self.args.storage
        return Path(storage.profile_dir or Path(storage.output_path, "profiles")).expanduser()

    def to_bytes(self) -> bytes:
        """For the child's pipe."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> EngineConfig:
        """Raises msgspec.ValidationError on anything that is not an EngineConfig."""
        return msgspec.msgpack.decode(payload, type=cls)

    def apply(self) -> None:
        """Make this process see what the parent saw."""
        sys.path.extend(entry for entry in self.python_path if entry not in sys.path)
        registry.restore_registrations(list(self.registrations))
