"""The tables of docs/reference/errors.md: classes of errors.py and beside it, and codes of single parameters."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from sglang.multimodal_gen import errors, errors_http, errors_lora, errors_media, errors_quantization
from sglang.multimodal_gen.errors import FieldError, InvalidRequest, ModelError, RemoteError, ServingError

_PACKAGE = Path(errors.__file__).parent
# These group others or carry another process's error: no code of theirs reaches a client.
_WITHOUT_A_CODE = (ServingError, FieldError, RemoteError)


def class_rows() -> dict[str, list[list[str]]]:
    """[code, HTTP status, try again, class, meaning] by heading, in the order of the files."""
    groups: dict[str, list[list[str]]] = {"The request": [], "The model": [], "The server": []}
    for error in _classes():
        heading = next(
            (
                name
                for base, name in ((InvalidRequest, "The request"), (ModelError, "The model"))
                if issubclass(error, base)
            ),
            "The server",
        )
        again = "yes" if error.retryable else ""
        groups[heading].append([f"`{error.code}`", str(error.http_status), again, error.__name__, _meaning(error)])
    return groups


def _classes() -> list[type[ServingError]]:
    found = []
    for home in (errors, errors_http, errors_media, errors_lora, errors_quantization):
        own = [
            value
            for value in vars(home).values()
            if isinstance(value, type) and issubclass(value, ServingError) and value.__module__ == home.__name__
        ]
        found += sorted(own, key=lambda error: inspect.getsourcelines(error)[1])
    return [error for error in found if error not in _WITHOUT_A_CODE]


def _meaning(error: type) -> str:
    return inspect.cleandoc(error.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def parameter_rows() -> list[list[str]]:
    """[code, parameters] for each code that is given to single parameters and belongs to no class of its own."""
    found: dict[str, set[str]] = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        if "test" not in path.relative_to(_PACKAGE).parts:
            for code, parameter in _parameter_codes(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(code, set()).add(parameter)
    owned = {error.code for error in _classes()}
    return [
        [f"`{code}`", ", ".join(sorted(parameters))] for code, parameters in sorted(found.items()) if code not in owned
    ]


def _parameter_codes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(code, parameter) of calls with `code="…"`: declarations of fields, and errors about one parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield from ((code, f"`{node.target.id}`") for code in _codes(node.value))
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func) != "arg":
            param = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            yield from ((code, "any that can have it" if param is None else f"`{param}`") for code in _codes(node))


def _codes(call: ast.AST | None) -> Iterator[str]:
    if isinstance(call, ast.Call):
        yield from (str(k.value.value) for k in call.keywords if k.arg == "code" and isinstance(k.value, ast.Constant))
