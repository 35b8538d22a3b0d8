"""The environment, read here and nowhere else.

Every option of `ServerArgs` has a variable: `SGLANG_DIFFUSION_` and its name in capitals. An empty one counts as unset.
Variables that libraries read for themselves are only described here, for the reference page.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OPTION_PREFIX = "SGLANG_DIFFUSION_"
BENCH_API_KEY = "SGLANG_BENCH_API_KEY"
"""The key that `sglang bench serve` sends: not the server's own variable, since the server may be somebody else's."""


@dataclass(frozen=True, kw_only=True)
class LibraryVariable:
    """A variable that a library of ours reads and that users of this package may need."""

    name: str
    library: str
    help: str


LIBRARY_VARIABLES = (
    LibraryVariable(
        name="HF_HUB_OFFLINE",
        library="huggingface_hub",
        help="1 takes checkpoints from the local cache only, never from the network.",
    ),
    LibraryVariable(
        name="HF_HOME", library="huggingface_hub", help="Directory of downloaded checkpoints and of the login token."
    ),
    LibraryVariable(name="HF_TOKEN", library="huggingface_hub", help="Login token for repositories that need one."),
    LibraryVariable(name="CUDA_VISIBLE_DEVICES", library="torch", help="The GPUs that are used, by number."),
    LibraryVariable(name="OMP_NUM_THREADS", library="torch", help="Threads of a worker that computes on the CPU."),
)


def current() -> Mapping[str, str]:
    """The environment of this process."""
    return os.environ


def bench_api_key() -> str | None:
    """The key for the server that is measured, if the environment has one."""
    return os.environ.get(BENCH_API_KEY) or None


def silence_profiler_library() -> None:
    """Keep torch's profiler from writing lines of its own to stderr, unless its variable is set; before torch loads."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def option_variable(name: str) -> str:
    """The variable that sets the server option `name`."""
    return OPTION_PREFIX + name.upper()


def unknown_variables(environ: Mapping[str, str], option_names: Iterable[str]) -> tuple[str, ...]:
    """One sentence for each variable that looks like ours and sets nothing."""
    known = [option_variable(name) for name in option_names]
    sentences = []
    for name in sorted(environ):
        if name.startswith(OPTION_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            guess = f"; did you mean {close[0]}?" if close else ""
            sentences.append(f"the environment variable {name} is not known and has no effect{guess}")
    return tuple(sentences)
