"""Server-sent events, cut out of a body as it comes. Source: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

_LINE_END = re.compile(r"\r\n|\n|\r")


class EventDecoder:
    """Gives each event as (its type, its data); comments and what has no data are left out."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
        self._pieces: list[str] = []
        self._data: list[str] = []
        self._type = ""

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        """The events that end in this part of the body."""
        text = self._decode(chunk)
        if "\n" not in text and "\r" not in text:
            self._pieces.append(text)  # of one long line, which is joined once
            return
        text = "".join([*self._pieces, text])
        # A carriage return at the end may be half of a line's end.
        held_back = "\r" if text.endswith("\r") else ""
        *lines, rest = _LINE_END.split(text.removesuffix(held_back))
        self._pieces = [rest + held_back]
        for line in lines:
            yield from self._line(line)

    def _line(self, line: str) -> Iterator[tuple[str, str]]:
        if not line:
            if self._data:
                yield self._type, "\n".join(self._data)
            self._data, self._type = [], ""
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
