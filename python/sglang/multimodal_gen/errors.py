"""Every error a user can meet, one class per cause.

Each class has a stable `code`, the HTTP status it maps to, and a sentence that names the field, the value and what
would be accepted. Facts are attributes, so that callers decide on them and never parse the sentence. Errors cross
process borders as `ErrorInfo` and come back as `ServingError` with the same code, status and sentence.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class ErrorInfo:
    """What travels of an error between processes: never a traceback, never a path of this machine."""

    code: str
    message: str
    http_status: int = 500
    param: str | None = None
    retryable: bool = False
    retry_after_s: int | None = None


class ServingError(Exception):
    """Base of all deliberate errors. `str(error)` is one sentence that a user may read."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.message = message
        self.param = param
        super().__init__(message)

    def info(self) -> ErrorInfo:
        """The form that travels between processes."""
        return ErrorInfo(
            code=self.code,
            message=self.message,
            http_status=self.http_status,
            param=self.param,
            retryable=self.retryable,
            retry_after_s=self.retry_after_s,
        )


class RemoteError(ServingError):
    """An error that another process raised, with that error's own code, status and sentence."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message, param=info.param)
        self.code = info.code  # type: ignore[misc]
        self.http_status = info.http_status  # type: ignore[misc]
        self.retryable = info.retryable  # type: ignore[misc]
        self.retry_after_s = info.retry_after_s


class InvalidRequest(ServingError):
    """The client's input is at fault; the same request will fail again."""

    code = "invalid_value"
    http_status = 400


_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """`value` as an error message shows it: short, and on one line."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split()) if text.strip() else repr(text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


class FieldError(InvalidRequest):
    """A parameter's value cannot be accepted; `param`, `value` and `accepted` say which, what and what could be."""

    def __init__(self, param: str, value: object, accepted: str, *, code: str | None = None) -> None:
        self.value = value
        self.accepted = accepted
        if code is not None:
            self.code = code  # type: ignore[misc]
        super().__init__(f"{param}: got {shown(value)}, accepted is {accepted}", param=param)

    def named(self, label: str) -> FieldError:
        """The same error under the name by which the user gave the value: a flag, a variable, a line of a file."""
        return type(self)(label, self.value, self.accepted, code=self.code)


class InvalidValue(FieldError):
    """The value has the right type but lies outside what is accepted."""


class InvalidType(FieldError):
    """The value is of the wrong type."""

    code = "invalid_type"


class UnknownParameter(InvalidRequest):
    """A flag, key or field that does not exist."""

    code = "unknown_parameter"

    def __init__(self, name: str, *, what: str, hint: str = "") -> None:
        super().__init__(f"unknown {what} {shown(name)}{hint}", param=name)


class MissingParameter(InvalidRequest):
    """A required parameter was not given."""

    code = "missing_required_parameter"


class EmptyPrompt(InvalidRequest):
    """The prompt is empty or only white space."""

    code = "empty_prompt"

    def __init__(self) -> None:
        super().__init__(
            "prompt: got an empty text, accepted is a text with at least one visible character", param="prompt"
        )


class SizeNotDivisible(InvalidRequest):
    """Height or width does not fit the VAE stride times the patch size."""

    code = "invalid_size"

    def __init__(self, *, width: int, height: int, multiple: int) -> None:
        self.width, self.height, self.multiple = width, height, multiple
        nearest = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
        super().__init__(
            f"size: got {width}x{height}, accepted are multiples of {multiple} in width and height; nearest: {nearest}",
            param="size",
        )


class SizeTooLarge(InvalidRequest):
    """More pixels or frames than the model can do."""

    code = "size_above_maximum"


class FramesNotSupported(InvalidRequest):
    """A frame count that the VAE's temporal stride cannot give."""

    code = "invalid_num_frames"

    def __init__(self, num_frames: int, *, stride: int, maximum: int) -> None:
        lower = max(1, (num_frames - 1) // stride * stride + 1)
        nearest = min((lower, lower + stride), key=lambda n: abs(n - num_frames))
        super().__init__(
            f"num_frames: got {num_frames}, accepted are {stride}k+1 frames up to {maximum}; "
            f"nearest: {min(nearest, maximum)}",
            param="num_frames",
        )


class RequestTooLarge(InvalidRequest):
    """More work than the server takes in one request."""

    code = "cost_above_maximum"

    def __init__(self, *, width: int, height: int, num_frames: int, steps: int, outputs: int, limit: int) -> None:
        self.cost, self.limit = width * height * num_frames * steps * outputs, limit
        super().__init__(
            f"width x height x num_frames x num_inference_steps x n: got {width} x {height} x {num_frames} x {steps} x "
            f"{outputs} = {self.cost}, accepted is at most {limit}, which max-request-cost sets",
            param="num_inference_steps",
        )


class InsufficientMemory(InvalidRequest):
    """The request needs more memory than the machine has free."""

    code = "insufficient_memory"

    def __init__(self, *, needed_bytes: int, free_bytes: int, size: str, movable_bytes: int = 0) -> None:
        """`movable_bytes`: of weights that a server which is started otherwise would have elsewhere."""
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes
        remedy = "use a smaller size or fewer frames"
        if free_bytes < needed_bytes <= free_bytes + movable_bytes:
            gain = f"{movable_bytes / 2**30:.1f} GiB"
            remedy += f", or start the server with --performance-mode memory: {gain} more for requests, slower steps"
        super().__init__(
            f"size: {size} needs about {needed_bytes / 2**30:.1f} GiB, but {free_bytes / 2**30:.1f} GiB are free; "
            + remedy,
            param="size",
        )


class AttentionNotAvailable(InvalidRequest):
    """An attention kernel that does not exist, is not installed, or cannot do what the model needs on this device."""

    code = "attention_not_available"

    def __init__(self, param: str, backend: str, *, reason: str, usable: Sequence[str]) -> None:
        self.backend, self.reason, self.usable = backend, reason, tuple(usable)
        accepted = ", ".join(usable)
        super().__init__(f"{param}: got {shown(backend)}, but {reason}; accepted here is {accepted}", param=param)


class ModelError(ServingError):
    """The model cannot be found or loaded."""

    code = "model_not_loadable"
    http_status = 400


class NotAModel(ModelError):
    """The path holds no diffusers checkpoint."""

    code = "not_a_model"


class UnsupportedModel(ModelError):
    """The checkpoint's pipeline class has no implementation here."""

    code = "unsupported_model"


class ModelTooLarge(ModelError):
    """The weights do not fit into the memory that is left on a device."""

    code = "model_too_large"

    def __init__(self, device: str, *, total_bytes: int, free_bytes: int, own_bytes: int) -> None:
        gib = 2**30
        others = max(0, total_bytes - free_bytes - own_bytes)
        super().__init__(
            f"the model does not fit: memory ran out on {device} when {own_bytes / gib:.1f} GiB were loaded; of its "
            f"{total_bytes / gib:.1f} GiB other processes hold {others / gib:.1f}, so end them or take another GPU "
            "with --gpu-ids, or spread the weights with --tp-size"
        )


class CorruptCheckpoint(ModelError):
    """A file of the checkpoint is missing, truncated or does not fit its config."""

    code = "corrupt_checkpoint"


class PickleRefused(ModelError):
    """The weights are pickle files, which can run code when read."""

    code = "pickle_refused"


class ModelNotReachable(ModelError):
    """The checkpoint must be downloaded and the hub cannot be reached."""

    code = "model_not_reachable"
    http_status = 503


class NotReady(ServingError):
    """The engine is starting or recovering; try again."""

    code = "not_ready"
    http_status = 503
    retryable = True


class WorkerLost(ServingError):
    """The worker that ran the request died or stopped answering, more often than it is retried."""

    code = "worker_lost"
    http_status = 503


class PoisonRequest(ServingError):
    """The request was lost with its worker again, though nothing else ran beside it: it is not tried a third time."""

    code = "poison_request"


class DeadlineExceeded(ServingError):
    """The result was not complete in the time that the request gave, or cannot be."""

    code = "deadline_exceeded"
    http_status = 504

    def __init__(self, deadline_s: float, *, needed_s: float | None = None) -> None:
        self.deadline_s, self.needed_s = deadline_s, needed_s
        why = "it has passed" if needed_s is None else f"such a request takes at least {needed_s:.3g} s here"
        super().__init__(
            f"deadline_s: the result was wanted within {deadline_s:g} s, and {why}; give it more time, a smaller size "
            "or fewer steps",
            param="deadline_s",
        )


class EngineStopped(ServingError):
    """The engine is shutting down or gone."""

    code = "engine_stopped"
    http_status = 503


class OutOfMemory(ServingError):
    """The device ran out of memory while the request ran."""

    code = "out_of_memory"


class InvalidState(ServingError):
    """A request's saved state cannot be used; the request starts from its beginning."""

    code = "invalid_state"


class InternalError(ServingError):
    """A bug of ours; the log has the traceback."""

    code = "internal_error"


class ProtocolMismatch(ServingError):
    """Two processes speak different versions of the protocol."""

    code = "protocol_mismatch"


class ProfilerBusy(ServingError):
    """A worker can profile one request at a time."""

    code = "profiler_busy"
    http_status = 503
    retryable = True

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        super().__init__("profile: another request is being profiled; try again when it has ended", param="profile")


class StorageError(ServingError):
    """An output cannot be written."""

    code = "storage_error"
    http_status = 507


class InsufficientStorage(StorageError):
    """The disk is full: what was asked for was not accepted, or its result has no room."""

    code = "insufficient_storage"


def storage_error(problem: str, error: OSError) -> StorageError:
    """What could not be written and the system's reason; a full disk or quota is InsufficientStorage."""
    kind = InsufficientStorage if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(f"{problem}: {error.strerror}")


class StorageUnavailable(ServingError):
    """The object store that results are in cannot be reached or does not answer as it should; try again."""

    code = "storage_unavailable"
    http_status = 503
    retryable = True


class RequestCancelled(ServingError):
    """The request was cancelled before it finished."""

    code = "cancelled"
    http_status = 499


class PortInUse(ServingError):
    """The HTTP port is taken."""

    code = "port_in_use"


class StateDirInUse(ServingError):
    """Another server holds the state directory."""

    code = "state_dir_in_use"

    def __init__(self, path: object, holder: str) -> None:
        super().__init__(
            f"state_dir: {path} belongs to {holder}; accepted is a directory of this server's own: name one with "
            "--state-dir",
            param="state_dir",
        )


class InvalidUnicode(InvalidRequest):
    """A text is not valid Unicode."""

    code = "invalid_unicode"


class DuplicateParameter(InvalidRequest):
    """A parameter was given more than once."""

    code = "duplicate_parameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"{shown(name)}: given more than once, accepted is one value", param=name)


class UnsupportedParameter(InvalidRequest):
    """A parameter of the OpenAI API that this server or model cannot honour; it is refused rather than ignored."""

    code = "unsupported_parameter"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: not supported here, {reason}; leave it out", param=name)


class IncompatibleParameters(InvalidRequest):
    """Two parameters that cannot be used together."""

    code = "incompatible_parameters"


class MemoryReleased(ServingError):
    """The administrator has released the engine's memory; it takes requests again once that is resumed."""

    code = "memory_released"
    http_status = 503


class OperationInProgress(InvalidRequest):
    """Another operation on the whole engine is under way."""

    code = "operation_in_progress"
    http_status = 409


class WeightsDoNotFit(InvalidRequest):
    """The directory holds a model of another architecture than the one that is served."""

    code = "weights_do_not_fit"

    def __init__(self, *, served: str, found: str) -> None:
        self.served, self.found = served, found
        super().__init__(f"model_path: holds {found}, accepted is a directory of the model served, {served}")


class QueueFull(ServingError):
    """As many requests, or as much work, wait as the server holds. `retry_after_s`: when there should be room again."""

    code = "queue_full"
    http_status = 429
    retryable = True

    def __init__(self, limit: int, *, option: str = "max-queued-requests", retry_after_s: int | None = None) -> None:
        self.limit, self.option, self.retry_after_s = limit, option, retry_after_s
        when = "later" if retry_after_s is None else f"in {retry_after_s} s"
        super().__init__(f"the queue is full: {option} is {limit}; try again {when}")


class UsageError(InvalidRequest):
    """A command line that cannot be read."""

    code = "usage"


class InvalidConfigFile(InvalidRequest):
    """A file of options that cannot be read or is not a mapping of names to values."""

    code = "invalid_config_file"


class MissingPackage(InvalidRequest):
    """An option needs a package that is not installed."""

    code = "missing_package"


class BenchmarkFailed(ServingError):
    """A benchmark ended without a result."""

    code = "benchmark_failed"


class ServerNotReachable(ServingError):
    """Nothing that speaks HTTP answers at the address of the server that is to be measured."""

    code = "server_not_reachable"

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"base_url: no answer from {url} ({reason}); accepted is the address of a running server")


class LoadRefused(ServingError):
    """The server that is to be measured refuses a request that it would refuse every time."""

    code = "load_refused"

    def __init__(self, url: str, *, status: int, reason: str, remedy: str) -> None:
        self.url, self.status, self.reason = url, status, reason
        super().__init__(f"{url} answered {status} ({reason}); {remedy}")
