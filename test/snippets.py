"""The fenced blocks of README.md and docs/, and what the comment above each says to do with it.

A block of bash, python or yaml has a comment in the line above its fence:

    <!-- snippet: run -->                     run as printed, in an empty directory
    <!-- snippet: run session=NAME -->        blocks of one session share a directory; those of Python are one program,
                                              as if typed into one REPL; a session may go on on a later page
    <!-- snippet: file=NAME session=NAME -->  written to that file in the session's directory
    <!-- snippet: server -->                  run while a server listens on the port 30000 that the block names
    <!-- snippet: check -->                   not run, since it downloads, needs more than there is, or costs too much
                                              time: command lines must parse, imports and files must exist
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LANGUAGES = ("bash", "python", "yaml")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- snippet: (run|server|check|file=(?P<file>\S+))(?: session=(?P<session>\S+))? -->\n\Z")


@dataclass(frozen=True)
class Snippet:
    """`where` is `page:line` of the fence; `what` is run, server, check, file, or None for an unmarked block."""

    where: str
    language: str
    text: str
    what: str | None
    file: str = ""
    session: str = ""


def pages() -> list[Path]:
    """README.md and the pages of docs/, by name."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def snippets_of(text: str, *, page: str) -> Iterator[Snippet]:
    """The blocks of a page in the languages that are tested."""
    for match in _FENCE.finditer(text):
        if match[1] in LANGUAGES:
            where = f"{page}:{text.count(chr(10), 0, match.start()) + 1}"
            mark = _MARK.search(text, 0, match.start())
            what = None if mark is None else mark[1].partition("=")[0]
            session = "" if mark is None else mark["session"] or ""
            yield Snippet(where, match[1], match[2], what, (mark["file"] or "") if mark else "", session)


def all_snippets() -> list[Snippet]:
    """Of all pages, in order."""
    return [
        snippet
        for path in pages()
        for snippet in snippets_of(path.read_text(encoding="utf-8"), page=str(path.relative_to(REPOSITORY)))
    ]


def sessions(snippets: list[Snippet]) -> dict[str, list[Snippet]]:
    """Blocks by session; one without a session is its own, named by its place."""
    found: dict[str, list[Snippet]] = {}
    for snippet in snippets:
        found.setdefault(snippet.session or snippet.where, []).append(snippet)
    return found


def command_lines(text: str) -> list[str]:
    """The commands of a block of bash: comments away, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
