"""What users wrote and this process holds at present: no warning, error or traceback may repeat it."""

from __future__ import annotations

import re
from collections.abc import Iterable

MARK = "[private]"
# Long enough that our own words do not match a prompt by chance, short enough to catch a quoted or cut-off part of one.
_RUN = 12


class PrivateTexts:
    """Prompts by their owner, usually a request id."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[str, ...]] = {}

    def keep(self, owner: str, texts: Iterable[str | None]) -> None:
        """Blot these texts out until `forget(owner)`."""
        self._texts[owner] = tuple(text for text in texts if text and text.strip())

    def forget(self, owner: str) -> None:
        """The owner's request has ended."""
        self._texts.pop(owner, None)

    def blot(self, line: str) -> str:
        """`line` without any text that is kept, and without any run of 12 characters of one."""
        for text in {text for texts in list(self._texts.values()) for text in texts}:
            line = _without_runs(line, text) if len(text) >= _RUN else _without_word(line, text)
        return line


PRIVATE_TEXTS = PrivateTexts()
"""Those of this process; `configure_logging` reads them."""


def _without_word(line: str, text: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", MARK, line)


def _without_runs(line: str, text: str) -> str:
    runs = {text[start : start + _RUN] for start in range(len(text) - _RUN + 1)}
    kept: list[str] = []
    start = 0
    while start < len(line):
        if line[start : start + _RUN] not in runs:
            kept.append(line[start])
            start += 1
            continue
        end = start + _RUN
        while end < len(line) and line[end - _RUN + 1 : end + 1] in runs:
            end += 1
        kept.append(MARK)
        start = end
    return "".join(kept)
