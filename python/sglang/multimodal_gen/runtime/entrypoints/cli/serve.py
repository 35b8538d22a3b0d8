"""`sglang serve`: read the options, then start the server, or show the options and where each came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import CLI_ONLY, HIDDEN, Parameter, arg, parameters
from sglang.multimodal_gen.runtime.entrypoints.cli.options import CommandArgs, OptionParser, read_config, warn
from sglang.multimodal_gen.runtime.server_args import (
    ResolvedServerArgs,
    option_groups,
    resolve_server_args,
    server_options,
)


@dataclass(frozen=True, kw_only=True)
class ServeCommandArgs(CommandArgs):
    """What only `sglang serve` is told."""

    print_config: bool = arg(
        False,
        help="Print every option with its source, in the form that --config reads, and exit.",
        group="command",
        exposed=CLI_ONLY,
    )


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """A server to start, or its options to print."""

    resolved: ResolvedServerArgs
    print_config: bool

    def run(self) -> int:
        """Serve until stopped; returns the exit status."""
        if self.print_config:
            warn(self.resolved.warnings)
            sys.stdout.write(config_listing(self.resolved))
            return 0
        # Late: the options are checked and shown before anything heavy loads.
        from sglang.multimodal_gen.runtime.launch_server import launch_server

        resolved = self.resolved
        return launch_server(resolved.args, warnings=resolved.warnings, notes=resolved.notes, sources=resolved.sources)


def parser() -> OptionParser:
    """The options of `sglang serve`."""
    return OptionParser(
        "serve", "Start an HTTP server for one model.", {**parameters(ServeCommandArgs), **server_options()}
    )


def configure(arguments: Sequence[str]) -> ServeJob:
    """Read the command line, the environment and the configuration file. Raises InvalidRequest."""
    flags = parser().typed(arguments)
    config_file = read_config(flags.pop("config", None))
    print_config = flags.pop("print_config", False)
    resolved = resolve_server_args(flags, environ=envs.current(), config_file=config_file)
    return ServeJob(resolved=resolved, print_config=print_config)


def config_listing(resolved: ResolvedServerArgs) -> str:
    """Every option as a line of YAML with its source as a comment; `--config` reads it back."""
    lines = []
    for group, owner in option_groups().items():
        lines.append(f"# {group}")
        values = getattr(resolved.args, group)
        for name, option in parameters(owner).items():
            lines.append(f"{_setting(option, getattr(values, name)):<40}  # {resolved.sources[name]}")
        lines.append("")
    return "\n".join(lines)


def _setting(option: Parameter, value: Any) -> str:
    """A secret that is set becomes a comment, so that nobody reads back its stand-in as the secret."""
    if option.declaration.secret and value is not None:
        return f"# {option.name}: {HIDDEN}"
    return f"{option.name}: {_yaml(value)}"


def _yaml(value: Any) -> str:
    """A scalar as YAML; JSON's spelling of one is YAML's too."""
    return json.dumps(value, ensure_ascii=False)
