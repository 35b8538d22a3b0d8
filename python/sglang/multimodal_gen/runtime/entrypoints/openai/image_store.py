"""Images that wait to be fetched by URL."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from sglang.multimodal_gen.errors import storage_error
from sglang.multimodal_gen.errors_http import ImageNotFound

_ID = re.compile(r"img_[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """Where an image lies, its format and size, and when it may be forgotten (monotonic seconds)."""

    path: Path
    file_format: str
    num_bytes: int
    expires: float


class ImageStore:
    """The newest `capacity` images, at most `max_bytes` or one of any size, each for `lifetime_s` seconds."""

    def __init__(self, directory: Path, *, capacity: int, max_bytes: int, lifetime_s: float) -> None:
        self._directory = directory
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lifetime_s = lifetime_s
        self._images: dict[str, StoredImage] = {}

    async def put(self, data: bytes, *, file_format: str) -> str:
        """Keep an image; the id is 128 random bits.

        Raises:
            InsufficientStorage: no room.
            StorageError: it cannot be written.
        """
        image_id = f"img_{secrets.token_hex(16)}"
        path = self._directory / f"{image_id}.{file_format}"
        try:
            await asyncio.to_thread(self._write, path, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise storage_error("the server cannot store the image", error) from error
        self._images[image_id] = StoredImage(
            path=path, file_format=file_format, num_bytes=len(data), expires=time.monotonic() + self._lifetime_s
        )
        self._num_bytes += len(data)
        self._forget_old()
        return image_id

    def get(self, image_id: str) -> StoredImage:
        """The stored image. Raises ImageNotFound."""
        self._forget_old()
        if _ID.fullmatch(image_id) is None or image_id not in self._images:
            raise ImageNotFound(image_id)
        return self._images[image_id]

    def _write(self, path: Path, data: bytes) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(data)

    def _forget_old(self) -> None:
        now = time.monotonic()
        for image_id, image in list(self._images.items()):  # oldest first
            fits = self._num_bytes <= self._max_bytes or len(self._images) == 1
            if image.expires > now and fits and len(self._images) <= self._capacity:
                return
            del self._images[image_id]
            self._num_bytes -= image.num_bytes
            image.path.unlink(missing_ok=True)
