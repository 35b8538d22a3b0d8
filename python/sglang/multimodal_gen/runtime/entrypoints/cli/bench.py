"""`sglang bench`: pick a benchmark, read its options, run it, show a table, write JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import hint, parameters
from sglang.multimodal_gen.errors import UsageError
from sglang.multimodal_gen.runtime.bench.options import BENCHMARKS
from sglang.multimodal_gen.runtime.entrypoints.cli.options import CommandArgs, OptionParser, read_config, warn
from sglang.multimodal_gen.runtime.server_args import ServerArgs, resolve_server_args, server_options

# Below warnings an engine tells how it starts, which a table would drown in.
_QUIET = "warning"


@dataclass(frozen=True, kw_only=True)
class ShowHelp:
    """What `sglang bench --help` prints."""

    def run(self) -> int:
        """Print it."""
        names = "\n".join(f"  {name:<10} {benchmark.summary}" for name, benchmark in BENCHMARKS.items())
        sys.stdout.write(
            f"usage: sglang bench BENCHMARK [options]\n\n"
            "How fast this machine runs a model, part by part, and what a server bears.\n\n"
            f"benchmarks:\n{names}\n\n`sglang bench BENCHMARK --help` lists the options of a benchmark.\n"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """A benchmark with its own options (and those of requests) and the engine's."""

    name: str
    options: Mapping[str, Any]
    args: ServerArgs

    def run(self) -> int:
        """Measure and report. Raises ServingError."""
        # Late: the options are checked before anything heavy loads.
        from sglang.multimodal_gen.runtime.bench.run import run_benchmark

        return run_benchmark(self.name, self.options, self.args)


def parser(name: str) -> OptionParser:
    """The options of one benchmark."""
    benchmark = BENCHMARKS[name]
    options = {
        **benchmark.own_options(),
        **benchmark.request_options(),
        **parameters(CommandArgs),
        **benchmark.engine_options(),
    }
    return OptionParser(f"bench {name}", f"Measure {benchmark.summary}.", options)


def configure(arguments: Sequence[str]) -> BenchJob | ShowHelp:
    """Read the command line, the environment and the configuration file. Raises InvalidRequest."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        return ShowHelp()
    if name not in BENCHMARKS:
        raise UsageError(
            f"unknown benchmark {name!r}, accepted is one of {', '.join(BENCHMARKS)}" + hint(name, BENCHMARKS)
        )
    return _configured(name, rest)


def _configured(name: str, arguments: Sequence[str]) -> BenchJob:
    benchmark = BENCHMARKS[name]
    flags = parser(name).typed(arguments)
    config_file = read_config(flags.pop("config", None))
    known = {**benchmark.own_options(), **benchmark.request_options()}
    # A benchmark's own option may be called as one of the server's, such as a key.
    of_server = [option for option in server_options() if option not in known]
    engine_flags = {option: flags.pop(option) for option in of_server if option in flags}
    engine_file = None
    if config_file is not None:
        flags = config_file.without(of_server).read(known) | flags
        engine_file = config_file.only(of_server)
    resolved = resolve_server_args(engine_flags, environ=envs.current(), config_file=engine_file)
    args = resolved.args
    if resolved.sources["log_level"] == "default":
        args = dataclasses.replace(args, logging=dataclasses.replace(args.logging, log_level=_QUIET))
    warn(resolved.warnings)
    options = {n: o.default for n, o in known.items()} | flags
    benchmark.check(options)
    return BenchJob(name=name, options=options, args=args)
