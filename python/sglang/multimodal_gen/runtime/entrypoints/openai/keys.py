"""The server's keys: whose request is this?"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang.multimodal_gen.errors_http import InvalidKeyFile
from sglang.multimodal_gen.runtime.server_args import key_problem

Role = Literal["admin", "user"]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request. `id` tells callers apart without telling their keys; it is the same after a restart, and None
    for whoever has no key of this server."""

    role: Role | None = None
    id: str | None = None


NOBODY = Caller()


class Keys:
    """Digests of the keys, so that each comparison takes as long as any other."""

    def __init__(self, user_keys: Iterable[str], admin_key: str | None) -> None:
        self._admin = None if admin_key is None else _digest(admin_key)
        self._users = tuple(_digest(key) for key in user_keys)

    @property
    def any(self) -> bool:
        """Whether there is any key at all."""
        return self._admin is not None or bool(self._users)

    @property
    def required(self) -> bool:
        """Whether requests must carry one."""
        return bool(self._users)

    def caller(self, authorization: str) -> Caller:
        """Whose key an Authorization header carries. All keys are compared, also after one was found."""
        given = bearer(authorization)
        if given is None:
            return NOBODY
        digest = _digest(given)
        is_user = False
        for key in self._users:
            is_user |= hmac.compare_digest(digest, key)
        is_admin = self._admin is not None and hmac.compare_digest(digest, self._admin)
        if not (is_user or is_admin):
            return NOBODY
        # A digest of the digest: what is stored with a job must not be what keys are compared with.
        return Caller(role="admin" if is_admin else "user", id=hashlib.sha256(digest).hexdigest()[:32])


def bearer(authorization: str) -> str | None:
    """The key in an Authorization header, None when there is none."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_key_file(path: str) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and those that begin with # say nothing.

    Raises:
        InvalidKeyFile: it cannot be read, a line is no key, or it holds none, which would leave the server open.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidKeyFile(f"api_key_file: cannot read {path}: {error.strerror}", param="api_key_file") from None
    except UnicodeDecodeError:
        raise InvalidKeyFile(f"api_key_file: {path} is not UTF-8 text", param="api_key_file") from None
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        problem = key_problem(key)
        if problem is not None:
            raise InvalidKeyFile(f"api_key_file: {path}, line {number}: accepted are {problem}", param="api_key_file")
        keys.append(key)
    if not keys:
        raise InvalidKeyFile(f"api_key_file: {path} holds no key, accepted is one a line", param="api_key_file")
    return tuple(dict.fromkeys(keys))
