"""Serving a result's bytes: fixed content type, no sniffing, one byte range at most."""

from __future__ import annotations

import os
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from sglang.multimodal_gen.errors import RangeNotSatisfiable
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse, error_response

MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "gif": "image/gif",
    "webm": "video/webm",
}
_ONE_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})|bytes=-([0-9]{1,18})")


def content_response(request: Request, path: Path, *, file_format: str) -> Response:
    """The file at `path`, or the range of it that the request names. Several ranges get the whole file.

    Raises:
        FileNotFoundError: the file is gone.
    """
    status = os.stat(path)  # noqa: PTH116 - the response wants this very object
    asked = request.headers.get("range")
    if asked is not None:
        match = _ONE_RANGE.fullmatch(asked.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            _drop_range(request)
        elif int(match[1] or 0) >= status.st_size or match[3] == "0":
            return _range_not_satisfiable(status.st_size)
    return FileResponse(
        path,
        media_type=MEDIA_TYPES[file_format],
        filename=path.name,
        stat_result=status,
        headers={"cache-control": "private, no-store", "content-security-policy": "default-src 'none'; sandbox"},
    )


def _drop_range(request: Request) -> None:
    """RFC 9110 lets a server ignore ranges; many of them cost more than the file."""
    request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]


def _range_not_satisfiable(size: int) -> JsonResponse:
    return error_response(RangeNotSatisfiable(size), {"content-range": f"bytes */{size}"})
