"""What was set about adapters, on disk: the scheduler that comes after this one goes on with it.

The file belongs to one server. The next server over the same directory has its own options about what is set and
merged, and finds the adapters that jobs of before name.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from sglang.multimodal_gen.configs.sample.lora_params import LoraUse
from sglang.multimodal_gen.runtime.managers.messages import LoraWish
from sglang.multimodal_gen.runtime.postprocess.pending_file import write_whole

logger = logging.getLogger(__name__)

_VERSION = 1


class KeptAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """One that is loaded, under the id by which workers know it."""

    adapter_id: str
    wish: LoraWish


class KeptLoras(msgspec.Struct, frozen=True, kw_only=True):
    """`server` is which run of the server wrote it, `number` the last that an id was made with; `merged` are in the
    weights, by their ids."""

    server: str
    number: int
    loaded: tuple[KeptAdapter, ...]
    uses: tuple[LoraUse, ...]
    merged: tuple[tuple[KeptAdapter, float], ...]
    version: int = _VERSION


class LoraFile:
    """Where it is kept."""

    def __init__(self, path: Path, server: str) -> None:
        self.server = server
        self._path = path

    def read(self) -> KeptLoras | None:
        """What the scheduler before wrote; None where there was none, or nothing that can be read."""
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=KeptLoras)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("which adapters were loaded cannot be read (%s)", type(error).__name__)
            return None
        return kept if kept.version == _VERSION else None

    def write(self, kept: KeptLoras) -> None:
        """Keep it; where that fails, a scheduler after this one has the adapters of the launch alone."""
        try:
            write_whole(self._path, msgspec.json.encode(kept))
        except OSError as error:
            logger.warning("which adapters are loaded cannot be kept on disk (%s)", error.strerror)
