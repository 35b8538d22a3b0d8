"""Reading a request's body: JSON and multipart/form-data, capped while it arrives, nothing accepted twice."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from sglang.multimodal_gen.errors import (
    DuplicateParameter,
    InvalidRequest,
    InvalidType,
    InvalidUnicode,
    StorageError,
    shown,
)
from sglang.multimodal_gen.errors_http import (
    BodyTimeout,
    BodyTooLarge,
    InvalidJson,
    InvalidMultipart,
    UnsupportedMediaType,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.uploads import FileField, Upload, Uploads

_MAX_PARTS = 128
_DRAINED_BYTES = 16 * 2**20
_DRAIN_SECONDS = 2.0
# Where clients of OpenAI's library put fields that it does not know, when they build the body by hand.
_EXTRA = "extra_body"
# How far values may lie within each other. Far below what the parser does, since whoever walks through a value needs
# a stack as well.
_MAX_DEPTH = 64
# `name`, `name[]` of a list, `name[key]` of an object.
_PART_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NAME_OPTION = re.compile(rb";\s*name\s*=", re.IGNORECASE)
_PLAIN_ENCODINGS = frozenset({b"7bit", b"8bit", b"binary"})


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """How much of a body is read, and for how long it is waited for: `timeout_s`, and longer for what comes at
    `min_bytes_per_s` at least. Of fields that are no files `max_bytes` are read; `max_upload_bytes` of a multipart body
    and `max_json_upload_bytes` of a JSON one in calls that take files."""

    max_bytes: int = 2**20
    timeout_s: float = 30.0
    min_bytes_per_s: int = 2**16
    max_upload_bytes: int = 256 * 2**20
    max_json_upload_bytes: int = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Body:
    """The fields of a request. Those in `spelled` came as text (multipart) and are read by their declared type. `files`
    must be closed."""

    values: dict[str, Any]
    spelled: frozenset[str] = frozenset()
    files: tuple[Upload, ...] = ()

    def close(self) -> None:
        """Forget the files."""
        for upload in self.files:
            upload.close()


async def read_json(request: Request, limits: BodyLimits) -> Body:
    """The JSON object that the request carries.

    Raises:
        ServingError: another content type, too many bytes, too slow, not one JSON object, a key given twice.
    """
    _refuse_encoded(request)
    if _media_type(request) != "application/json":
        raise _wrong_media_type(request, "application/json")
    return Body(values=await _read_object(request, limits, max_bytes=limits.max_bytes))


def has_body(request: Request) -> bool:
    """Whether the request comes with a body, as far as its head says."""
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


async def _read_object(request: Request, limits: BodyLimits, *, max_bytes: int) -> dict[str, Any]:
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise UnsupportedMediaType(f"content-type: got charset {shown(charset.decode('latin-1'))}, accepted is utf-8")
    data = bytearray()
    await _receive(request, limits, data.extend, max_bytes=max_bytes)
    if len(data) <= limits.max_bytes:
        return _with_extra(_json_object(bytes(data)))
    return _with_extra(await asyncio.to_thread(_json_object, bytes(data)))  # may take a tenth of a second


async def read_json_or_multipart(
    request: Request, limits: BodyLimits, *, files: Mapping[str, FileField], refuse_file: Callable[[str], None]
) -> Body:
    """The fields of a JSON or a multipart body, and its files: parts of the fields `files`, in JSON their data URLs.
    `refuse_file(name)` raises when a part of another field is a file. The caller closes the body.

    Raises:
        ServingError: as `read_json`; a part that is not UTF-8 or has no name; a file that is not accepted.
    """
    uploads = Uploads(files)
    try:
        values, spelled = await _read_fields(request, limits, uploads, refuse_file)
        rest = await asyncio.to_thread(uploads.take, values) if uploads.are_among(values) else values
    except BaseException:
        uploads.close()
        raise
    return Body(values=rest, spelled=spelled & rest.keys(), files=tuple(uploads.files))


async def _read_fields(
    request: Request, limits: BodyLimits, uploads: Uploads, refuse_file: Callable[[str], None]
) -> tuple[dict[str, Any], frozenset[str]]:
    """The fields that are no parts with a file, and the names of those that came as text."""
    _refuse_encoded(request)
    media_type = _media_type(request)
    if media_type == "application/json":
        return await _read_object(request, limits, max_bytes=limits.max_json_upload_bytes), frozenset()
    if media_type != "multipart/form-data":
        raise _wrong_media_type(request, "application/json or multipart/form-data")
    _, options = parse_options_header(request.headers["content-type"])
    if not options.get(b"boundary"):
        raise InvalidMultipart("body: the content type multipart/form-data has no boundary")
    form = _Form(uploads, refuse_file, max_text_bytes=limits.max_bytes)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        await _receive(request, limits, parser.write, max_bytes=limits.max_upload_bytes)
    except FormParserError:
        raise InvalidMultipart("body: not valid multipart/form-data") from None
    if not form.complete:
        raise InvalidMultipart("body: the multipart/form-data ends before its closing boundary")
    return form.fields()


class _Form:
    """Collects the parts of a multipart body: texts here, files in `uploads`."""

    def __init__(self, uploads: Uploads, refuse_file: Callable[[str], None], *, max_text_bytes: int) -> None:
        self.complete = False
        self._uploads = uploads
        self._refuse_file = refuse_file
        self._max_text_bytes = max_text_bytes
        self._num_text_bytes = 0
        self._num_parts = 0
        self._upload: Upload | None = None
        self._single_files: set[str] = set()
        self._fields: list[tuple[str, bytes]] = []
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._encoding = b""
        self._name = ""
        self._data = bytearray()

    def callbacks(self) -> Any:
        """What the parser calls, part by part."""
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": lambda data, start, end: self._on_part_data(data[start:end]),
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise InvalidMultipart(f"body: more than the {_MAX_PARTS} parts that are accepted")
        self._upload = None
        self._disposition = self._encoding = b""
        self._data.clear()

    def _on_header_end(self) -> None:
        match bytes(self._header).lower():
            case b"content-disposition":
                # Two of them, or two names in one, and whoever looks at the request before us may read the other.
                if self._disposition:
                    raise InvalidMultipart("body: a part has more than one Content-Disposition")
                self._disposition = bytes(self._header_value)
            case b"content-transfer-encoding":
                self._encoding = bytes(self._header_value).strip().lower()
        self._header.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _utf8(options.get(b"name", b""), "a part's name", param=None)
        if not self._name:
            raise InvalidMultipart("body: a part has no name")
        if len(_NAME_OPTION.findall(_QUOTED.sub(b'""', self._disposition))) > 1:
            raise InvalidMultipart("body: a part has more than one name")
        if self._encoding and self._encoding not in _PLAIN_ENCODINGS:
            encoding = shown(self._encoding.decode("latin-1"))
            raise InvalidMultipart(f"body: a part's Content-Transfer-Encoding is {encoding}, accepted is binary")
        if b"filename" in options or b"filename*" in options:
            self._begin_file()

    def _begin_file(self) -> None:
        """`image` is one file, `image[]` one of several; the file's own name is not looked at."""
        name = self._name.removesuffix("[]")
        if name not in self._uploads.fields:
            self._refuse_file(name.partition("[")[0])
        if name == self._name and name in self._single_files:
            raise DuplicateParameter(name)
        self._single_files.add(self._name)
        self._upload = self._uploads.begin(name)

    def _on_part_data(self, data: bytes) -> None:
        if self._upload is not None:
            self._upload.write(data)
            return
        self._num_text_bytes += len(data)
        if self._num_text_bytes > self._max_text_bytes:
            raise BodyTooLarge(self._max_text_bytes)
        self._data.extend(data)

    def _on_part_end(self) -> None:
        if self._upload is None:
            self._fields.append((self._name, bytes(self._data)))

    def _on_end(self) -> None:
        self.complete = True

    def fields(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Those that are no files; `name[]` collects a list, `name[key]` spells an object, and nothing else comes
        twice. Which fields may be lists and objects is for whoever reads them by their types."""
        values: dict[str, Any] = {}
        lists = set()
        for part, data in self._fields:
            match = _PART_NAME.fullmatch(part)
            name, keys = match.groups() if match else (part, "")
            text = _utf8(data, name, param=name)
            if name in values and not (keys == "[]" and name in lists):
                raise DuplicateParameter(name)
            if keys == "[]":
                lists.add(name)
                values.setdefault(name, []).append(text)
            else:
                values[name] = {keys[1:-1]: text} if keys else text
        spelled = frozenset(values) - {_EXTRA}
        if _EXTRA in values:
            if not isinstance(values[_EXTRA], str):
                raise InvalidType(_EXTRA, values[_EXTRA], "a JSON object of further fields as one text")
            values[_EXTRA] = _json_object(values[_EXTRA].encode())
        return _with_extra(values), spelled


def _utf8(data: bytes, what: str, *, param: str | None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidUnicode(f"{shown(what)}: not valid UTF-8", param=param) from None


def _refuse_encoded(request: Request) -> None:
    """Raises UnsupportedMediaType for a body that is compressed."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedMediaType(f"content-encoding: got {shown(encoding)}, accepted is a body that is not encoded")


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _wrong_media_type(request: Request, accepted: str) -> UnsupportedMediaType:
    given = request.headers.get("content-type") or "no content type"
    return UnsupportedMediaType(f"content-type: got {shown(given)}, accepted is {accepted}")


async def _receive(request: Request, limits: BodyLimits, take: Callable[[bytes], object], *, max_bytes: int) -> None:
    """Hand the body's chunks to `take`. When they are refused, the rest is read and dropped for a moment, so that the
    answer reaches a client that reads only once it has sent everything."""
    stream = request.stream()
    deadline = time.monotonic() + limits.timeout_s
    num_bytes = 0
    try:
        while (chunk := await _next_chunk(stream, deadline + num_bytes / limits.min_bytes_per_s)) is not None:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise BodyTooLarge(max_bytes)
            take(chunk)
    except (InvalidRequest, StorageError, FormParserError) as error:
        if not isinstance(error, BodyTimeout):
            await _drain(stream)
        raise


async def _next_chunk(stream: AsyncIterator[bytes], deadline: float) -> bytes | None:
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await anext(stream, None)
    except TimeoutError:
        raise BodyTimeout("body: arrived too slowly; send it without pauses") from None


async def drop_body(request: Request) -> None:
    """Read and drop what a refused request still sends, for a moment. A client that waits to be asked for its body
    is not asked."""
    if has_body(request) and "expect" not in request.headers:
        await _drain(request.stream())


async def _drain(stream: AsyncIterator[bytes]) -> None:
    deadline = time.monotonic() + _DRAIN_SECONDS
    num_bytes = 0
    try:
        while num_bytes < _DRAINED_BYTES and (chunk := await _next_chunk(stream, deadline)) is not None:
            num_bytes += len(chunk)
    except BodyTimeout:
        return


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):  # the latter for an object nested deeper than the interpreter's stack
        raise InvalidJson("body: not valid JSON in UTF-8") from None
    if not isinstance(found, dict):
        raise InvalidJson(f"body: got JSON of another kind ({type(found).__name__}), accepted is an object")
    _check_depth(found)
    return found


def _check_depth(value: dict[str, Any]) -> None:
    """Raises InvalidJson for values that lie too deep within each other. Level by level, so that it needs no stack."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise InvalidJson(f"body: JSON nested deeper than the {_MAX_DEPTH} levels that are accepted")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DuplicateParameter(name)
        found[name] = value
    return found


def _with_extra(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the fields of `extra_body` beside the others."""
    extra = values.get(_EXTRA)
    if extra is None:
        return {name: value for name, value in values.items() if name != _EXTRA}
    if not isinstance(extra, dict):
        raise InvalidType(_EXTRA, extra, "an object of further fields")
    merged = {name: value for name, value in values.items() if name != _EXTRA}
    for name, value in extra.items():
        if name in merged:
            raise DuplicateParameter(name)
        merged[name] = value
    return merged
