"""Who may come in: the host's name, the page's origin, the key, and nobody new while the server ends."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.errors_http import (
    AdminRequired,
    HeadTooLarge,
    HostNotAllowed,
    InvalidApiKey,
    OriginNotAllowed,
    ServerDraining,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.admin import set_caller
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.frame import add_reply_headers
from sglang.multimodal_gen.runtime.entrypoints.openai.keys import Caller, Keys, bearer
from sglang.multimodal_gen.runtime.entrypoints.openai.lifecycle import Lifecycle
from sglang.multimodal_gen.runtime.entrypoints.openai.request_body import drop_body

OPEN_PATHS = frozenset({"/liveness", "/health"})
"""Answered to anybody by any name: probes and load balancers have no key and call by address."""
LORA_PATHS = frozenset(
    {
        *("/v1/set_lora", "/v1/merge_lora_weights", "/v1/unmerge_lora_weights"),
        *("/v1/remove_lora", "/v1/list_loras"),
    }
)
ADMIN_PATHS = LORA_PATHS | {
    *("/flush_cache", "/release_memory_occupation", "/resume_memory_occupation", "/update_weights_from_disk"),
}
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ALL_ADDRESSES = frozenset({"0.0.0.0", "::"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_EXPOSED = "x-request-id, x-should-retry, retry-after, openai-poll-after-ms, content-disposition, content-range"
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-max-age": "600",
}


class Gate:
    """Layer below RequestFrame, which answers the errors that are raised here."""

    def __init__(self, app: ASGIApp, *, settings: HttpSettings, lifecycle: Lifecycle) -> None:
        self._app = app
        self._hosts = settings.allowed_hosts
        self._max_header_bytes = settings.max_header_bytes
        self._origins = settings.cors_origins
        self._keys = Keys(settings.api_keys, settings.admin_api_key)
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or raise why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            preflight = self._admit(scope, headers)
        except ServingError:
            # Else the client, which sends its body first and then reads, would find the connection closed.
            await drop_body(Request(scope, receive))
            raise
        if preflight is not None:
            await preflight(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> Response | None:
        """A reply when it is only asked what a page may do. Raises ServingError."""
        # The parser's own cap is for heads that come in parts: what comes at once it takes whole.
        if _head_bytes(scope) > self._max_header_bytes:
            raise HeadTooLarge(self._max_header_bytes)
        path, method = scope["path"], scope["method"]
        if path not in OPEN_PATHS:
            self._check_host(headers.get("host"))
        origin = headers.get("origin")
        if origin is not None and origin in self._origins:
            permitted = {"access-control-allow-origin": origin, "vary": "Origin"}
            add_reply_headers(scope, permitted | {"access-control-expose-headers": _EXPOSED})
            if method == "OPTIONS" and "access-control-request-method" in headers:
                asked = headers.get("access-control-request-headers", "authorization, content-type")
                return Response(status_code=204, headers=_PREFLIGHT | {"access-control-allow-headers": asked})
        elif origin is not None and method not in _READING and not _same_origin(origin, headers):
            raise OriginNotAllowed(origin)
        authorization = headers.get("authorization", "")
        caller = self._keys.caller(authorization)
        set_caller(scope, caller)
        self._check_key(path, caller, given=bearer(authorization) is not None)
        if self._lifecycle.draining and method == "POST":
            raise ServerDraining("the server is shutting down and takes nothing new; try again")
        return None

    def _check_host(self, host: str | None) -> None:
        if self._hosts is not None and host is not None and host_name(host) not in self._hosts:
            raise HostNotAllowed(host)

    def _check_key(self, path: str, caller: Caller, *, given: bool) -> None:
        if path in ADMIN_PATHS and caller.role != "admin":
            if self._keys.any and caller.role is None:
                raise InvalidApiKey(given=given)
            raise AdminRequired(path, is_field=False)
        if self._keys.required and caller.role is None and path not in OPEN_PATHS and not is_page(path):
            raise InvalidApiKey(given=given)


def is_page(path: str) -> bool:
    """Whether it is a part of the page for browsers, which asks for the key itself."""
    return path == "/" or path == "/studio" or path.startswith("/studio/")


def _head_bytes(scope: Scope) -> int:
    """About as many as came, with four for what stands around each header."""
    line = len(scope["raw_path"]) + len(scope["query_string"])
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def host_name(host: str) -> str:
    """The name in a Host header: without port, brackets and the root's dot, in small letters."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _same_origin(origin: str, headers: Mapping[str, str]) -> bool:
    """Whether the page came from the name and port that it now calls. The scheme is not known behind a proxy."""
    try:
        return bool(origin) and urlsplit(origin).netloc.lower() == headers.get("host", "").strip().lower() != ""
    except ValueError:
        return False


def hosts_for(listen: str, address: str, extra: tuple[str, ...] | None) -> frozenset[str] | None:
    """The names that a server goes by which listens on `listen`, which is `address`; None for any.

    A page of a name that was made to point at this machine sends that name. A server for this machine alone is what
    such pages look for, so it knows its own names only. One that listens on all addresses has names that it cannot
    know.
    """
    if extra is not None and "*" in extra:
        return None
    if extra is None and address in _ALL_ADDRESSES:
        return None
    return frozenset({*_LOOPBACK_NAMES, listen.lower(), address, *(host_name(name) for name in extra or ())})
