"""What `sglang quantize` and its child process tell each other: frozen structs, msgpack on the pipe."""

from __future__ import annotations

import msgspec

from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig


class QuantizeTask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Write the quantised model that the engine's options name into `target`, an empty directory. Answered by any
    number of Telling, then QuantizeDone or QuantizeFailed."""

    engine: EngineConfig
    target: str


class Telling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="telling"):
    """What goes on."""

    detail: str


class QuantizedComponent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one transformer."""

    component: str
    num_layers: int
    bytes_before: int
    bytes_after: int


class QuantizeDone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="done"):
    """All is written."""

    components: tuple[QuantizedComponent, ...]


class QuantizeFailed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="failed"):
    """Nothing of use is written."""

    error: ErrorInfo


FromQuantizer = Telling | QuantizeDone | QuantizeFailed
