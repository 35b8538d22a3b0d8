"""The package's source as syntax trees and import statements; nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

PACKAGE = "sglang.multimodal_gen"
SOURCE_ROOT = Path(__file__).resolve().parents[2]
"""The directory of `sglang`."""

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One source file. `name` is the dotted name, without `sglang.multimodal_gen.` where it begins so."""

    name: str
    source: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]
    """All of the tree."""


class When(Enum):
    """When an import statement runs."""

    TOP = "with the module"
    LATE = "in a function"
    TYPING = "under TYPE_CHECKING: never"


@dataclass(frozen=True)
class Import:
    """`target` is a short module name of ours, or the full dotted name of somebody else's."""

    importer: str
    target: str
    line: int
    when: When

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target} {self.when.value}"


def short(name: str) -> str:
    """A dotted name as `Module.name` and the tables of rules have it."""
    return name.removeprefix(PACKAGE + ".")


def parse(sources: Mapping[str, str]) -> dict[str, Module]:
    """Modules by short name, from source text by dotted name."""
    modules = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        modules[short(name)] = Module(short(name), source, tree, tuple(ast.walk(tree)))
    return modules


def package_modules() -> dict[str, Module]:
    """Every module of `sglang` but its tests."""
    sources = {}
    for path in sorted(SOURCE_ROOT.rglob("*.py")):
        relative = path.relative_to(SOURCE_ROOT.parent)
        if relative.parts[:3] != ("sglang", "multimodal_gen", "test"):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            sources[name] = path.read_text(encoding="utf-8")
    return parse(sources)


def imports_of(modules: Mapping[str, Module]) -> list[Import]:
    """Every import statement, also those in functions."""
    found: list[Import] = []
    for module in modules.values():
        _collect(module.tree, module.name, modules, When.TOP, found)
    return found


def _collect(node: ast.AST, importer: str, known: Mapping[str, Module], when: When, found: list[Import]) -> None:
    if isinstance(node, ast.Import | ast.ImportFrom):
        found += [Import(importer, target, node.lineno, when) for target in _targets(node, known)]
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.body:
            _collect(child, importer, known, When.TYPING, found)
        for child in node.orelse:
            _collect(child, importer, known, when, found)
    else:
        inner = When.LATE if isinstance(node, FUNCTIONS) and when is When.TOP else when
        for child in ast.iter_child_nodes(node):
            _collect(child, importer, known, inner, found)


def _targets(node: ast.Import | ast.ImportFrom, known: Mapping[str, Module]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (short(alias.name) for alias in node.names)
        return
    base = node.module or ""
    inner = [short(f"{base}.{alias.name}") for alias in node.names]
    yield from dict.fromkeys(name if name in known else short(base) for name in inner)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def is_within(name: str, prefixes: Iterable[str]) -> bool:
    """Whether the dotted name is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def top_level(name: str) -> str:
    """`torch` of `torch.nn`."""
    return name.partition(".")[0]
