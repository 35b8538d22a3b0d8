"""Serving a result's bytes, from this machine or from an object store: fixed content type, no sniffing, one byte range
at most."""

from __future__ import annotations

import os
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from sglang.multimodal_gen.errors_http import RangeNotSatisfiable
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import JsonResponse, error_response
from sglang.multimodal_gen.runtime.postprocess.formats import MEDIA_TYPES
from sglang.multimodal_gen.runtime.postprocess.object_store import ObjectStore

_HEADERS = {"cache-control": "private, no-store", "content-security-policy": "default-src 'none'; sandbox"}
_ONE_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})|bytes=-([0-9]{1,18})")


def content_response(request: Request, path: Path, *, file_format: str) -> Response:
    """The file at `path`, or the range of it that the request names. Several ranges get the whole file.

    Raises:
        FileNotFoundError: the file is gone.
    """
    status = os.stat(path)  # noqa: PTH116 - the response wants this very object
    try:
        if _asked_range(request, status.st_size) is None:
            _drop_range(request)
    except RangeNotSatisfiable as error:
        return _range_not_satisfiable(error)
    return FileResponse(
        path,
        media_type=MEDIA_TYPES[file_format],
        filename=path.name,
        stat_result=status,
        headers=_HEADERS,
    )


async def stored_response(request: Request, store: ObjectStore, name: str, *, file_format: str) -> Response:
    """As `content_response`, for the object of that name, whose bytes pass through this process.

    Not a redirect to a presigned URL: the store need not be within the clients' reach, whoever got the URL would have
    the content without this server's consent, and a client that follows no redirects would save an empty file.

    Raises:
        FileNotFoundError: there is no such object.
        StorageUnavailable: the store does not answer.
    """
    facts = await store.facts(name)
    headers = {"accept-ranges": "bytes", "content-disposition": f'attachment; filename="{name}"', **_HEADERS}
    if facts.etag is not None:
        headers["etag"] = facts.etag
    status, begin, end = 200, 0, facts.size
    if request.headers.get("if-range", facts.etag) == facts.etag:
        try:
            asked = _asked_range(request, facts.size)
        except RangeNotSatisfiable as error:
            return _range_not_satisfiable(error)
        if asked is not None:
            status, (begin, end) = 206, asked
            headers["content-range"] = f"bytes {begin}-{end - 1}/{facts.size}"
    headers["content-length"] = str(end - begin)
    pieces = store.read(name, begin, end, etag=facts.etag)
    return StreamingResponse(pieces, status_code=status, media_type=MEDIA_TYPES[file_format], headers=headers)


def _asked_range(request: Request, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last of the range that is asked for; None for all.

    Raises: RangeNotSatisfiable.
    """
    match = _ONE_RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        return None
    if int(match[1] or 0) >= size or match[3] == "0":
        raise RangeNotSatisfiable(size)
    if match[3]:
        return max(0, size - int(match[3])), size
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size


def _drop_range(request: Request) -> None:
    """RFC 9110 lets a server ignore ranges; many of them cost more than the file."""
    request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]


def _range_not_satisfiable(error: RangeNotSatisfiable) -> JsonResponse:
    return error_response(error, {"content-range": f"bytes */{error.size}"})
