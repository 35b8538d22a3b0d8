"""Names of output files."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from sglang.multimodal_gen.errors import InvalidValue

MAX_NAME_CHARACTERS = 150
MAX_NAME_BYTES = 240  # file systems allow 255, and the name of the unfinished file is a little longer
MAX_PROMPT_PART = 100
# Of the files beside a result, which share its name up to the ending.
THUMBNAIL_ENDING = ".thumb.webp"
CONTACT_SHEET_ENDING = ".sheet.jpg"
_HASH_CHARACTERS = 8


def check_file_name(name: str) -> None:
    """Raises InvalidValue unless `name` is a plain name: no directory, nothing invisible, not too long."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise InvalidValue("output_file_name", name, "a file name without a directory; that is output_path")
    if not name.isprintable():
        raise InvalidValue("output_file_name", repr(name), "a name of printable characters")
    if len(name) > MAX_NAME_CHARACTERS or len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidValue(
            "output_file_name", name, f"at most {MAX_NAME_CHARACTERS} characters and {MAX_NAME_BYTES} bytes"
        )


def automatic_stem(prompt: str, seed: int) -> str:
    """A name without ending made from the prompt in ASCII, the seed and a hash that tells long prompts apart."""
    ascii_prompt = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9]+", "_", ascii_prompt)[:MAX_PROMPT_PART].strip("_") or "output"
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{words}_{seed}_{digest[:_HASH_CHARACTERS]}"


def numbered(stem: str) -> Iterator[str]:
    """stem, stem-1, stem-2, … for ever."""
    yield stem
    yield from (f"{stem}-{number}" for number in itertools.count(1))


def beside(path: Path, ending: str) -> Path:
    """Where the thumbnail or the contact sheet of the result at `path` lies."""
    return path.with_name(path.stem + ending)
