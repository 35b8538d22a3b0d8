"""`sglang generate`: read the options, run the engine once, show progress, say what was made and where it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import CLI_ONLY, Parameter, arg, parameters
from sglang.multimodal_gen.configs.sample.input_params import INPUT_FILES
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import EmptyPrompt, MissingParameter, UsageError
from sglang.multimodal_gen.runtime.entrypoints.cli.options import CommandArgs, OptionParser, read_config, tell, warn
from sglang.multimodal_gen.runtime.entrypoints.prompt_file import read_prompts
from sglang.multimodal_gen.runtime.server_args import ServerArgs, resolve_server_args, server_options

if TYPE_CHECKING:
    from sglang.multimodal_gen.runtime.entrypoints.cli.reporting import Display

_NO_PROMPT = "no prompt: give --prompt TEXT, --prompt-file-path FILE, or a line `prompt: …` in the file of --config"


@dataclass(frozen=True, kw_only=True)
class GenerateCommandArgs(CommandArgs):
    """What only `sglang generate` is told."""

    prompt_file_path: str | None = arg(
        None,
        help="UTF-8 file with one prompt per line; blank lines are left out.",
        group="prompt",
        unset="no file",
        exposed=CLI_ONLY,
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """The engine's options and what to generate."""

    args: ServerArgs
    sampling: Mapping[str, Any]

    def run(self) -> int:
        """Generate everything; returns 1 when an output failed.

        Raises: ServingError when an input cannot be read or the engine cannot start.
        """
        # Late: the options are checked before anything heavy loads.
        from sglang.multimodal_gen.runtime.entrypoints.cli.reporting import Reporter
        from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator

        sampling = self._with_inputs_read()
        several = len(self.sampling["prompt"]) > 1 or self._outputs_per_prompt() > 1
        with (
            DiffGenerator.from_server_args(self.args) as generator,
            Reporter(_display(), several=several) as reporter,
        ):
            generator.wait_ready(on_state=reporter.engine_state)
            for event in generator.stream(sampling):
                reporter.event(event)
        return 1 if reporter.num_failed else 0

    def _with_inputs_read(self) -> Mapping[str, Any]:
        """Before the engine starts, so that a wrong path shows at once. Raises InvalidRequest."""
        if not any(self.sampling.get(name) for name in INPUT_FILES):
            return self.sampling
        from sglang.multimodal_gen.runtime.entrypoints.media_reading import read_locally

        return read_locally(self.sampling)

    def _outputs_per_prompt(self) -> int:
        seed = self.sampling.get("seed")
        return len(seed) if isinstance(seed, tuple) else self.sampling.get("num_outputs_per_prompt", 1)


def _display() -> Display:
    """Progress bars when somebody looks, lines otherwise. Loads while the engine starts."""
    if sys.stderr.isatty():
        from sglang.multimodal_gen.runtime.entrypoints.cli.progress_bars import BarDisplay

        return BarDisplay()
    from sglang.multimodal_gen.runtime.entrypoints.cli.reporting import LineDisplay

    return LineDisplay()


def sampling_options() -> Mapping[str, Parameter]:
    """The sampling parameters that the command line offers; an option that the server has too is the server's."""
    offered = {
        name: option
        for name, option in parameters(SamplingParams).items()
        if "cli" in option.declaration.exposed and name not in server_options()
    }
    return offered | {"prompt": offered["prompt"].several()}


def parser() -> OptionParser:
    """The options of `sglang generate`."""
    engine = {name: option for name, option in server_options().items() if option.declaration.group != "http"}
    options = {**sampling_options(), **parameters(GenerateCommandArgs), **engine}
    return OptionParser("generate", "Make images or videos from prompts, then exit.", options)


def configure(arguments: Sequence[str]) -> GenerateJob:
    """Read the command line, the environment and the configuration file. Raises InvalidRequest."""
    flags = parser().typed(arguments)
    config_file = read_config(flags.pop("config", None))
    prompt_file = flags.pop("prompt_file_path", None)
    server_flags = {name: flags.pop(name) for name in server_options() if name in flags}
    server_file = None
    if config_file is not None:
        flags = config_file.without(server_options()).read(sampling_options()) | flags
        server_file = config_file.only(server_options())
    resolved = resolve_server_args(server_flags, environ=envs.current(), config_file=server_file)
    sampling = {"save_output": True} | flags | {"prompt": _prompts(flags.get("prompt"), prompt_file)}
    warn(resolved.warnings)
    tell(resolved.notes, log_level=resolved.args.logging.log_level)
    return GenerateJob(args=resolved.args, sampling=sampling)


def _prompts(given: str | tuple[str, ...] | None, file: str | None) -> list[str]:
    if file is not None:
        if given is not None:
            raise UsageError("--prompt and --prompt-file-path: accepted is one of the two")
        return read_prompts(file, flag="--prompt-file-path")
    if given is None:
        raise MissingParameter(_NO_PROMPT, param="prompt")
    prompts = [given] if isinstance(given, str) else list(given)
    if not all(prompt.strip() for prompt in prompts):
        raise EmptyPrompt
    return prompts
