"""HTTP/1.1 connections: what uvicorn's own lack, deadlines, a cap per address, and JSON for bytes that are no HTTP."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import Counter
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.errors_http import BadHttp, TooManyConnections
from sglang.multimodal_gen.runtime.entrypoints.openai.replies import error_response

_LINGER_S = 2.0


class Connection(H11Protocol):
    """One client. A connection whose next request head is not complete in time is closed, and so is one that goes on
    sending a body after it was answered. `num_by_address` counts connections where there is a cap."""

    header_timeout_s = 10.0
    max_per_address = 0
    num_by_address: ClassVar[Counter[str]] = Counter()

    _deadline: asyncio.TimerHandle | None = None
    _refused = False
    _lingers = False
    _address: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the first head."""
        super().connection_made(transport)
        # asyncio does so only when the listening socket names its protocol; without it, a reply takes 40 ms longer,
        # since its body waits for the acknowledgement of its head.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if self.max_per_address and not self._count():
            self._refuse(TooManyConnections(self.max_per_address))
            return
        self._watch_head()

    def _count(self) -> bool:
        """Whether the address may have one more connection."""
        peer = self.transport.get_extra_info("peername")
        self._address = peer[0] if peer else ""
        self.num_by_address[self._address] += 1
        return self.num_by_address[self._address] <= self.max_per_address

    def data_received(self, data: bytes) -> None:
        """Feed the parser; after a refusal, drop what still comes."""
        if not self._refused:
            super().data_received(data)
            self._watch_head()

    def on_response_complete(self) -> None:
        """Start waiting for the next head, or for the end of a body that nobody reads any more."""
        super().on_response_complete()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._stop_watching()
        if self._address is not None:
            self.num_by_address[self._address] -= 1
            if not self.num_by_address[self._address]:
                del self.num_by_address[self._address]
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        lingers = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if lingers != self._lingers:
            self._lingers = lingers
            self._stop_watching()
            if lingers:
                self._deadline = self.loop.call_later(_LINGER_S, self.transport.close)
        if lingers:
            return
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP request, or whose head is too large."""
        self._refuse(BadHttp("request: not a valid HTTP/1.1 request, or its head is too large"))

    def _refuse(self, error: ServingError) -> None:
        """Answer bytes that are no request, or no more of one; who has had the answer to the request gets no other.

        Closing with bytes unread would reset the connection and lose the answer, so the client gets a moment to go.
        """
        self._refused = True
        self._stop_watching()
        if self.conn.our_state is h11.SEND_BODY:
            self.transport.close()  # in the middle of a reply, which the client sees to be cut short
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(error)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.close)

    def _answer(self, error: ServingError) -> None:
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close"), (b"x-request-id", _request_id())]
        head = h11.Response(status_code=error.http_status, headers=headers)
        body = h11.Data(data=bytes(response.body))
        for event in (head, body, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # the request that was cut off is nobody's any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def _request_id() -> bytes:
    return f"req_{secrets.token_hex(16)}".encode("ascii")
