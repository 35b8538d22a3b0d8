"""JSON replies, and the one place where an error becomes an HTTP answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from sglang.multimodal_gen.errors import ErrorInfo, ServingError

RETRY_AFTER_S = 2
# A file path in a sentence: a slash at the start of a word, up to white space or a closing mark.
_PATH = re.compile(r"(?<![\w.:/])/[^\s'\",;:)]+")


def to_json(content: Any) -> bytes:
    """JSON in ASCII: lone surrogates in a client's text come back escaped instead of failing to encode."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class JsonResponse(Response):
    """A reply in JSON; bytes are taken as JSON already."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return content if isinstance(content, bytes) else to_json(content)


def without_paths(message: str) -> str:
    """`message` with every path of this machine blotted out."""
    return _PATH.sub("…", message)


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_object(info: ErrorInfo) -> dict[str, Any]:
    """OpenAI's error object. Sentences about our own faults lose their paths; those about the input have none."""
    return {
        "message": info.message if info.http_status < 500 else without_paths(info.message),
        "type": _error_type(info.http_status),
        "param": info.param,
        "code": info.code,
    }


def error_headers(info: ErrorInfo) -> dict[str, str]:
    """What tells a client whether, and when, the same request may succeed.

    OpenAI's client retries every 5xx, 408, 409 and 429 twice unless `x-should-retry` says otherwise. A 408 says nothing
    of it: the network may do better the next time.
    """
    if info.http_status == 401:
        return {"www-authenticate": "Bearer"}
    if info.http_status < 500 and info.http_status != 409 and not info.retryable:
        return {}
    if info.retryable:
        return {"x-should-retry": "true", "retry-after": str(info.retry_after_s or RETRY_AFTER_S)}
    return {"x-should-retry": "false"}


def error_response(error: ServingError, headers: Mapping[str, str] | None = None) -> JsonResponse:
    """The answer for any deliberate error."""
    info = error.info()
    return JsonResponse(
        {"error": error_object(info)},
        status_code=info.http_status,
        headers={**error_headers(info), **(headers or {})},
    )
