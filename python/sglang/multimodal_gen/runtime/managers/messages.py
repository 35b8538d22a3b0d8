"""Messages between processes: closed unions of frozen structs, msgpack on the wire, checked on arrival.

Directions:
    entry point <-> scheduler   ZMQ DEALER/ROUTER over ipc://   ToScheduler, ToClient
    supervisor   -> child       multiprocessing pipe            SupervisorNote (and life line)
    scheduler   <-> worker      multiprocessing pipe            ToWorker, FromWorker in worker_messages.py
    scheduler   <-> output      ZMQ PAIR over ipc://            ToOutput, FromOutput in output_messages.py

Nothing is pickled. A message that does not decode is refused alone; the channel goes on.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang.multimodal_gen.configs.model_info import ModelInfo
from sglang.multimodal_gen.configs.request_plan import Phase
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


class CachedSteps(Message, frozen=True, kw_only=True):
    """What the step cache of a request has done since its first step: at `computed_steps` at least one forward was
    computed, `computed_forwards` of `num_forwards` in all. `skipped`: the last step left one out."""

    computed_steps: int
    computed_forwards: int
    num_forwards: int
    skipped: bool


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
