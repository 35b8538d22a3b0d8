"""Command-line options made from declared parameters: argparse splits the line, the declarations read the values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from sglang.multimodal_gen.configs.declare import CLI_ONLY, Parameter, arg, from_text, from_texts, hint
from sglang.multimodal_gen.errors import FieldError, UsageError

if TYPE_CHECKING:
    from sglang.multimodal_gen.configs.config_file import ConfigFile

_METAVARS = {int: "N", float: "X", str: "TEXT", dict: "JSON"}
_EPILOG = (
    "A true-or-false option also has a form with --no- before its name. Every option can be a line `name: value` of "
    "the file given with --config. Options of the engine are read from the environment as well: SGLANG_DIFFUSION_ and "
    "the name in capitals, such as SGLANG_DIFFUSION_PRECISION. A flag wins over the environment, the environment over "
    "the file, the file over the default."
)


@dataclass(frozen=True, kw_only=True)
class CommandArgs:
    """Options that every command has and that only a command line can give."""

    config: str | None = arg(
        None, help="YAML file of options.", group="command", unset="no file", exposed=CLI_ONLY, metavar="FILE"
    )


class OptionParser(argparse.ArgumentParser):
    """Raises UsageError instead of exiting. Values stay texts until `typed` reads them."""

    def __init__(self, command: str, description: str, options: Mapping[str, Parameter]) -> None:
        super().__init__(
            prog=f"sglang {command}",
            usage=f"sglang {command} [options]",
            description=description,
            epilog=_EPILOG,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        )
        self.options = options
        for name in dict.fromkeys(option.declaration.group for option in options.values()):
            group = self.add_argument_group(name)
            for option in options.values():
                if option.declaration.group == name:
                    _add_option(group, option)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a line that it cannot split."""
        raise UsageError(message)

    def typed(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The options that the line sets, checked.

        Raises:
            UsageError: an unknown flag, a flag without its value, or a value without a flag.
            FieldError: a value is not accepted.
        """
        namespace, rest = self.parse_known_args(arguments)
        if rest:
            self._refuse(rest)
        return {name: _read(self.options[name], texts) for name, texts in vars(namespace).items()}

    def _refuse(self, rest: Sequence[str]) -> NoReturn:
        unknown = next((text for text in rest if text.startswith("-")), None)
        if unknown is None:
            raise UsageError(f"unexpected {rest[0]!r}: each value follows its flag; see {self.prog} --help")
        flag = unknown.split("=", 1)[0]
        flags = [spelling for action in self._actions for spelling in action.option_strings]
        raise UsageError(f"unknown flag {flag}{hint(flag, flags) or f'; see {self.prog} --help'}")


def _add_option(group: argparse._ArgumentGroup, option: Parameter) -> None:
    metavar = option.declaration.metavar
    text = _describe(option).replace("%", "%%")
    if option.is_switch:
        negative = "--no-" + option.flag.removeprefix("--")
        group.add_argument(option.flag, dest=option.name, nargs="?", const="true", metavar="true|false", help=text)
        group.add_argument(negative, dest=option.name, action="store_const", const="false", help=argparse.SUPPRESS)
    elif option.takes_several:
        metavar = metavar or _METAVARS[option.item_types[0]]
        group.add_argument(option.flag, dest=option.name, nargs="+", action="extend", metavar=metavar, help=text)
    else:
        choices = option.declaration.choices
        metavar = metavar or ("{" + ",".join(choices) + "}" if choices else _METAVARS[option.types[0]])
        group.add_argument(option.flag, dest=option.name, metavar=metavar, help=text)


def _describe(option: Parameter) -> str:
    """The help text with bounds and default."""
    default = default_in_words(option)
    facts = [fact for fact in (option.bounds().strip(), default and f"default: {default}") if fact]
    return option.declaration.help + (f" ({'; '.join(facts)})" if facts else "")


def default_in_words(option: Parameter) -> str:
    """The default, or what happens when the option is left out; empty when there is nothing to say."""
    if option.default is None:
        return option.declaration.unset or "none"
    if isinstance(option.default, bool):
        return "true" if option.default else "false"
    return str(option.default)


def _read(option: Parameter, given: str | list[str]) -> Any:
    try:
        return from_text(option, given) if isinstance(given, str) else from_texts(option, given)
    except FieldError as error:
        raise error.named(option.flag) from None


def read_config(path: str | None) -> ConfigFile | None:
    """The file given with --config. Raises InvalidConfigFile."""
    if path is None:
        return None
    # Late: YAML costs a tenth of the time that --help may take, and few command lines need it.
    from sglang.multimodal_gen.configs.config_file import read_config_file

    return read_config_file(path)


def warn(sentences: Iterable[str]) -> None:
    """Tell the user something that stops nothing."""
    for sentence in sentences:
        sys.stderr.write(f"sglang: warning: {sentence}\n")


def tell(sentences: Iterable[str], *, log_level: str | None) -> None:
    """Tell the user why something is as it is, where the log would."""
    if log_level in ("debug", "info"):
        for sentence in sentences:
            sys.stderr.write(f"sglang: {sentence}\n")
