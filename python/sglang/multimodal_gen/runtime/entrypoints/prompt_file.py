"""Files of prompts: one a line, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.errors import UsageError

_JSON_LINES = (".jsonl", ".ndjson")


def read_prompts(path: str, *, flag: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank.

    Raises:
        UsageError: the file cannot be read, is not UTF-8 or holds no prompt; the sentence begins with `flag`.
    """
    prompts = [prompt for _, prompt in _lines(path, flag)]
    if not prompts:
        raise UsageError(f"{flag}: {path} has no prompt; accepted is one prompt per line")
    return prompts


def read_bodies(path: str, *, flag: str) -> list[dict[str, Any]]:
    """The fields of one request for each line: its `prompt`, and in a file whose name ends with .jsonl what else the
    line's object says.

    Raises:
        UsageError: as `read_prompts`, or a line of a .jsonl file is no JSON object with a text `prompt`.
    """
    if Path(path).suffix not in _JSON_LINES:
        return [{"prompt": prompt} for prompt in read_prompts(path, flag=flag)]
    bodies = [_body(line, f"{flag}: {path}, line {number}") for number, line in _lines(path, flag)]
    if not bodies:
        raise UsageError(f"{flag}: {path} has no prompt; accepted is one JSON object per line")
    return bodies


def _lines(path: str, flag: str) -> Iterator[tuple[int, str]]:
    """(number, text) of those that are not blank."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UsageError(f"{flag}: {path}, line {number}: not UTF-8 text") from None
        if text:
            yield number, text


def _body(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{where}: not a JSON object; accepted is one object per line")
    prompt = found.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{where}: has no prompt; accepted is an object whose `prompt` is a text")
    return found
