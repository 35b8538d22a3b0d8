"""A YAML file of options: flat, spelled as the flags (with dashes) or as the fields (with underscores)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sglang.multimodal_gen.configs.declare import Parameter, coerce, from_text, hint
from sglang.multimodal_gen.errors import FieldError, InvalidConfigFile, UnknownParameter


@dataclass(frozen=True)
class ConfigFile:
    """What a file says: values by option name, and the line of each. `name` is the path as the user gave it."""

    name: str
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    def read(self, known: Mapping[str, Parameter]) -> dict[str, Any]:
        """Every value, checked against its declaration.

        Raises:
            UnknownParameter: a key is not in `known`.
            FieldError: a value is not accepted.
        """
        for name in self.values:
            if name not in known:
                what = f"key in {self.name}, line {self.lines[name]}:"
                raise UnknownParameter(name, what=what, hint=hint(name, known))
        return {name: self._value(known[name]) for name in self.values}

    def only(self, names: Collection[str]) -> ConfigFile:
        """The part of the file that is about `names`."""
        return ConfigFile(self.name, {name: self.values[name] for name in self.values if name in names}, self.lines)

    def without(self, names: Collection[str]) -> ConfigFile:
        """The part of the file that is not about `names`."""
        return self.only([name for name in self.values if name not in names])

    def _value(self, parameter: Parameter) -> Any:
        value = self.values[parameter.name]
        # YAML reads 1e-3 as text, and quotes around a number are an easy slip.
        spelled = isinstance(value, str) and str not in (*parameter.types, *parameter.item_types)
        try:
            return from_text(parameter, value) if spelled else coerce(parameter, value)
        except FieldError as error:
            raise error.named(f"{self.name}, line {self.lines[parameter.name]}: {parameter.name}") from None


def read_config_file(path: str) -> ConfigFile:
    """The options in a YAML file.

    Raises:
        InvalidConfigFile: the file cannot be read, is not YAML, is not a mapping, or says a key twice.
    """
    text = _read_text(path)
    try:
        return _read_mapping(path, yaml.SafeLoader(text))
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise InvalidConfigFile(f"{path}{where}: not valid YAML ({error.problem})", param="config") from None
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise InvalidConfigFile(f"{path}: not valid YAML ({detail})", param="config") from None


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidConfigFile(f"config: cannot read {path}: {error.strerror}", param="config") from None
    except UnicodeDecodeError as error:
        raise InvalidConfigFile(
            f"config: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8", param="config"
        ) from None


def _read_mapping(path: str, loader: yaml.SafeLoader) -> ConfigFile:
    node = loader.get_single_node()
    if node is None:
        return ConfigFile(path, {}, {})
    if not isinstance(node, yaml.MappingNode):
        raise InvalidConfigFile(
            f"{path}: accepted is a mapping of option names to values, such as `port: 30000`", param="config"
        )
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(loader.construct_object(key_node, deep=True)).replace("-", "_")
        if key in values:
            raise InvalidConfigFile(f"{path}, line {line}: {key} is already set in line {lines[key]}", param="config")
        values[key] = loader.construct_object(value_node, deep=True)
        lines[key] = line
    return ConfigFile(path, values, lines)
