"""What goes wrong between an HTTP client and the server, and with what it has there."""

from __future__ import annotations

from sglang.multimodal_gen.errors import InvalidRequest, ServingError, shown


class InvalidJson(InvalidRequest):
    """The body is not one JSON object in UTF-8."""

    code = "invalid_json"


class InvalidMultipart(InvalidRequest):
    """The body is not complete multipart/form-data."""

    code = "invalid_multipart"


class UnsupportedMediaType(InvalidRequest):
    """The body's content type is not accepted."""

    code = "unsupported_media_type"
    http_status = 415


class BodyTooLarge(InvalidRequest):
    """The request's body has more bytes than the server reads."""

    code = "body_too_large"
    http_status = 413

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(f"body: larger than the {limit_bytes} bytes that are accepted")


class BodyTimeout(InvalidRequest):
    """The client sent its body too slowly."""

    code = "request_timeout"
    http_status = 408


class BadHttp(InvalidRequest):
    """The bytes are no acceptable HTTP/1.1 request."""

    code = "invalid_http"


class HeadTooLarge(InvalidRequest):
    """The request's line and headers have more bytes than the server takes."""

    code = "head_too_large"
    http_status = 431

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(f"headers: larger than the {limit_bytes} bytes that are accepted, see --max-header-kib")


class RouteNotFound(InvalidRequest):
    """No such path."""

    code = "not_found"
    http_status = 404


class NotOffered(InvalidRequest):
    """A call of the OpenAI API that this server does not have."""

    code = "unsupported"
    http_status = 404


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not."""

    code = "method_not_allowed"
    http_status = 405


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served."""

    code = "model_not_found"
    http_status = 404

    def __init__(self, name: str, *, served: str) -> None:
        super().__init__(f"model: {shown(name)} is not served, accepted is {served}", param="model")


class ImageNotFound(InvalidRequest):
    """No image of that id, or it has expired."""

    code = "image_not_found"
    http_status = 404

    def __init__(self, image_id: str) -> None:
        super().__init__(f"no image {shown(image_id)}: the id is unknown or has expired", param="image_id")


class VideoNotFound(InvalidRequest):
    """No video of that id, or it was deleted."""

    code = "video_not_found"
    http_status = 404

    def __init__(self, video_id: str) -> None:
        super().__init__(f"no video {shown(video_id)}: the id is unknown, expired or deleted", param="video_id")


class VideoNotReady(InvalidRequest):
    """The video's content was asked for before it was complete. 400, since clients retry 409 at once."""

    code = "video_not_ready"

    def __init__(self, video_id: str, *, status: str, progress: int) -> None:
        super().__init__(
            f"video {video_id} is {status} at {progress} %; poll it until its status is completed", param="video_id"
        )


class VideoFailed(InvalidRequest):
    """The video's content was asked for, but its generation failed."""

    code = "video_failed"
    http_status = 404


class RangeNotSatisfiable(InvalidRequest):
    """The Range header begins after the end of the content."""

    code = "range_not_satisfiable"
    http_status = 416

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(f"range: begins after the last of {size} bytes", param="range")


class AdminRequired(InvalidRequest):
    """A field or a route that only the server's administrator may use."""

    code = "admin_required"
    http_status = 403

    def __init__(self, name: str, *, is_field: bool = True) -> None:
        super().__init__(
            f"{name}: accepted only from the server's administrator, with `Authorization: Bearer` and the key that "
            "--admin-api-key sets",
            param=name if is_field else None,
        )


class InvalidApiKey(InvalidRequest):
    """The request carries no key of this server; the sentence never repeats what was sent."""

    code = "invalid_api_key"
    http_status = 401

    def __init__(self, *, given: bool) -> None:
        got = "got a key that this server does not know" if given else "got none"
        super().__init__(f"authorization: {got}, accepted is `Authorization: Bearer` and one of the server's keys")


class InvalidKeyFile(InvalidRequest):
    """The file of keys cannot be read, or a line of it is no key."""

    code = "invalid_key_file"


class HostNotAllowed(InvalidRequest):
    """The request calls the server by a name that it does not go by, as a web page does that was made to point here."""

    code = "host_not_allowed"
    http_status = 403

    def __init__(self, host: str) -> None:
        super().__init__(f"host: {shown(host)} is no name of this server; --allowed-host adds names")


class OriginNotAllowed(InvalidRequest):
    """A web page of another origin wants to change something."""

    code = "origin_not_allowed"
    http_status = 403

    def __init__(self, origin: str) -> None:
        super().__init__(f"origin: pages of {shown(origin)} may not use this server; --cors-origin adds origins")


class TooManyConnections(ServingError):
    """One address holds as many connections as it may."""

    code = "too_many_connections"
    http_status = 429
    retryable = True

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"this address holds {limit} connections, which is all that max-connections-per-ip allows")


class ServerDraining(ServingError):
    """The server ends what runs and takes nothing new; another one may take the request."""

    code = "server_draining"
    http_status = 503
    retryable = True


class ProbeTimedOut(ServingError):
    """The generation of /health_generate was not done in time."""

    code = "probe_timed_out"
    http_status = 503


class IdempotencyMismatch(InvalidRequest):
    """An Idempotency-Key came back with another body."""

    code = "idempotency_mismatch"
