"""Server-sent events: how they look on the wire, and a reply that is a stream of them.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang.multimodal_gen.errors import ErrorInfo, ServingError
from sglang.multimodal_gen.runtime.entrypoints.openai.generation import unless_disconnected
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import error_object, to_json

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip: an event without a meaning would reach their users."""


def event_frame(content: Mapping[str, Any]) -> bytes:
    """One event, named by the `type` of its content."""
    return b"event: %s\ndata: %s\n\n" % (str(content["type"]).encode("ascii"), to_json(content))


def comment_frame(content: Mapping[str, Any]) -> bytes:
    """What only those hear who know of it: clients skip comments."""
    return b": %s\n\n" % to_json(content)


def error_frame(info: ErrorInfo) -> bytes:
    """The end of a stream that failed, in the form that OpenAI's client raises."""
    return b"data: %s\n\n" % to_json({"error": error_object(info)})


class EventStream(Response):
    """Frames as they come, and comments while none do. It ends with an error frame when making them fails.

    An error before the first frame or comment is an ordinary reply. When the client goes, `frames` is closed.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, frames: AsyncGenerator[bytes, None], *, heartbeat_s: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # so that it is chunked, and a client sees when it is cut short
        self._request = request
        self._frames = frames
        self._heartbeat_s = heartbeat_s
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all. Raises ClientDisconnect, and the ServingError that comes before anything was sent."""
        try:
            await unless_disconnected(self._request, self._write(send))
        except ServingError as error:
            if not self._has_begun:
                raise
            await self._send(send, error_frame(error.info()))
        finally:
            await self._frames.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send) -> None:
        """Whatever comes later than the heartbeat is waited for on, so it has a task of its own."""
        coming: asyncio.Future[bytes | None] = asyncio.ensure_future(anext(self._frames, None))
        try:
            while True:
                await asyncio.wait({coming}, timeout=self._heartbeat_s)
                if not coming.done():
                    await self._send(send, KEEP_ALIVE)
                elif (frame := coming.result()) is None:
                    return
                else:
                    await self._send(send, frame)
                    coming = asyncio.ensure_future(anext(self._frames, None))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})
