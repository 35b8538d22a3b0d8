"""Which error classes the tests see raised, judged by the tests' source.

A test function is a witness of a class when it expects the class or asserts its code:

- `… is Class` in an assertion; or, when the class has no subclasses, which would pass as well, `pytest.raises(Class)`
  or an asserted `isinstance(error, Class)`; in each case also with the class among the values of `parametrize`;
- its code, when no other class has the same: in an assertion about a `code`, in a call of a helper that asserts one, in
  a name such as `code` that is given to it, or among the values of `parametrize` of a test that asserts a `code`.

A test that makes the error itself, or whose file makes it outside of tests, is no witness: what it sees is its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sglang.multimodal_gen.test.source_tree import FUNCTIONS, Module

_ABOUT_CODE = re.compile(r"\bcode\b")


@dataclass(frozen=True)
class ErrorClass:
    """A class of errors.py or of a file beside it. `code` is None when it inherits the code of its base."""

    name: str
    bases: tuple[str, ...]
    code: str | None


def error_classes(*homes: Module, root: str = "ServingError") -> dict[str, ErrorClass]:
    """`root` and all that derives from it, by name; the bases' home comes first."""
    found: dict[str, ErrorClass] = {}
    for node in (node for errors in homes for node in errors.tree.body):
        if isinstance(node, ast.ClassDef):
            bases = tuple(ast.unparse(base) for base in node.bases)
            if node.name == root or any(base in found for base in bases):
                found[node.name] = ErrorClass(node.name, bases, _own_code(node))
    return found


def _own_code(node: ast.ClassDef) -> str | None:
    for statement in node.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Constant):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if ast.unparse(target) == "code":
                return str(statement.value.value)
    return None


def made_in(module: Module | ast.AST, *, skip_tests: bool = False) -> set[str]:
    """Names that are called or raised: `Error(…)`, `raise Error`."""
    nodes = _outside_tests(module.tree) if skip_tests and isinstance(module, Module) else _nodes(module)
    return {
        name
        for node in nodes
        for made in (node.func if isinstance(node, ast.Call) else getattr(node, "exc", None),)
        if isinstance(made, ast.Name | ast.Attribute) and (name := ast.unparse(made).rpartition(".")[2])
    }


def _nodes(module: Module | ast.AST) -> Iterable[ast.AST]:
    return module.nodes if isinstance(module, Module) else ast.walk(module)


def _outside_tests(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if not _is_test(child):
            yield child
            yield from _outside_tests(child)


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, FUNCTIONS) and node.name.startswith("test_")


def abstract(classes: Mapping[str, ErrorClass], package: Iterable[Module]) -> set[str]:
    """Classes that have subclasses and that nothing in the package makes: they only group others."""
    made = set().union(*(made_in(module) for module in package if module.name != "errors"))
    return {name for name in parents(classes) if name not in made}


def parents(classes: Mapping[str, ErrorClass]) -> set[str]:
    """Classes that have subclasses."""
    return {base for error in classes.values() for base in error.bases if base in classes}


def never_made(classes: Mapping[str, ErrorClass], package: Iterable[Module]) -> set[str]:
    """Classes without subclasses that nothing makes."""
    made = set().union(*(made_in(module) for module in package))
    return {name for name in classes if name not in made | parents(classes)}


def witnessed(classes: Mapping[str, ErrorClass], tests: Iterable[Module]) -> set[str]:
    """Names of the classes that some test sees raised."""
    by_code = _classes_with_a_code_of_their_own(classes)
    found: set[str] = set()
    for module in tests:
        constants = _module_constants(module)
        asserting_helpers = _asserting_helpers(module)
        made_by_helpers = made_in(module, skip_tests=True)
        for node in module.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_test(node):
                view = _TestView(node, constants, asserting_helpers)
                seen = {by_code[code] for code in view.codes() & by_code.keys()}
                seen |= view.exact_classes() & classes.keys()
                seen |= (view.classes() & classes.keys()) - parents(classes)
                found |= seen - made_by_helpers - made_in(node)
    return found


def _classes_with_a_code_of_their_own(classes: Mapping[str, ErrorClass]) -> dict[str, str]:
    """Class names by code, without those whose code a subclass has too."""
    shared = {base for error in classes.values() if error.code is None for base in error.bases}
    return {error.code: name for name, error in classes.items() if error.code is not None and name not in shared}


def _module_constants(module: Module) -> dict[str, ast.expr]:
    """Module-level assignments by name, such as the cases of a parametrised test."""
    return {
        ast.unparse(statement.targets[0]): statement.value
        for statement in module.tree.body
        if isinstance(statement, ast.Assign)
    }


def _asserting_helpers(module: Module) -> set[str]:
    """Functions of the file, other than tests, that assert something about a code."""
    return {
        node.name
        for node in module.tree.body
        if isinstance(node, FUNCTIONS) and not _is_test(node) and _asserts_code(node)
    }


def _asserts_code(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Assert) and _is_about_code(inner) for inner in ast.walk(node))


def _is_about_code(node: ast.AST) -> bool:
    return _ABOUT_CODE.search(ast.unparse(node)) is not None


@dataclass(frozen=True)
class _TestView:
    """What one test function expects."""

    node: ast.FunctionDef | ast.AsyncFunctionDef
    constants: Mapping[str, ast.expr]
    asserting_helpers: set[str]

    def codes(self) -> set[str]:
        """Texts that the test compares with an error's code."""
        found: set[str] = set()
        about_code = False
        for inner in ast.walk(self.node):
            if self._asserts(inner):
                about_code = True
                found |= _texts(inner)
        if about_code:
            for inner in ast.walk(self.node):
                if isinstance(inner, ast.Assign) and _is_about_code(inner.targets[0]):
                    found |= _texts(inner.value)
            found |= {text for values in self._parameters() for text in _texts(values)}
        return found

    def _asserts(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Assert):
            return _is_about_code(node.test)
        return isinstance(node, ast.Call) and ast.unparse(node.func) in self.asserting_helpers

    def classes(self) -> set[str]:
        """Classes that the test expects by name, themselves or one of their subclasses."""
        return self._resolved(name for inner in ast.walk(self.node) for name in _expected(inner))

    def exact_classes(self) -> set[str]:
        """Classes that the test expects and none of their subclasses."""
        return self._resolved(name for inner in ast.walk(self.node) for name in _expected_exactly(inner))

    def _resolved(self, names: Iterable[str]) -> set[str]:
        """The names, with those that are parameters replaced by what `parametrize` gives."""
        expected = set(names)
        parameters = expected & {argument.arg for argument in self.node.args.args}
        if parameters:
            expected |= {name for values in self._parameters() for name in _names(values)}
        return expected - parameters

    def _parameters(self) -> Iterator[ast.AST]:
        """What `parametrize` is given, with module constants put in their places."""
        for decorator in self.node.decorator_list:
            yield decorator
            yield from (self.constants[name] for name in _names(decorator) if name in self.constants)


def _expected(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises" and node.args:
        yield from _names(node.args[0])
    elif isinstance(node, ast.Assert):
        for inner in ast.walk(node.test):
            if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "isinstance":
                yield from _names(inner.args[1])


def _expected_exactly(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Assert):
        for inner in ast.walk(node.test):
            if isinstance(inner, ast.Compare) and isinstance(inner.ops[0], ast.Is):
                yield from _names(inner.comparators[0])


def _texts(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
