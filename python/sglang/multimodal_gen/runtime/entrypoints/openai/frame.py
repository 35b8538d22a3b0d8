"""What every request gets whatever its route: an id, a log line, a count, and JSON when something goes wrong."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang.multimodal_gen.errors import InternalError, ServingError
from sglang.multimodal_gen.errors_http import BadHttp
from sglang.multimodal_gen.runtime.entrypoints.openai.lifecycle import Lifecycle
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import error_response
from sglang.multimodal_gen.runtime.observability.logging_setup import fields
from sglang.multimodal_gen.runtime.observability.metrics import HttpMetrics
from sglang.multimodal_gen.runtime.observability.private_texts import PRIVATE_TEXTS

logger = logging.getLogger("sglang.multimodal_gen.http")

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET_PATHS = frozenset({"/liveness", "/health", "/metrics"})
_CLIENT_GONE = 499
_EVENT_STREAM = "text/event-stream"
_REQUEST_ID, _ENGINE_IDS, _REPLY_HEADERS = "request_id", "engine_request_ids", "reply_headers"


class RequestFrame:
    """Outermost layer of the application."""

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics, lifecycle: Lifecycle) -> None:
        self._app = app
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._lifecycle)
        self._metrics.in_flight.inc()
        try:
            _refuse_smuggling(scope)
            await self._app(scope, receive, exchange.send)
        except ClientDisconnect:
            exchange.status = _CLIENT_GONE
        except ServingError as error:
            await exchange.answer(error, receive)
        except Exception:  # the one broad catch of the HTTP side: the traceback goes to the log, a plain 500 out
            logger.exception("the request failed", extra=fields(request_id=exchange.request_id))
            await exchange.answer(InternalError("an internal error; the server's log has the details"), receive)
        finally:
            self._metrics.in_flight.dec()
            exchange.end(self._metrics)


class _Exchange:
    """One request and its reply."""

    def __init__(self, scope: Scope, send: Send, lifecycle: Lifecycle) -> None:
        self._scope = scope
        self._lifecycle = lifecycle
        self._is_waited_for = True
        lifecycle.begin()
        self._send = send
        self._began = time.perf_counter()
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self.request_id = given if _CLIENT_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        self.status = 0
        self._state = scope.setdefault("state", {})
        self._state[_REQUEST_ID] = self.request_id

    async def send(self, message: Message) -> None:
        """Pass a part of the reply on; its head gets the headers that every reply has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
            for name, value in self._state.get(_REPLY_HEADERS, {}).items():
                headers[name] = value
            if headers.get("content-type", "").startswith(_EVENT_STREAM):
                self._release()
        await self._send(message)

    async def answer(self, error: ServingError, receive: Receive) -> None:
        """Send an error, unless a reply has begun; then the connection ends early, which clients see."""
        if self.status == 0:
            await error_response(error)(self._scope, receive, self.send)

    def _release(self) -> None:
        if self._is_waited_for:
            self._is_waited_for = False
            self._lifecycle.end()

    def end(self, metrics: HttpMetrics) -> None:
        """Count the request and write its line, without query, headers or body: those may hold what users wrote."""
        self._release()
        PRIVATE_TEXTS.forget(_owner(self._scope))
        seconds = time.perf_counter() - self._began
        route = getattr(self._scope.get("route"), "path", None)
        metrics.answered(self._scope["method"], route=route, status=self.status, seconds=seconds)
        facts: dict[str, Any] = {
            "method": self._scope["method"][:20],
            "path": self._scope["raw_path"].decode("ascii", "replace")[:200],
            "status": self.status,
            "ms": round(seconds * 1000, 1),
        }
        retries = self._headers.get("x-stainless-retry-count", "0")
        if retries.isdigit() and retries != "0":
            facts["retry"] = int(retries[:3])
        message = " ".join(f"{name}=%s" for name in facts)
        level = logging.DEBUG if self._scope["path"] in _QUIET_PATHS else logging.INFO
        ids = {"request_id": self.request_id, "request_ids": self._state.get(_ENGINE_IDS, [])}
        logger.log(level, message, *facts.values(), extra=fields(**ids, **facts))


def http_request_id(request: Request) -> str:
    """The id that the reply's `x-request-id` will hold: the client's own, or one drawn for it."""
    return str(request.scope["state"][_REQUEST_ID])


def add_reply_headers(scope: Scope, headers: Mapping[str, str]) -> None:
    """Headers of the reply to this request, whoever answers it and with whatever status."""
    scope["state"].setdefault(_REPLY_HEADERS, {}).update(headers)


def link_engine_requests(request: Request, ids: Iterable[str]) -> None:
    """Name the engine's requests that this HTTP request started, in its log line."""
    request.scope["state"].setdefault(_ENGINE_IDS, []).extend(ids)


def keep_private(request: Request, texts: Iterable[str]) -> None:
    """Keep what the client wrote out of errors and tracebacks in the log, until the reply has been sent."""
    PRIVATE_TEXTS.keep(_owner(request.scope), texts)


def _owner(scope: Scope) -> str:
    """Not the request id: two clients may send the same one."""
    return str(id(scope["state"]))


def _refuse_smuggling(scope: Scope) -> None:
    """Two statements of one body's length are how requests are smuggled past proxies (RFC 9112, 6.1)."""
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        raise BadHttp("headers: transfer-encoding and content-length exclude each other")
