"""`sglang quantize`: write a model directory whose transformers are in eight bits."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import CLI_ONLY, Parameter, arg, parameters
from sglang.multimodal_gen.configs.quantization_args import METHODS
from sglang.multimodal_gen.errors import InternalError, MissingParameter, RemoteError, storage_error
from sglang.multimodal_gen.errors_quantization import OutputNotEmpty
from sglang.multimodal_gen.runtime.entrypoints.cli.options import CommandArgs, OptionParser, read_config, warn
from sglang.multimodal_gen.runtime.server_args import ServerArgs, resolve_server_args, server_options

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.managers.checkpoint_task import QuantizeDone

_OF_ENGINE = (
    "model_path", "model_id", "revision", "device", "log_level", "quantization", "quantization_granularity",
    "quantization_ignored_layers",
)  # fmt: skip
_WORKER = "sglang.multimodal_gen.runtime.managers.checkpoint_worker"
_QUIET = "warning"


@dataclass(frozen=True, kw_only=True)
class QuantizeCommandArgs(CommandArgs):
    """Where the model goes."""

    output: str | None = arg(
        None,
        help="Directory to write, which does not exist or is empty; it appears when all is written.",
        group="command",
        unset="must be given",
        exposed=CLI_ONLY,
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """A model to write."""

    args: ServerArgs
    output: Path

    def run(self) -> int:
        """Write it. Raises ServingError, and leaves nothing behind then."""
        with Unfinished(self.output) as unfinished:
            done = _written(self.args, unfinished.path)
            unfinished.publish()
        for each in done.components:
            before, after = (f"{size / 1e9:.2f} GB" for size in (each.bytes_before, each.bytes_after))
            sys.stdout.write(f"{each.component}: {each.num_layers} layers quantised, {before} -> {after}\n")
        sys.stdout.write(f"{self.output}\n")
        return 0


class Unfinished:
    """A directory beside the one that is wanted, which becomes that or goes away. Raises StorageError."""

    def __init__(self, output: Path) -> None:
        self.output = output
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
            self.path.chmod(0o755 & ~_umask())
        except OSError as error:
            raise storage_error(f"output: {output.name} cannot be written", error) from error

    def publish(self) -> None:
        """All at once; an empty directory of that name is replaced. Raises OutputNotEmpty, StorageError."""
        check_output(self.output)
        try:
            self.path.replace(self.output)
        except OSError as error:
            raise storage_error(f"output: {self.output.name} cannot be written", error) from error

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _written(args: ServerArgs, target: Path) -> QuantizeDone:
    """What a child process has written there. Raises RemoteError with its error."""
    # Late: the options are checked before anything heavy loads.
    import msgspec

    from sglang.multimodal_gen.runtime.managers.checkpoint_task import (
        FromQuantizer,
        QuantizeFailed,
        QuantizeTask,
        Telling,
    )
    from sglang.multimodal_gen.runtime.managers.child_process import ChildProcess
    from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig

    engine = EngineConfig.of_this_process(args, run_dir="")
    child = ChildProcess(_WORKER, config=msgspec.msgpack.encode(QuantizeTask(engine=engine, target=str(target))))
    decoder = msgspec.msgpack.Decoder(FromQuantizer)
    try:
        while True:
            try:
                message = decoder.decode(child.connection.recv_bytes())
            except (EOFError, OSError):
                child.process.wait()
                raise InternalError(f"the process that quantises {child.describe_exit()} before it was done") from None
            if isinstance(message, QuantizeFailed):
                raise RemoteError(message.error)
            if not isinstance(message, Telling):
                return message
            sys.stderr.write(f"sglang quantize: {message.detail}\n")
            sys.stderr.flush()
    finally:
        child.close(grace_s=0)


def check_output(output: Path) -> None:
    """Raises OutputNotEmpty."""
    if output.is_dir() and not output.is_symlink():
        if any(output.iterdir()):
            raise OutputNotEmpty(output.name)
    elif output.exists() or output.is_symlink():
        raise OutputNotEmpty(output.name)


def options() -> Mapping[str, Parameter]:
    """Its own, and those of the engine that say which model and how."""
    engine = server_options()
    return {**parameters(QuantizeCommandArgs), **{name: engine[name] for name in _OF_ENGINE}}


def parser() -> OptionParser:
    """The options of `sglang quantize`."""
    return OptionParser(
        "quantize", "Write a model directory whose transformers are quantised; it is served without options.", options()
    )


def configure(arguments: Sequence[str]) -> QuantizeJob:
    """Read the command line, the environment and the configuration file. Raises InvalidRequest."""
    flags = parser().typed(arguments)
    config_file = read_config(flags.pop("config", None))
    if config_file is not None:
        flags = config_file.without(server_options()).read(parameters(QuantizeCommandArgs)) | flags
    output = flags.pop("output", None)
    engine_file = None if config_file is None else config_file.only(server_options())
    resolved = resolve_server_args(flags, environ=envs.current(), config_file=engine_file)
    warn(resolved.warnings)
    args = resolved.args
    if output is None:
        raise MissingParameter("output: none was given; accepted is a directory to write", param="output")
    if args.execution.quantization is None:
        text = f"quantization: none was given; accepted is one of {', '.join(METHODS)}"
        raise MissingParameter(text, param="quantization")
    path = Path(output).expanduser().absolute()
    check_output(path)
    if resolved.sources["log_level"] == "default":
        args = dataclasses.replace(args, logging=dataclasses.replace(args.logging, log_level=_QUIET))
    return QuantizeJob(args=args, output=path)
