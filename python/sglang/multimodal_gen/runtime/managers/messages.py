"""Every message between processes: closed unions of frozen structs, msgpack on the wire, checked on arrival.

Directions:
    entry point <-> scheduler   ZMQ DEALER/ROUTER over ipc://   ToScheduler, ToClient
    scheduler   <-> output      ZMQ PAIR over ipc://            ToOutput, FromOutput
    scheduler   <-> worker      multiprocessing pipe            ToWorker, FromWorker
    supervisor   -> child       multiprocessing pipe            SupervisorNote (and life line)

Nothing here is pickled. A message that does not decode is refused alone; the channel goes on.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.request_plan import Lane, Phase
from sglang.multimodal_gen.configs.sample.lora_params import LoraUse
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import ErrorInfo
from sglang.multimodal_gen.runtime.postprocess.object_store import StoredFile

PROTOCOL_VERSION = 7
HTTP_CLIENT_NAME = "http"


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all messages."""


class MappedArray(Message, frozen=True, kw_only=True):
    """An array in a file of the server's run directory; whoever maps it unlinks it right after, but for inputs.

    `file` is a bare name (no directory), `dtype` a NumPy dtype string, the bytes are C-contiguous. A small array rides
    along as `content` instead, and has no file.
    """

    file: str = ""
    shape: tuple[int, ...]
    dtype: str
    content: bytes | None = None


class MediaInputs(Message, frozen=True, kw_only=True):
    """What a request starts from besides its prompt, decoded. The files stay until the request's terminal event, since
    a request may be admitted more than once; the scheduler unlinks them then.

    `images` and `last_image` are [H, W, 3] uint8 RGB, `mask` is [H, W] uint8 with 255 where the image is made anew,
    `video` is [T, H, W, 3] uint8 RGB.
    """

    images: tuple[MappedArray, ...] = ()
    mask: MappedArray | None = None
    last_image: MappedArray | None = None
    video: MappedArray | None = None
    video_fps: float | None = None

    @property
    def arrays(self) -> tuple[MappedArray, ...]:
        """All there are."""
        return (*self.images, *(each for each in (self.mask, self.last_image, self.video) if each is not None))


# --- entry point -> scheduler ---


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First message of a client; answered by Welcome or, when versions differ, by Refused."""

    protocol_version: int
    client_name: str


class GenerateRequest(Message, frozen=True, kw_only=True, tag="generate"):
    """One output of one prompt. `params` is complete: defaults merged in, seed drawn. Answered by events that end with
    exactly one Finished, Failed or Cancelled. The files of `inputs` are this request's own. `durable`: whoever asks may
    come again with the same id after any process has died, and the request goes on from its last saved state."""

    request_id: str
    params: SamplingParams
    max_attempts: int = 2
    inputs: MediaInputs | None = None
    durable: bool = False


class CancelRequest(Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop a request; answered by its one terminal event. Unknown or ended ids are ignored."""

    request_id: str


class StatusRequest(Message, frozen=True, kw_only=True, tag="status"):
    """Answered at once with a Status, never behind a generation."""

    query_id: str


class MetricsRequest(Message, frozen=True, kw_only=True, tag="metrics"):
    """Answered at once with a MetricsReply, never behind a generation."""

    query_id: str
    open_metrics: bool = False


Operation = Literal["flush_cache", "release_memory_occupation", "resume_memory_occupation", "update_weights_from_disk"]


class ControlRequest(Message, frozen=True, kw_only=True, tag="control"):
    """An operation on the whole engine; answered by exactly one ControlReply, when it is done. `model_path` None: the
    directory that the weights came from."""

    query_id: str
    operation: Operation
    model_path: str | None = None


class LoraWish(Message, frozen=True, kw_only=True):
    """An adapter of the list to set. `path` None: it is loaded; `target`: the transformer that it changes, or `all`."""

    name: str
    scale: float = 1.0
    path: str | None = None
    weight_name: str | None = None
    alpha: float | None = None
    target: str = "all"


class LoraRequest(Message, frozen=True, kw_only=True, tag="lora"):
    """Answered by exactly one LoraReply, when it is done. `set`: later requests that name no adapters get these, which
    are loaded before, or with `merge` they become part of the weights; `merge`: those that are set do, their scales
    times `scale`; `unmerge`: the checkpoint's weights come back; `remove`: forget those of these names; `list`: at
    once, never behind a generation."""

    query_id: str
    operation: Literal["set", "merge", "unmerge", "remove", "list"]
    adapters: tuple[LoraWish, ...] = ()
    merge: bool = False
    scale: float = 1.0


class WatchRequest(Message, frozen=True, kw_only=True, tag="watch"):
    """From now on somebody looks at a request's previews as they come, or nobody does any more. Ids that are unknown or
    ended are ignored."""

    request_id: str
    watched: bool


class PreviewTaken(Message, frozen=True, kw_only=True, tag="preview_taken"):
    """The client has room for the request's next preview; until then the scheduler keeps the newest one."""

    request_id: str


ToScheduler = (
    Hello
    | GenerateRequest
    | CancelRequest
    | StatusRequest
    | MetricsRequest
    | ControlRequest
    | LoraRequest
    | WatchRequest
    | PreviewTaken
)


# --- scheduler -> entry point ---


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Answer to Hello; the present state follows as an EngineState."""

    protocol_version: int


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """The message could not be taken; `request_id` is set when it could be read."""

    error: ErrorInfo
    request_id: str | None = None


class EngineState(Message, frozen=True, kw_only=True, tag="state"):
    """Sent on every change. `model` is set from the first `ready` on. `reloading`: the weights are loaded anew, and
    requests wait; `asleep`: the administrator has released the memory."""

    state: Literal["starting", "loading", "ready", "recovering", "reloading", "asleep", "stopping", "failed"]
    detail: str = ""
    model: ModelInfo | None = None
    error: ErrorInfo | None = None


class Status(Message, frozen=True, kw_only=True, tag="status_reply"):
    """A snapshot of the scheduler."""

    query_id: str
    state: EngineState
    num_queued: int
    num_running: int
    num_workers: int
    worker_pids: tuple[int, ...]
    num_worker_restarts: int
    budget_bytes: int
    reserved_bytes: int
    allocated_bytes: int | None
    ledger_files: int
    ledger_bytes: int
    ticks: int
    mean_batch_size: float


class MetricsReply(Message, frozen=True, kw_only=True, tag="metrics_reply"):
    """The scheduler's metrics in Prometheus' text format, or as OpenMetrics when that was asked for."""

    query_id: str
    text: str


class ControlReply(Message, frozen=True, kw_only=True, tag="control_reply"):
    """The operation is done, as `message` says, or it is not, for the reason in `error`."""

    query_id: str
    message: str = ""
    error: ErrorInfo | None = None


class LoraStatus(Message, frozen=True, kw_only=True):
    """One adapter that is loaded. `scale` None: it is only there for requests that name it."""

    name: str
    path: str
    target: str
    scale: float | None = None
    merged: bool = False


class LoraReply(Message, frozen=True, kw_only=True, tag="lora_reply"):
    """It is done, as `message` says, and these are loaded now; or it is not, for the reason in `error`."""

    query_id: str
    message: str = ""
    adapters: tuple[LoraStatus, ...] = ()
    error: ErrorInfo | None = None


class Queued(Message, frozen=True, kw_only=True, tag="queued"):
    """The request is accepted, or it waits again, or its place has changed: `position` others are expected to start
    before it, and its result in `eta_s`, None before anything was measured. `lora`: the adapters that it gets, its own
    or those that were set."""

    request_id: str
    position: int
    eta_s: float | None = None
    lora: tuple[LoraUse, ...] = ()


class Started(Message, frozen=True, kw_only=True, tag="started"):
    """A worker holds the request; `notes` are things the user should know, such as a truncated prompt."""

    request_id: str
    queue_seconds: float
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """A unit is done. `step` of `total_steps` counts the denoising steps, `fraction` the whole work, 0 to 1."""

    request_id: str
    phase: str
    step: int
    total_steps: int
    fraction: float
    eta_s: float | None


class Preview(Message, frozen=True, kw_only=True, tag="preview"):
    """What the result would look like as far as it can be told after `step` of `total_steps` steps: a picture, or an
    animated one of a few frames. Sent again only after a PreviewTaken; what comes meanwhile replaces what waits."""

    request_id: str
    step: int
    total_steps: int
    media_type: str
    image: bytes


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """Terminal: the output is complete.

    `generation_time` is the seconds of the stages but `encode_file`, which runs beside them, and `upload`, plus
    `waiting_seconds`: others' units, the way between processes, the end of the file and the upload. `stage_peak_bytes`
    is the most memory in use while the stage's units ran, `step_ms` are the denoising steps, each shared by as many
    requests as `step_batch_sizes` says. Of them `computed_steps` were computed, the others taken from a step cache,
    whose forwards `cached` counts. `warmup_excluded`: this size had been warmed up before. `profile_path` names
    the trace of a request that was profiled. `stored`: the `output`, `thumbnail` and `contact_sheet` that were
    uploaded, as far as there are.
    """

    request_id: str
    seed: int
    width: int
    height: int
    num_frames: int
    output_file_path: str | None
    thumbnail_path: str | None = None
    contact_sheet_path: str | None = None
    frames: MappedArray | None
    latents: MappedArray | None
    encoded: MappedArray | None
    generation_time: float
    queue_seconds: float
    stage_seconds: dict[str, float]
    step_ms: tuple[float, ...]
    step_batch_sizes: tuple[int, ...]
    peak_memory_bytes: int
    attempts: int
    notes: tuple[str, ...] = ()
    warmup_excluded: bool = False
    waiting_seconds: float = 0.0
    stage_peak_bytes: dict[str, int] = {}
    profile_path: str | None = None
    stored: dict[str, StoredFile] = {}
    computed_steps: int = 0
    cached: CachedSteps | None = None


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """Terminal: the request ended with an error."""

    request_id: str
    error: ErrorInfo


class Cancelled(Message, frozen=True, kw_only=True, tag="cancelled"):
    """Terminal: the request was stopped on demand, or with `engine_stopped` since the engine ends."""

    request_id: str
    reason: str = "cancelled"
    engine_stopped: bool = False


RequestEvent = Queued | Started | Progress | Preview | Finished | Failed | Cancelled
ToClient = (
    Welcome
    | Refused
    | EngineState
    | Status
    | MetricsReply
    | ControlReply
    | LoraReply
    | Queued
    | Started
    | Progress
    | Preview
    | Finished
    | Failed
    | Cancelled
)
TERMINAL_EVENTS = (Finished, Failed, Cancelled)


# --- scheduler -> worker ---


class Admit(Message, frozen=True, kw_only=True, tag="admit"):
    """Build the request's state; answered by Admitted or AdmitFailed. `state_file`: go on from what was saved there.
    The files of `inputs` are mapped and left where they are. `lora_ids`: under which id each adapter that it names was
    loaded."""

    request_id: str
    params: SamplingParams
    state_file: str | None = None
    inputs: MediaInputs | None = None
    lora_ids: dict[str, str] = {}


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
    units_done: dict[str, int] = {}


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


class CachedSteps(Message, frozen=True, kw_only=True):
    """What the step cache of a request has done since its first step: at `computed_steps` at least one forward was
    computed, `computed_forwards` of `num_forwards` in all. `skipped`: the last step left one out."""

    computed_steps: int
    computed_forwards: int
    num_forwards: int
    skipped: bool


class LaneDone(Message, frozen=True, kw_only=True):
    """What one lane of a tick took. `peak_bytes`: the most that its units needed above what was held before; None where
    that was not measured. `cached`: by request, of those with a step cache."""

    lane: Lane
    ms: float
    peak_bytes: int | None
    cached: dict[str, CachedSteps] = {}


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


# --- scheduler -> output process ---


class OpenOutput(Message, frozen=True, kw_only=True, tag="open_output"):
    """A request's frames will follow; `num_frames` is their total. `directory` None: nothing is saved."""

    request_id: str
    params: SamplingParams
    num_frames: int
    directory: str | None


class OutputFrames(Message, frozen=True, kw_only=True, tag="output_frames"):
    """The next frames of an opened output."""

    request_id: str
    first_frame: int
    last: bool
    frames: MappedArray


class DropOutput(Message, frozen=True, kw_only=True, tag="drop_output"):
    """The request was cancelled or failed: discard what there is of it."""

    request_id: str


class RemoveOutput(Message, frozen=True, kw_only=True, tag="remove_output"):
    """The request was cancelled or failed before its output was complete: remove the files and objects again."""

    request_id: str
    paths: tuple[str, ...]
    keys: tuple[str, ...]


class RenderPreview(Message, frozen=True, kw_only=True, tag="render_preview"):
    """Make a preview of a request's latents; answered by a PreviewRendered unless a newer one comes before its turn."""

    latents: PreviewLatents
    params: SamplingParams

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self.latents.request_id


ToOutput = OpenOutput | OutputFrames | DropOutput | RemoveOutput | RenderPreview


# --- output process -> scheduler ---


class OutputHello(Message, frozen=True, kw_only=True, tag="output_hello"):
    """A fresh output process is listening; outputs that an earlier one held are lost."""

    protocol_version: int


class OutputDone(Message, frozen=True, kw_only=True, tag="output_done"):
    """An output is complete: saved under its final name, uploaded, or returned. `encode_seconds` are without
    `upload_seconds`."""

    request_id: str
    output_file_path: str | None
    thumbnail_path: str | None = None
    contact_sheet_path: str | None = None
    frames: MappedArray | None
    encoded: MappedArray | None
    encode_seconds: float
    stored: dict[str, StoredFile] = {}
    upload_seconds: float = 0.0


class OutputFailed(Message, frozen=True, kw_only=True, tag="output_failed"):
    """An output could not be encoded or saved; nothing of it is left on disk."""

    request_id: str
    error: ErrorInfo


class PreviewRendered(Message, frozen=True, kw_only=True, tag="preview_rendered"):
    """The preview of a request after `step` steps."""

    request_id: str
    step: int
    media_type: str
    image: bytes


FromOutput = OutputHello | OutputDone | OutputFailed | PreviewRendered


# --- supervisor -> scheduler, entry point ---


class ClientLost(Message, frozen=True, kw_only=True, tag="client_lost"):
    """The entry point of that name is gone: cancel what it asked for."""

    client_name: str


class SchedulerLost(Message, frozen=True, kw_only=True, tag="scheduler_lost"):
    """The scheduler died; requests that it held end with this error, and a new one is started if `restarting`."""

    error: ErrorInfo
    restarting: bool


class EngineStarted(Message, frozen=True, kw_only=True, tag="engine_started"):
    """The processes run; the scheduler listens in this run directory."""

    run_dir: str


class StopServing(Message, frozen=True, kw_only=True, tag="stop_serving"):
    """To the HTTP process: take nothing new, let what runs finish within the grace time, and exit."""


class StopEngine(Message, frozen=True, kw_only=True, tag="stop_engine"):
    """To the scheduler, before its pipe closes: so many seconds more than usual it may take to save what runs."""

    saving_s: float


SupervisorNote = ClientLost | SchedulerLost | EngineStarted | StopServing | StopEngine


class SchedulerAlive(Message, frozen=True, kw_only=True, tag="scheduler_alive"):
    """To the supervisor, several times a second: the scheduler's loop goes round."""


_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The bytes of one message."""
    return _ENCODER.encode(message)


class Codec:
    """Decodes one direction's union; raises msgspec.DecodeError or ValidationError on anything else."""

    def __init__(self, union: object) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)

    def decode(self, payload: bytes | bytearray | memoryview) -> object:
        """One message of the union."""
        return self._decoder.decode(payload)
