"""Between the scheduler and the workers of its replicas, over a multiprocessing pipe: ToWorker and FromWorker."""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.request_plan import Lane, Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.managers.messages import CachedSteps, MappedArray, MediaInputs, Message

# --- scheduler -> worker ---


class Admit(Message, frozen=True, kw_only=True, tag="admit"):
    """Build the request's state; answered by Admitted or AdmitFailed. `state_file`: go on from what was saved there.
    The files of `inputs` are mapped and left where they are. `lora_ids`: under which id each adapter that it names was
    loaded."""

    request_id: str
    params: SamplingParams
    state_file: str | None = None
    inputs: MediaInputs | None = None
    lora_ids: dict[str, str] = msgspec.field(default_factory=dict)


class Unit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Unit number `index` of one phase of one request."""

    request_id: str
    phase: str
    index: int


class Tick(Message, frozen=True, kw_only=True, tag="tick"):
    """Do one unit for each request of each lane; answered by exactly one TickDone. `previews`: requests with a unit of
    `denoise` after which a PreviewLatents is wanted, if the worker can give it."""

    seq: int
    epoch: int
    encode: tuple[Unit, ...] = ()
    denoise: tuple[Unit, ...] = ()
    decode: tuple[Unit, ...] = ()
    previews: tuple[str, ...] = ()

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of all lanes."""
        return (*self.encode, *self.denoise, *self.decode)


class SaveState(Message, frozen=True, kw_only=True, tag="save_state"):
    """Write the request's state, as it is between two ticks, to this file of the checkpoint directory; answered by
    StateSaved, or by nothing when the request is released before."""

    request_id: str
    state_file: str


class Release(Message, frozen=True, kw_only=True, tag="release"):
    """Forget a request and free its tensors; idempotent."""

    request_id: str


class FlushCache(Message, frozen=True, kw_only=True, tag="flush_cache"):
    """Forget what was kept across requests and give unused memory back; answered by CacheFlushed."""

    query_id: str


class LoadLora(Message, frozen=True, kw_only=True, tag="load_lora"):
    """Read an adapter and keep it under this id, beside what runs; answered by LoraDone. Known ids are kept as they
    are."""

    query_id: str
    adapter_id: str
    path: str
    weight_name: str | None = None
    alpha: float | None = None
    target: str = "all"


class ForgetLora(Message, frozen=True, kw_only=True, tag="forget_lora"):
    """No new request has the adapter of this id; idempotent."""

    adapter_id: str


class MergeLora(Message, frozen=True, kw_only=True, tag="merge_lora"):
    """Make these (id, scale) part of the checkpoint's weights, and no others; answered by LoraDone. No request is in
    the workers."""

    query_id: str
    uses: tuple[tuple[str, float], ...]


class StopWorker(Message, frozen=True, kw_only=True, tag="stop"):
    """Exit after the running tick."""


ToWorker = Admit | Tick | SaveState | Release | FlushCache | LoadLora | ForgetLora | MergeLora | StopWorker


# --- worker -> scheduler ---


class Loading(Message, frozen=True, kw_only=True, tag="loading"):
    """What the worker is doing while it loads, for /health and the log."""

    detail: str


class ModelReady(Message, frozen=True, kw_only=True, tag="model_ready"):
    """The worker has loaded and answers ticks from now on. `budget_bytes` is free for running requests."""

    model: ModelInfo
    budget_bytes: int


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """The worker process is alive, whatever its main thread does; sent every second. `allocated_bytes` is what its
    model and requests hold on the device."""

    allocated_bytes: int | None = None


class RankLost(Message, frozen=True, kw_only=True, tag="rank_lost"):
    """The worker cannot go on, as when its device has failed; it exits. `reason` follows on "the worker was lost"."""

    reason: str


class LoadFailed(Message, frozen=True, kw_only=True, tag="load_failed"):
    """The model cannot be loaded; the worker exits."""

    error: ErrorInfo


class Admitted(Message, frozen=True, kw_only=True, tag="admitted"):
    """The request's phases, in order; `units_done` by phase where the request goes on from a saved state."""

    request_id: str
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()
    units_done: dict[str, int] = msgspec.field(default_factory=dict)


class AdmitFailed(Message, frozen=True, kw_only=True, tag="admit_failed"):
    """The request cannot run on this model or machine; the worker holds nothing of it."""

    request_id: str
    error: ErrorInfo


class OutputChunk(Message, frozen=True, kw_only=True, tag="chunk"):
    """Decoded frames [T, H, W, 3] uint8 from `first_frame` on; sent before the TickDone of the request's next unit, the
    last ones before that of the unit that made them."""

    request_id: str
    first_frame: int
    last: bool
    frames: MappedArray


class LatentsReady(Message, frozen=True, kw_only=True, tag="latents"):
    """Final latents [C, T, H, W] float32, sent only when the request wants them."""

    request_id: str
    latents: MappedArray


class PreviewLatents(Message, frozen=True, kw_only=True, tag="preview_latents"):
    """Some frames of the clean latents that a request's last step predicts, and how they become colours.

    `latents` [C, F, h, w] float32, of which the first frame is the clip's first. `basis`: float32 [2, C + 1, 3·p·p],
    which makes p x p pixels (p is `patch`) in [-1, 1], colours outermost, of a latent cell and a 1; one for the first
    frame, one for the others. `step`: how many steps are done.
    """

    request_id: str
    step: int
    latents: MappedArray
    basis: bytes
    patch: int


class ProfileReady(Message, frozen=True, kw_only=True, tag="profile"):
    """The trace of a profiled request is in the file `path`, or there is none for the reason in `note`."""

    request_id: str
    path: str | None = None
    note: str | None = None


class UnitFailure(Message, frozen=True, kw_only=True):
    """One request's unit failed; the others of the tick stand.

    `retry`: `never`; `alone`, since it may be another request's fault; `smaller_batch`, since memory ran out;
    `smaller_units`, since memory ran out for this request alone and its work was planned anew: `phases` and `notes`.
    """

    request_id: str
    error: ErrorInfo
    retry: Literal["never", "alone", "smaller_batch", "smaller_units"]
    phases: tuple[Phase, ...] = ()
    notes: tuple[str, ...] = ()


class LaneDone(Message, frozen=True, kw_only=True):
    """What one lane of a tick took. `peak_bytes`: the most that its units needed above what was held before; None where
    that was not measured. `cached`: by request, of those with a step cache."""

    lane: Lane
    ms: float
    peak_bytes: int | None
    cached: dict[str, CachedSteps] = msgspec.field(default_factory=dict)


class TickDone(Message, frozen=True, kw_only=True, tag="tick_done"):
    """Outcome of one Tick. `dropped`: it was of an old epoch and nothing ran. `peak_bytes`: the most that the device's
    allocator, or the process on CPU, held during the tick. `preview_ms`: what its previews took beside the lanes, where
    it was more than a copy."""

    seq: int
    epoch: int
    dropped: bool
    failures: tuple[UnitFailure, ...]
    lanes: tuple[LaneDone, ...]
    peak_bytes: int
    preview_ms: float = 0.0


class StateSaved(Message, frozen=True, kw_only=True, tag="state_saved"):
    """The state is on disk with this many units done by phase, or `error` says why it is not."""

    request_id: str
    state_file: str
    units_done: dict[str, int]
    error: ErrorInfo | None = None


class CacheFlushed(Message, frozen=True, kw_only=True, tag="cache_flushed"):
    """One rank's answer to FlushCache: the bytes of the embeddings that it forgot."""

    query_id: str
    freed_bytes: int


class LoraDone(Message, frozen=True, kw_only=True, tag="lora_done"):
    """One rank's answer to LoadLora or MergeLora. `notes`: what of the adapter is left out."""

    query_id: str
    notes: tuple[str, ...] = ()
    error: ErrorInfo | None = None


FromWorker = (
    Heartbeat
    | Loading
    | ModelReady
    | LoadFailed
    | RankLost
    | Admitted
    | AdmitFailed
    | OutputChunk
    | LatentsReady
    | PreviewLatents
    | ProfileReady
    | TickDone
    | StateSaved
    | CacheFlushed
    | LoraDone
)
