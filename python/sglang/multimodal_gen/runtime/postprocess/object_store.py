"""An object store that speaks S3: upload, remove, presigned URLs, ranges. The one module that knows obstore.

No error text of obstore's leaves this module: it holds addresses, keys that are made of prompts, and what the store
answered, which may repeat an access key. What is said instead is the code of that answer.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.envs import (
    S3_ACCESS_KEY,
    S3_BUCKET,
    S3_ENDPOINT,
    S3_SECRET_KEY,
    STORAGE_TYPE,
    StoreSettings,
)
from sglang.multimodal_gen.errors import InvalidValue, MissingPackage, StorageError, StorageUnavailable
from sglang.multimodal_gen.runtime.postprocess.formats import media_type

_MAX_RETRIES = 6
_FIRST_PAUSE = timedelta(milliseconds=100)
_LONGEST_PAUSE = timedelta(seconds=8)
_CONNECT_TIMEOUT = timedelta(seconds=5)
_MIB = 1 << 20
# A single request is all or nothing, even when we are killed: parts that never became an object stay in the bucket,
# unseen. It holds its file in memory, though, and has to be done within the timeout.
_ONE_REQUEST_BYTES = 32 * _MIB
_PART_BYTES = 16 * _MIB
_PARTS_AT_ONCE = 4
_UPLOADS_AT_ONCE = 8
# Read piece by piece, so that no request to the store lasts as long as a slow client does.
_PIECE_BYTES = 4 * _MIB


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """An uploaded file: its key in the bucket, a presigned URL, good for anybody until it expires, and its size."""

    key: str
    url: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ObjectFacts:
    """Bytes of an object and its version."""

    size: int
    etag: str | None


class ObjectStore:
    """One bucket. Safe to use from several threads; failed requests are tried again, ever less often.

    Raises: MissingPackage when obstore is not installed.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self._obstore = _library()
        self._store = _connect(settings)
        self._slots = threading.BoundedSemaphore(_UPLOADS_AT_ONCE)

    def key(self, name: str) -> str:
        """The key of a file called `name`."""
        prefix = self.settings.prefix
        return f"{prefix}/{name}" if prefix else name

    def put(self, name: str, path: str | Path) -> StoredFile:
        """Upload the file at `path` under `name`, replacing what is there. Blocks; a few run at once, others wait.

        Raises: StorageError.
        """
        source, key = Path(path), self.key(name)
        size = source.stat().st_size
        with self._slots, self._saving("did not take the result"):
            lifetime = timedelta(seconds=self.settings.url_lifetime_s)
            stored = StoredFile(key=key, url=self._obstore.sign(self._store, "GET", key, lifetime), num_bytes=size)
            self._obstore.put(
                self._store,
                key,
                source,
                attributes={"Content-Type": media_type(name)},
                use_multipart=size > _ONE_REQUEST_BYTES,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        return stored

    def has(self, name: str) -> bool:
        """Whether there is an object of that name. Raises: StorageError."""
        absent = (FileNotFoundError, self._obstore.exceptions.PermissionDeniedError)
        with self._saving("does not say whether a name is free"):
            try:
                self._obstore.head(self._store, self.key(name))
            except absent:
                # S3 answers 403 for what is not there to whoever may not list the bucket; `check` saw that what is
                # there may be asked for.
                return False
        return True

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects by key; those that are not there are fine. Blocks. Raises: StorageUnavailable."""
        with self._using("did not remove a result"):
            self._obstore.delete(self._store, list(keys))

    async def facts(self, name: str) -> ObjectFacts:
        """Raises: FileNotFoundError when there is no such object, StorageUnavailable."""
        with self._using("does not give the result"):
            found = await self._obstore.head_async(self._store, self.key(name))
        return ObjectFacts(size=found["size"], etag=found["e_tag"])

    async def read(self, name: str, begin: int, end: int, *, etag: str | None) -> AsyncIterator[bytes]:
        """The bytes from `begin` to before `end` of that version of the object, in pieces.

        Raises: FileNotFoundError, StorageUnavailable; also when another version took its place meanwhile.
        """
        for start in range(begin, end, _PIECE_BYTES):
            options: dict[str, Any] = {"range": (start, min(start + _PIECE_BYTES, end)), "if_match": etag}
            with self._using("does not give the result"):
                result = await self._obstore.get_async(self._store, self.key(name), options=options)
                piece = bytes(await result.bytes_async())
            yield piece

    def check(self) -> None:
        """Write, find and remove a small object.

        Raises: InvalidValue when there is no such bucket, StorageError when it cannot be used; the sentence names the
            variable.
        """
        probe = self.key(f".sglang-write-check-{secrets.token_hex(8)}")
        bucket, errors = self.settings.bucket, self._obstore.exceptions
        try:
            self._obstore.put(self._store, probe, b"sglang")
            self._obstore.head(self._store, probe)
            self._obstore.delete(self._store, [probe])
        except FileNotFoundError:
            raise InvalidValue(
                S3_BUCKET.name, bucket, "the name of a bucket that exists, at the endpoint and in the region given"
            ) from None
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise StorageError(
                f"{S3_ACCESS_KEY.name} and {S3_SECRET_KEY.name}: the store does not let them write to, read from and "
                f"remove from the bucket {bucket} ({_answer(error)})",
                param=S3_ACCESS_KEY.name,
            ) from None
        except errors.BaseError as error:
            raise StorageError(
                f"{S3_ENDPOINT.name}: the bucket {bucket} cannot be used at {self.settings.place} ({_answer(error)})",
                param=S3_ENDPOINT.name,
            ) from None

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        """obstore's errors as StorageError."""
        try:
            yield
        except (FileNotFoundError, self._obstore.exceptions.BaseError) as error:
            raise StorageError(f"the object store {what}: {_answer(error)}") from None

    @contextmanager
    def _using(self, what: str) -> Iterator[None]:
        """obstore's errors as StorageUnavailable; but for FileNotFoundError, unless it is the bucket that is gone."""
        try:
            yield
        except (FileNotFoundError, self._obstore.exceptions.BaseError) as error:
            answer = _answer(error)
            if isinstance(error, FileNotFoundError) and answer != "NoSuchBucket":
                raise
            raise StorageUnavailable(f"the object store {what}: {answer}") from None


def _library() -> Any:
    try:
        import obstore
    except ImportError:
        raise MissingPackage(
            f'{STORAGE_TYPE.name}: s3 needs the package obstore; install it with pip install "sglang-diffusion[s3]"',
            param=STORAGE_TYPE.name,
        ) from None
    return obstore


def _connect(settings: StoreSettings) -> Any:
    config: dict[str, Any] = {"region": settings.region}
    if settings.endpoint_url is not None:
        config["endpoint"] = settings.endpoint_url
    config["disable_bulk_delete"] = True  # not every store has it, and a result is three objects
    timeout = timedelta(seconds=settings.timeout_s)
    arguments: dict[str, Any] = {}
    if settings.keys is not None:
        access_key, secret_key = settings.keys
        # Not in `config`: a session token in the environment, of another key, would be added to it.
        credential = {"access_key_id": access_key, "secret_access_key": secret_key, "token": None, "expires_at": None}
        arguments["credential_provider"] = lambda: credential
    return _library().store.S3Store(
        settings.bucket,
        config=config,
        client_options={
            "allow_http": (settings.endpoint_url or "").startswith("http://"),
            "connect_timeout": min(_CONNECT_TIMEOUT, timeout),
            "timeout": timeout,
        },
        retry_config={
            "max_retries": _MAX_RETRIES,
            "retry_timeout": timeout,
            "backoff": {"init_backoff": _FIRST_PAUSE, "max_backoff": _LONGEST_PAUSE, "base": 2},
        },
        **arguments,
    )


def _answer(error: Exception) -> str:
    """The code that the store answered, such as `AccessDenied`, else the HTTP status, else that it did not answer."""
    text = str(error)
    if (code := re.search(r"<Code>([A-Za-z0-9.]{1,64})</Code>", text)) is not None:
        return code[1]
    if (status := re.search(r"status code: ([0-9]{3})", text)) is not None:
        return f"HTTP status {status[1]}"
    if isinstance(error, FileNotFoundError):
        return "not found"
    return "no answer"
