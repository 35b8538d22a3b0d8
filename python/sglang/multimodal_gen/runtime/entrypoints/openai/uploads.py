"""Files that come with a request: parts of a multipart body, or data URLs. No name of a client's is ever used."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

from sglang.multimodal_gen.errors import (
    DuplicateParameter,
    IncompatibleParameters,
    InvalidRequest,
    InvalidType,
    UnsupportedParameter,
    storage_error,
)
from sglang.multimodal_gen.errors_media import (
    ImageTooLarge,
    InvalidImage,
    InvalidMask,
    InvalidVideo,
    TooManyImages,
    UrlNotAllowed,
    VideoTooLarge,
)
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import MAX_IMAGE_BYTES, MAX_MASK_BYTES, MAX_VIDEO_BYTES

MAX_FILE_BYTES = {"image": MAX_IMAGE_BYTES, "mask": MAX_MASK_BYTES, "video": MAX_VIDEO_BYTES}
_SPOOLED_BYTES = 2**20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_DATA_URL = re.compile(r"data:([^;,]*)(;[^,]*)?,")
URL_KEYS = ("image_url", "video_url")
"""Keys of the objects that may stand in place of a data URL, with it as their only value."""


@dataclass(frozen=True, kw_only=True)
class FileField:
    """A field of a call that takes files. `alias`: another name that JSON bodies may use. `by_id`: in place of a file,
    `{"id": …}` names a result of this server; the id is then the field `NAME_id`."""

    name: str
    kind: Literal["image", "mask", "video"]
    help: str
    max_files: int = 1
    alias: str | None = None
    by_id: bool = False

    def invalid(self, problem: str) -> InvalidRequest:
        """What is wrong with its content."""
        error = {"image": InvalidImage, "mask": InvalidMask, "video": InvalidVideo}[self.kind]
        return error(f"{self.name}: {problem}", param=self.name)

    def too_large(self) -> InvalidRequest:
        """A file has too many bytes."""
        problem = f"larger than the {MAX_FILE_BYTES[self.kind]} bytes that are accepted"
        if self.kind == "mask":
            return self.invalid(problem)
        error = ImageTooLarge if self.kind == "image" else VideoTooLarge
        return error(f"{self.name}: {problem}", param=self.name)


class Upload:
    """One file. Beyond a megabyte it lies on disk, in a file without a name that goes with this object."""

    def __init__(self, field: FileField) -> None:
        self.field = field
        self._num_bytes = 0
        self._hash = hashlib.sha256()
        self.file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES))  # noqa: SIM115 - `close`

    @property
    def digest(self) -> str:
        """SHA-256 of its content."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """The next bytes. Raises ImageTooLarge, VideoTooLarge, InvalidMask, InsufficientStorage, StorageError."""
        self._num_bytes += len(data)
        if self._num_bytes > MAX_FILE_BYTES[self.field.kind]:
            raise self.field.too_large()
        self._hash.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            raise storage_error("the server cannot store the upload", error) from error

    def close(self) -> None:
        """Forget the content."""
        self.file.close()


class Uploads:
    """The files of one request, in the order in which they came."""

    def __init__(self, fields: Mapping[str, FileField]) -> None:
        self.fields = fields
        self.files: list[Upload] = []

    def are_among(self, names: Collection[str]) -> bool:
        """Whether one of these is a file field, or another name of it."""
        return any(field.name in names or field.alias in names for field in self.fields.values())

    def begin(self, name: str) -> Upload:
        """A file of this field follows. Raises TooManyImages, DuplicateParameter."""
        field = self.fields[name]
        if sum(upload.field is field for upload in self.files) >= field.max_files:
            if field.max_files == 1:
                raise DuplicateParameter(name)
            raise TooManyImages(f"{name}: more than the {field.max_files} images that are accepted", param=name)
        self.files.append(Upload(field))
        return self.files[-1]

    def take(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of other fields; those of file fields are data URLs, which become files. May take a while.

        Raises:
            InvalidRequest: UrlNotAllowed for an address, else what is wrong with the value.
        """
        rest = dict(values)
        for field in self.fields.values():
            names = [name for name in (field.name, field.alias) if name in rest]
            given = {name: value for name in names if (value := rest.pop(name)) is not None}
            if len(given) > 1:
                raise IncompatibleParameters(
                    f"{field.alias}: says the same as {field.name}, accepted is one of them", param=field.alias
                )
            for value in given.values():
                if field.by_id and isinstance(value, dict) and value.keys() == {"id"}:
                    _set_id(rest, field, value["id"])
                    continue
                for each in value if isinstance(value, list) else [value]:
                    self.begin(field.name).write(_bytes_of(field, each))
        return rest

    def close(self) -> None:
        """Forget all content."""
        for upload in self.files:
            upload.close()


def _set_id(values: dict[str, Any], field: FileField, given: Any) -> None:
    """Put the id of `{"id": …}` where a field of its own has ids. Raises IncompatibleParameters."""
    name = f"{field.name}_id"
    if values.get(name) is not None:
        raise IncompatibleParameters(f"{name}: says the same as {field.name}, accepted is one of them", param=name)
    values[name] = given


def of_field(uploads: Iterable[Upload], name: str) -> list[BinaryIO]:
    """The files of one field."""
    return [upload.file for upload in uploads if upload.field.name == name]


def _bytes_of(field: FileField, value: Any) -> bytes:
    if isinstance(value, dict) and "file_id" in value:
        raise UnsupportedParameter(field.name, "no files are kept here: send the bytes instead of a file_id")
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in URL_KEYS:
        value = next(iter(value.values()))
    if not isinstance(value, str):
        raise InvalidType(field.name, value, "a data URL, or an object with one as its image_url")
    match = _DATA_URL.match(value)
    if match is None:
        if _SCHEME.match(value):
            raise UrlNotAllowed(field.name)
        raise field.invalid("is no data URL, accepted is data:TYPE;base64, and the bytes")
    if not match[1].startswith("video/" if field.kind == "video" else "image/") and match[1] != "image/gif":
        raise field.invalid(f"the data URL's type is not that of {'a video' if field.kind == 'video' else 'an image'}")
    try:
        if match[2] is None or not match[2].endswith(";base64"):
            raise binascii.Error
        return base64.b64decode(value[match.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise field.invalid("the data URL's content is not base64") from None
