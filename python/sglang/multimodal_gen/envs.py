"""The environment, read here and nowhere else; each variable that is not an option of the server is declared once.

Every option of `ServerArgs` has a variable too: `SGLANG_DIFFUSION_` and its name in capitals. An empty variable counts
as unset.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from sglang.multimodal_gen.errors import InvalidValue

OPTION_PREFIX = "SGLANG_DIFFUSION_"

T = TypeVar("T")


def read_bool(text: str) -> bool:
    """How a text spells true or false. Raises ValueError for anything else."""
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError(text)


@dataclass(frozen=True, kw_only=True)
class Variable(Generic[T]):
    """An environment variable; `read` raises ValueError for a text that is not `accepted`."""

    name: str
    default: T
    help: str
    accepted: str
    read: Callable[[str], T]

    def get(self, environ: Mapping[str, str] | None = None) -> T:
        """The value now.

        Raises:
            InvalidValue: the text is not what is accepted.
        """
        text = (current() if environ is None else environ).get(self.name, "")
        if not text:
            return self.default
        try:
            return self.read(text)
        except ValueError:
            raise InvalidValue(self.name, text, self.accepted) from None


HF_HUB_OFFLINE = Variable(
    name="HF_HUB_OFFLINE",
    default=False,
    help="Take checkpoints from the hub's local cache only, never from the network.",
    accepted="true or false",
    read=read_bool,
)

VARIABLES = (HF_HUB_OFFLINE,)


def current() -> Mapping[str, str]:
    """The environment of this process."""
    return os.environ


def option_variable(name: str) -> str:
    """The variable that sets the server option `name`."""
    return OPTION_PREFIX + name.upper()


def unknown_variables(environ: Mapping[str, str], option_names: Iterable[str]) -> tuple[str, ...]:
    """One sentence for each variable that looks like ours and sets nothing."""
    known = {option_variable(name) for name in option_names} | {variable.name for variable in VARIABLES}
    sentences = []
    for name in sorted(environ):
        if name.startswith(OPTION_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            guess = f"; did you mean {close[0]}?" if close else ""
            sentences.append(f"the environment variable {name} is not known and has no effect{guess}")
    return tuple(sentences)
