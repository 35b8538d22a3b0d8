"""Names of output files."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator

from sglang.multimodal_gen.errors import InvalidValue

MAX_NAME_CHARACTERS = 150
MAX_NAME_BYTES = 240  # file systems allow 255, and the name of the unfinished file is a little longer
MAX_PROMPT_PART = 100
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


def numbered(stem: str, suffix: str) -> Iterator[str]:
    """stem.png, stem-1.png, stem-2.png, … for ever."""
    yield stem + suffix
    number = 0
    while True:
        number += 1
        yield f"{stem}-{number}{suffix}"
