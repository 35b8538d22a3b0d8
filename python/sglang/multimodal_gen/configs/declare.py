"""One declaration per parameter: type, default, help, bounds, group and who may set it.

A field made with `arg(...)` carries everything that the command line, YAML files, HTTP bodies, error messages and the
reference pages need. Nothing else in the package states a flag, a bound or a help text.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sglang.multimodal_gen.errors import FieldError, InvalidType, InvalidValue, UnknownParameter

Surface = Literal["cli", "python", "http", "admin"]
EVERYWHERE: frozenset[Surface] = frozenset({"cli", "python", "http", "admin"})
LOCAL_ONLY: frozenset[Surface] = frozenset({"cli", "python"})
CLI_ONLY: frozenset[Surface] = frozenset({"cli"})
PYTHON_ONLY: frozenset[Surface] = frozenset({"python"})
ADMIN: frozenset[Surface] = frozenset({"cli", "python", "admin"})
FROM_MODEL = "the model's own"
"""What `unset` says where the model's default is taken."""
HIDDEN = "***"
"""Stands for the value of a secret parameter wherever values are shown."""
_KEY = "declaration"


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What `arg` states about a field; see there."""

    help: str
    group: str
    unset: str = ""
    exposed: frozenset[Surface] = EVERYWHERE
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None
    max_length: int | None = None
    code: str | None = None
    metavar: str | None = None
    check: Callable[[Any], str | None] | None = None
    recorded: bool = False
    secret: bool = False
    keys: type | None = None
    may_be_empty: bool = False
    max_items: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A declared field: its name, its accepted types, its default and its declaration."""

    name: str
    types: tuple[type, ...]
    item_types: tuple[type, ...]
    optional: bool
    default: Any
    declaration: Declaration

    @property
    def flag(self) -> str:
        """The command-line spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def takes_several(self) -> bool:
        """Whether a list of values is accepted."""
        return tuple in self.types

    @property
    def is_switch(self) -> bool:
        """Whether the value is true or false."""
        return bool in self.types

    def several(self) -> Parameter:
        """The same parameter where one or several values may be given at once."""
        return dataclasses.replace(self, types=(*self.types, tuple), item_types=self.types)

    def item(self) -> Parameter:
        """The parameter that one value of a list is; itself where no list is accepted."""
        return dataclasses.replace(self, types=self.item_types, optional=False) if self.takes_several else self

    def type_name(self) -> str:
        """How messages and pages name the accepted types."""
        names = [_TYPE_NAMES[kind][0] for kind in self.types if kind is not tuple]
        if self.takes_several:
            names.append("a list of " + " or ".join(_TYPE_NAMES[kind][1] for kind in self.item_types))
        return " or ".join(names)

    def accepted(self) -> str:
        """The accepted values in words."""
        d = self.declaration
        if d.choices is not None:
            return "one of " + ", ".join(d.choices)
        return self.type_name() + self.bounds()

    def bounds(self) -> str:
        """The bounds of a number in words, with a space before them; nothing when there are none."""
        low, high = self.declaration.minimum, self.declaration.maximum
        if low is not None and high is not None:
            return f" from {_plain(low)} to {_plain(high)}"
        if low is not None:
            return f" of at least {_plain(low)}"
        return "" if high is None else f" of at most {_plain(high)}"


# Singular and plural, as messages and pages name them.
_TYPE_NAMES = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "truth values"),
    dict: ("a JSON object", "JSON objects"),
}


def arg(
    default: Any,
    *,
    help: str,
    group: str,
    unset: str = "",
    exposed: Collection[Surface] = EVERYWHERE,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Iterable[str] | None = None,
    max_length: int | None = None,
    code: str | None = None,
    metavar: str | None = None,
    check: Callable[[Any], str | None] | None = None,
    recorded: bool = False,
    secret: bool = False,
    keys: type | None = None,
    may_be_empty: bool = False,
    max_items: int | None = None,
) -> Any:
    """A dataclass field that is a parameter.

    `unset` says what happens while the value is None; `exposed` names the ways in that offer the parameter; `code` is
    the error code of a value out of bounds; `check` returns None, or in words what would be accepted instead;
    `recorded` parameters are written into the files that they made; the value of a `secret` one is shown nowhere.
    `keys` is the dataclass that declares the keys of an object.
    A list has at least one value unless it `may_be_empty`, and at most `max_items`.
    """
    declaration = Declaration(
        help=help,
        group=group,
        unset=unset,
        exposed=frozenset(exposed),
        minimum=minimum,
        maximum=maximum,
        choices=None if choices is None else tuple(choices),
        max_length=max_length,
        code=code,
        metavar=metavar,
        check=check,
        recorded=recorded,
        secret=secret,
        keys=keys,
        may_be_empty=may_be_empty,
        max_items=max_items,
    )
    return dataclasses.field(default=default, metadata={_KEY: declaration}, repr=not secret)


@functools.cache
def parameters(owner: type) -> Mapping[str, Parameter]:
    """The declared fields of a dataclass by name, in order of declaration."""
    hints = typing.get_type_hints(owner)
    found = {}
    for field in dataclasses.fields(owner):
        declaration = field.metadata.get(_KEY)
        if declaration is not None:
            kinds, items, optional = _split_type(hints[field.name])
            found[field.name] = Parameter(
                name=field.name,
                types=kinds,
                item_types=items,
                optional=optional,
                default=field.default,
                declaration=declaration,
            )
    return types.MappingProxyType(found)


def _split_type(hint: Any) -> tuple[tuple[type, ...], tuple[type, ...], bool]:
    """`int | tuple[int, ...] | None` -> ((int, tuple), (int,), True)."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds: list[type] = []
    items: list[type] = []
    for member in members:
        origin = typing.get_origin(member)
        if origin is tuple:
            kinds.append(tuple)
            for item in (a for a in typing.get_args(member) if a is not Ellipsis):
                items.extend(_split_type(item)[0])
        elif origin is Mapping:
            kinds.append(dict)
        elif origin is Literal:
            kinds.append(str)
        elif member is not type(None):
            kinds.append(member)
    return tuple(kinds), tuple(items), type(None) in members


def coerce(parameter: Parameter, value: Any) -> Any:
    """`value` in the parameter's own type (int -> float, list -> tuple, path -> str), checked against its bounds.

    Raises:
        InvalidType: the value is of another type. Strings are never read as numbers here: see `from_text`.
        InvalidValue: the value is out of bounds, not finite or not one of the choices.
    """
    if not parameter.declaration.secret:
        return _coerce(parameter, value)
    try:
        return _coerce(parameter, value)
    except FieldError as error:
        raise type(error)(error.param or parameter.name, HIDDEN, error.accepted, code=error.code) from None


def _coerce(parameter: Parameter, value: Any) -> Any:
    if value is None:
        if parameter.optional:
            return None
        raise InvalidType(parameter.name, value, parameter.accepted())
    if isinstance(value, list | tuple) and parameter.takes_several:
        d = parameter.declaration
        if not value and not d.may_be_empty:
            raise InvalidValue(parameter.name, value, "a list with at least one value", code=d.code)
        if d.max_items is not None and len(value) > d.max_items:
            raise InvalidValue(parameter.name, f"{len(value)} values", f"at most {d.max_items} of them", code=d.code)
        return tuple(_coerce_scalar(parameter, item, parameter.item_types) for item in value)
    return _coerce_scalar(parameter, value, parameter.types)


def _coerce_scalar(parameter: Parameter, value: Any, kinds: tuple[type, ...]) -> Any:
    value = _as_plain(parameter, value, kinds)
    if type(value) not in kinds:
        raise InvalidType(parameter.name, value, parameter.accepted(), code=parameter.declaration.code)
    _check_bounds(parameter, value)
    return value


def _as_plain(parameter: Parameter, value: Any, kinds: tuple[type, ...]) -> Any:
    """`value` without the wrapping that loses nothing: NumPy's numbers, paths, an integer where a number is wanted."""
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    if isinstance(value, Mapping) and dict in kinds:
        return _as_json(parameter, value)
    if type(value) is bool or not isinstance(value, numbers.Real):
        return value
    if int in kinds and isinstance(value, numbers.Integral):
        return int(value)
    if float in kinds:
        try:
            return float(value)
        except OverflowError:
            raise InvalidValue(parameter.name, value, parameter.accepted(), code="out_of_range") from None
    return value


def _as_json(parameter: Parameter, value: Any) -> Any:
    """`value` as dicts with texts as keys, lists, texts, finite numbers, truth values and None; nothing else."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _as_json(parameter, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(parameter, item) for item in value]
    if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, str):
        _check_unicode(parameter, value)
        return value
    raise InvalidType(parameter.name, value, "a JSON object of texts, finite numbers, truth values, lists and objects")


def _check_bounds(parameter: Parameter, value: Any) -> None:
    d = parameter.declaration
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidValue(parameter.name, value, f"a finite number: {parameter.accepted()}", code="number_not_finite")
    if type(value) in (int, float):
        below = d.minimum is not None and value < d.minimum
        above = d.maximum is not None and value > d.maximum
        if below or above:
            raise InvalidValue(parameter.name, value, parameter.accepted(), code=d.code or "out_of_range")
    if isinstance(value, str):
        _check_text(parameter, value)
    if isinstance(value, dict) and d.keys is not None:
        checked_keys(d.keys, parameter.name, value)
    problem = d.check(value) if d.check is not None else None
    if problem is not None:
        raise InvalidValue(parameter.name, value, problem, code=d.code)


def _check_text(parameter: Parameter, value: str) -> None:
    d = parameter.declaration
    if d.choices is not None and value not in d.choices:
        raise InvalidValue(parameter.name, value, parameter.accepted() + hint(value, d.choices), code=d.code)
    if d.max_length is not None and len(value) > d.max_length:
        raise InvalidValue(
            parameter.name,
            f"{len(value)} characters",
            f"at most {d.max_length} characters",
            code="string_above_max_length",
        )
    _check_unicode(parameter, value)


def _check_unicode(parameter: Parameter, value: str) -> None:
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidValue(parameter.name, value, "valid Unicode text without NUL characters", code="invalid_unicode")


def from_text(parameter: Parameter, text: str) -> Any:
    """The value that a flag, an environment variable or a multipart field spells, checked as `coerce` does.

    `none` and `null` spell None, unless any text is a value.
    """
    any_text = str in parameter.types and parameter.declaration.choices is None
    if parameter.optional and not any_text and text.lower() in ("none", "null"):
        return None
    kinds = [kind for kind in parameter.types if kind is not tuple] or list(parameter.item_types)
    for kind in (bool, int, float, dict, str):
        if kind in kinds:
            try:
                value = _READERS[kind](text)
            except ValueError:
                continue
            return coerce(parameter, value if kind in parameter.types else (value,))
    raise InvalidType(parameter.name, text, parameter.accepted(), code=parameter.declaration.code)


def from_texts(parameter: Parameter, texts: Sequence[str]) -> Any:
    """As `from_text`, for a parameter that `takes_several`; a single text gives a single value where one may stand."""
    if len(texts) == 1:
        return from_text(parameter, texts[0])
    return coerce(parameter, tuple(from_text(parameter.item(), text) for text in texts))


def _read_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError(text)


def _read_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _read_int(text: str) -> int:
    if _INTEGER.fullmatch(text) is None:
        raise ValueError(text)
    return int(text)


def _read_float(text: str) -> float:
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(text)
    return float(text)


# Python's own readers take underscores, white space and the digits of all scripts as well.
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE | re.ASCII)
_READERS: dict[type, Callable[[str], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    dict: _read_object,
    str: str,
}


def hint(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` when something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def check_names(given: Iterable[str], known: Collection[str], *, what: str) -> None:
    """Raises UnknownParameter for the first name that is not known."""
    for name in given:
        if name not in known:
            raise UnknownParameter(name, what=what, hint=hint(name, known))


def checked_keys(owner: type, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an object under `name` whose keys `owner` declares, each in its own type.

    Raises: UnknownParameter, InvalidType or InvalidValue, which name the key.
    """
    known, checked = parameters(owner), {}
    for key, value in values.items():
        if key not in known:
            accepted = f"; accepted are {', '.join(known)}{hint(key, known)}"
            raise UnknownParameter(f"{name}.{key}", what="key", hint=accepted)
        try:
            checked[key] = coerce(known[key], value)
        except FieldError as error:
            raise error.named(f"{name}.{key}") from None
    return checked


def build(owner: type, values: Mapping[str, Any], *, what: str) -> Any:
    """An instance of `owner` from plain values; every name and value is checked."""
    known = parameters(owner)
    check_names(values, known, what=what)
    return owner(**{name: coerce(known[name], value) for name, value in values.items()})


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
