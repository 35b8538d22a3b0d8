"""Idempotency-Key: the same call sent again gets the first one's reply, and runs once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from sglang.multimodal_gen.configs.declare import parameters
from sglang.multimodal_gen.configs.sample.scheduling_params import SchedulingParams
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.errors_http import IdempotencyMismatch
from sglang.multimodal_gen.runtime.entrypoints.openai.admin import caller_of
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import Body
from sglang.multimodal_gen.runtime.managers.job_store import KeptReply

_HEADER = "idempotency-key"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_MAX_ENTRIES = 1000
_MAX_KEPT_BYTES = 64 * 2**20

Work = Callable[[], Coroutine[Any, Any, bytes]]
Check = Callable[[bytes], bool]


@dataclass(kw_only=True)
class _Run:
    """One call. `num_waiting` clients want its reply; when the last of them goes, the run is cancelled."""

    fingerprint: bytes
    reply: asyncio.Future[bytes]
    expires: float
    num_waiting: int = 0

    @property
    def kept(self) -> bytes:
        """The reply, once it is there; nothing until then and after a failure."""
        has_reply = self.reply.done() and not self.reply.cancelled() and self.reply.exception() is None
        return self.reply.result() if has_reply else b""


class IdempotentReplies:
    """The newest replies by key, in memory; those that created jobs come back with the jobs after a restart.

    Failures are not kept: sent again, the call runs again.
    """

    def __init__(self, *, lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        self._runs: dict[str, _Run] = {}

    async def once(self, request: Request, body: Body, work: Work, *, holds: Check = lambda reply: True) -> bytes:
        """The reply of `work`, or that of the run with the request's key; without a key `work` simply runs.

        A reply that no longer `holds`, since what it tells of is gone, is forgotten with its key.

        Raises:
            IdempotencyMismatch: the key came before, with another body.
            ServingError: what `work` raises.
        """
        identity = identity_of(request, body)
        if identity is None:
            return await work()
        key, fingerprint = identity
        run = self._find_or_start(key, fingerprint, work, holds)
        run.num_waiting += 1
        try:
            return await asyncio.shield(run.reply)
        except Exception:
            self._forget(key, run)
            raise
        finally:
            run.num_waiting -= 1
            if run.num_waiting == 0 and not run.reply.done():
                self._forget(key, run)
                run.reply.cancel()
                await asyncio.wait({run.reply})

    def remember(self, kept: KeptReply) -> None:
        """A reply of the server before this one."""
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        reply.set_result(kept.reply)
        expires = time.monotonic() + self._lifetime_s
        self._runs[kept.key] = _Run(fingerprint=kept.fingerprint, reply=reply, expires=expires)

    def _find_or_start(self, key: str, fingerprint: bytes, work: Work, holds: Check) -> _Run:
        self._forget_old()
        run = self._runs.get(key)
        if run is None or (run.kept and not holds(run.kept)):
            expires = time.monotonic() + self._lifetime_s
            run = _Run(fingerprint=fingerprint, reply=asyncio.create_task(work()), expires=expires)
            self._runs.pop(key, None)  # the new one is the newest
            self._runs[key] = run
        elif run.fingerprint != fingerprint:
            raise IdempotencyMismatch(
                f"{_HEADER}: this key came before with another request; use a new key for a new request", param=_HEADER
            )
        return run

    def _forget(self, key: str, run: _Run) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]

    def _forget_old(self) -> None:
        kept_bytes = sum(len(run.kept) for run in self._runs.values())
        now = time.monotonic()
        for key, run in list(self._runs.items()):  # oldest first
            if run.expires > now and kept_bytes <= _MAX_KEPT_BYTES and len(self._runs) < _MAX_ENTRIES:
                return
            if run.reply.done():
                kept_bytes -= len(run.kept)
                del self._runs[key]


def identity_of(request: Request, body: Body) -> tuple[str, bytes] | None:
    """The request's key and what tells its content from another's; None without a key. Raises InvalidRequest."""
    key = request.headers.get(_HEADER)
    if key is None:
        return None
    if _KEY.fullmatch(key) is None:
        raise InvalidRequest(f"{_HEADER}: accepted are 1 to 255 visible ASCII characters", param=_HEADER)
    # One caller's key is nothing to another: it must not get the other's reply.
    return f"{caller_of(request).id} {key}", _fingerprint(request, body)


def _fingerprint(request: Request, body: Body) -> bytes:
    files = [(upload.field.name, upload.digest) for upload in body.files]
    wish = {name: value for name, value in body.values.items() if name not in parameters(SchedulingParams)}
    text = json.dumps([request.url.path, wish, files], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).digest()
