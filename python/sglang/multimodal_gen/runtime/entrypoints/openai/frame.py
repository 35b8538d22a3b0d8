"""What every request gets whatever its route: an id, a log line, and JSON when something goes wrong."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang.multimodal_gen.errors import BadHttp, InternalError, ServingError
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import error_response

logger = logging.getLogger("sglang.multimodal_gen.http")

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET_PATHS = frozenset({"/liveness", "/health"})
_CLIENT_GONE = 499


class RequestFrame:
    """Outermost layer of the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        try:
            _refuse_smuggling(scope)
            await self._app(scope, receive, exchange.send)
        except ClientDisconnect:
            exchange.status = _CLIENT_GONE
        except ServingError as error:
            await exchange.answer(error, receive)
        except Exception:  # the one broad catch of the HTTP side: the traceback goes to the log, a plain 500 out
            logger.exception("request %s failed", exchange.request_id)
            await exchange.answer(InternalError("an internal error; the server's log has the details"), receive)
        finally:
            exchange.log()


class _Exchange:
    """One request and its reply."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._began = time.perf_counter()
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self.request_id = given if _CLIENT_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        self.status = 0

    async def send(self, message: Message) -> None:
        """Pass a part of the reply on; its head gets the headers that every reply has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def answer(self, error: ServingError, receive: Receive) -> None:
        """Send an error, unless a reply has begun; then the connection ends early, which clients see."""
        if self.status == 0:
            await error_response(error)(self._scope, receive, self.send)

    def log(self) -> None:
        """One line without query, headers or body: those may hold what users wrote."""
        fields: dict[str, Any] = {
            "method": self._scope["method"],
            "path": self._scope["raw_path"].decode("ascii", "replace")[:200],
            "status": self.status,
            "ms": round((time.perf_counter() - self._began) * 1000, 1),
            "request_id": self.request_id,
        }
        retries = self._headers.get("x-stainless-retry-count", "0")
        if retries.isdigit() and retries != "0":
            fields["retry"] = int(retries[:3])
        level = logging.DEBUG if self._scope["path"] in _QUIET_PATHS else logging.INFO
        logger.log(level, " ".join(f"{name}=%s" for name in fields), *fields.values())


def _refuse_smuggling(scope: Scope) -> None:
    """Two statements of one body's length are how requests are smuggled past proxies (RFC 9112, 6.1)."""
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        raise BadHttp("headers: transfer-encoding and content-length exclude each other")
