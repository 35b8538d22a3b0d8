"""The Studio: a page for browsers at /studio. Plain files of the package, which need no key and know no secret."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sglang.multimodal_gen.errors import shown
from sglang.multimodal_gen.errors_http import RouteNotFound

STUDIO_DIRECTORY = Path(__file__).with_name("studio")
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_METHODS = ["GET", "HEAD"]
# Nothing from elsewhere and nothing inline: text that a user or a model wrote can never become script. Media come as
# blobs, since they are fetched with the key.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "cache-control": "no-cache",  # may be kept, but is asked for again: a new release shows at once
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, kw_only=True)
class _File:
    """One file of the page, as it is sent."""

    data: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> _File:
        """The file and what identifies its content."""
        data = path.read_bytes()
        return cls(
            data=data,
            media_type=f"{_MEDIA_TYPES[path.suffix]}; charset=utf-8",
            etag=f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        )

    def response(self, request: Request) -> Response:
        """The bytes, or 304 to a browser that has them."""
        headers = {**_HEADERS, "etag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


class StudioRoutes:
    """/studio, its files below it, and / that leads there. All files are read once: they are few and small."""

    def __init__(self, *, enabled: bool = True) -> None:
        paths = sorted(STUDIO_DIRECTORY.iterdir()) if enabled else []
        self._files = {path.name: _File.read(path) for path in paths if path.suffix in _MEDIA_TYPES}

    def add_to(self, app: FastAPI) -> None:
        """Add the routes; none when the Studio is switched off."""
        if not self._files:
            return
        routes: dict[str, Callable[..., Awaitable[Response]]] = {
            "/": self._root,
            "/studio": self._page,
            "/studio/": self._slash,
            "/studio/{name}": self._file,
        }
        for path, endpoint in routes.items():
            app.api_route(path, methods=_METHODS, response_model=None, include_in_schema=False)(endpoint)

    async def _root(self) -> Response:
        # Relative, so that it also holds behind a proxy that puts a prefix before every path.
        return RedirectResponse("studio", status_code=307)

    async def _slash(self) -> Response:
        return RedirectResponse("../studio", status_code=307)

    async def _page(self, request: Request) -> Response:
        return self._files["index.html"].response(request)

    async def _file(self, request: Request, name: str) -> Response:
        if name not in self._files:
            raise RouteNotFound(f"path: /studio/{shown(name)} does not exist; the page is at /studio")
        return self._files[name].response(request)
