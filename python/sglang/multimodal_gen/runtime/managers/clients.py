"""The scheduler's side of the entry points: who said hello, what they send, what they are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import msgspec
import zmq

from sglang.multimodal_gen.errors import InvalidRequest, ProtocolMismatch
from sglang.multimodal_gen.runtime.managers.messages import (
    PROTOCOL_VERSION,
    Codec,
    EngineState,
    Hello,
    Message,
    Refused,
    ToScheduler,
    Welcome,
    encode,
)

logger = logging.getLogger(__name__)


class Clients:
    """All entry points behind one ROUTER socket; a client is known by its ZMQ identity."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._names: dict[bytes, str] = {}
        self._codec = Codec(ToScheduler)

    def receive(self) -> Iterator[tuple[bytes, ToScheduler]]:
        """Messages that wait, with their senders. What does not decode is refused alone."""
        while True:
            try:
                client, payload = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:  # not two frames: no client of ours
                continue
            try:
                message = cast(ToScheduler, self._codec.decode(payload))
            except msgspec.DecodeError as error:
                self.send(client, Refused(error=InvalidRequest(f"the message does not decode: {error}").info()))
                continue
            yield client, message

    def greet(self, client: bytes, message: Hello, state: EngineState) -> None:
        """Answer a Hello: Welcome and the present state, or Refused for another version of the protocol."""
        if message.protocol_version != PROTOCOL_VERSION:
            error = ProtocolMismatch(
                f"protocol_version: got {message.protocol_version}, this scheduler speaks {PROTOCOL_VERSION}"
            )
            self.send(client, Refused(error=error.info()))
            return
        self._names[client] = message.client_name
        self.send(client, Welcome(protocol_version=PROTOCOL_VERSION))
        self.send(client, state)

    def forget(self, name: str) -> set[bytes]:
        """The clients that called themselves `name` are gone; their identities."""
        gone = {identity for identity, known in self._names.items() if known == name}
        for identity in gone:
            del self._names[identity]
        return gone

    def send(self, client: bytes, message: Message) -> None:
        """One message, never blocking."""
        try:
            self.socket.send_multipart([client, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("a client does not take its events; one was dropped")

    def broadcast(self, message: Message) -> None:
        """The same message to everybody who said hello."""
        for client in self._names:
            self.send(client, message)
