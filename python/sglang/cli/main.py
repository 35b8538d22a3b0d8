"""The `sglang` command: picks a subcommand and turns errors into one sentence and an exit status.

Exit status: 0 done, 1 failed, 2 the command line or a file of options is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Protocol

import sglang

_COMMANDS = {
    "generate": "sglang.multimodal_gen.runtime.entrypoints.cli.generate",
    "serve": "sglang.multimodal_gen.runtime.entrypoints.cli.serve",
    "bench": "sglang.multimodal_gen.runtime.entrypoints.cli.bench",
    "models": "sglang.multimodal_gen.runtime.entrypoints.cli.models",
    "plan": "sglang.multimodal_gen.runtime.entrypoints.cli.plan",
    "quantize": "sglang.multimodal_gen.runtime.entrypoints.cli.quantize",
}
_HELP = """\
usage: sglang COMMAND [options]

Image and video generation with diffusion models.

commands:
  generate   make images or videos from prompts, then exit
  serve      start an HTTP server with an OpenAI-compatible interface
  bench      measure how fast this machine runs a model, part by part, and what a server bears
  models     list the models that run natively, or show one of them
  plan       show what each layout of a model over several GPUs costs, and which is taken
  quantize   write a model whose transformer is in eight bits
  version    print the version

`sglang COMMAND --help` lists the options of a command.
"""


class Job(Protocol):
    """A command whose options have been read and checked."""

    def run(self) -> int:
        """Do the work; returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    try:
        if command in _COMMANDS:
            return _run(command, rest)
        return _without_engine(command)
    except KeyboardInterrupt:
        return 130


def _without_engine(command: str) -> int:
    if command in ("-h", "--help", "help"):
        sys.stdout.write(_HELP)
        return 0
    if command in ("version", "--version"):
        sys.stdout.write(f"sglang {sglang.__version__}\n")
        return 0
    if not command:
        sys.stderr.write(_HELP)
        return 2
    import difflib  # late, as everything that --help does not need

    close = difflib.get_close_matches(command, [*_COMMANDS, "version"], n=1)
    guess = f"; did you mean {close[0]}?" if close else f"; accepted is one of {', '.join(_COMMANDS)}, version"
    return _fail(f"unknown command {command!r}{guess}", status=2)


def _run(command: str, arguments: list[str]) -> int:
    from sglang.multimodal_gen.errors import ServingError  # late, as everything that --help does not need

    module = importlib.import_module(_COMMANDS[command])
    try:
        job: Job = module.configure(arguments)
    except ServingError as error:
        return _fail(str(error), status=2)
    try:
        return job.run()
    except ServingError as error:
        return _fail(str(error), status=1)


def _fail(sentence: str, *, status: int) -> int:
    sys.stderr.write(f"sglang: error: {sentence}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
