"""Nothing is pickled: which imports and calls would pickle or unpickle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Set

from sglang.multimodal_gen.test.source_rules import last_name
from sglang.multimodal_gen.test.source_tree import FUNCTIONS, Module, top_level

_PICKLERS = (
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
    "copyreg",
)
_FROM_MULTIPROCESSING = ("Pipe", "connection", "Connection", "wait")
"""All else in multiprocessing pickles what passes through it; of Connection, `send` and `recv` do."""
_PICKLING_CALLS = (
    "send_pyobj", "recv_pyobj", "read_pickle", "to_pickle", "ProcessPoolExecutor", "all_gather_object", "gather_object",
    "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list",
)  # fmt: skip


def pickles(modules: Mapping[str, Module]) -> list[str]:
    """Whatever pickles or unpickles."""
    connections = connection_names(modules)
    return [
        f"{module.name}:{node.lineno} {problem}"  # type: ignore[attr-defined]
        for module in modules.values()
        for node in module.nodes
        for problem in _pickles(node, connections[module.name])
    ]


def _pickles(node: ast.AST, connections: Set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"imports {a.name}" for a in node.names if top_level(a.name) in (*_PICKLERS, "multiprocessing"))
    elif isinstance(node, ast.ImportFrom):
        package = top_level(node.module or "")
        if package in _PICKLERS:
            yield f"imports {node.module}"
        if package == "multiprocessing":
            taken = [alias.name for alias in node.names if alias.name not in _FROM_MULTIPROCESSING]
            yield from (f"takes {name} from multiprocessing, which pickles" for name in taken)
        yield from (f"imports {a.name}, which pickles" for a in node.names if a.name in _PICKLING_CALLS)
    elif isinstance(node, ast.Attribute) and node.attr in _PICKLING_CALLS:
        yield f"uses {node.attr}, which pickles"
    elif isinstance(node, ast.Call):
        yield from _pickling_call(node, connections)


def _pickling_call(node: ast.Call, connections: Set[str]) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
    if called == "torch.load" and given.get("weights_only") is not True:
        yield "calls torch.load without weights_only=True"
    if given.get("allow_pickle", False) is not False:
        yield "allows pickle in a NumPy file"
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("send", "recv"):
        receiver = last_name(node.func.value)
        if _reference(node.func.value) in connections:
            yield f"calls {receiver}.{node.func.attr}, which pickles; use {node.func.attr}_bytes"


def connection_names(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """What holds a multiprocessing Connection, by module: its own variables, and all modules' attributes (`.name`)."""
    makers = {"Pipe", "Connection"}
    for module in modules.values():
        makers |= {n.name for n in module.nodes if isinstance(n, FUNCTIONS) and _is_connection(n.returns)}
    names = {name: _connections_of(module, makers) for name, module in modules.items()}
    attributes = {name for found in names.values() for name in found if name.startswith(".")}
    return {name: found | attributes for name, found in names.items()}


def _connections_of(module: Module, makers: Set[str]) -> set[str]:
    names: set[str] = set()
    for node in module.nodes:
        if isinstance(node, ast.arg) and _is_connection(node.annotation):
            names.add(node.arg)
        elif isinstance(node, ast.ClassDef):  # fields: they are attributes for whoever uses the class
            fields = [s.target for s in node.body if isinstance(s, ast.AnnAssign) and _is_connection(s.annotation)]
            names.update("." + last_name(field) for field in fields)
        elif isinstance(node, ast.AnnAssign) and _is_connection(node.annotation):
            names.add(_reference(node.target))
    for node in module.nodes:  # after the others: `self._parent = parent` passes a connection on
        if isinstance(node, ast.Assign):
            made = isinstance(node.value, ast.Call) and last_name(node.value.func) in makers
            if made or _reference(node.value) in names:
                targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
                names.update(_reference(target) for target in targets)
    return names - {"", "."}


def _reference(node: ast.AST) -> str:
    """`name` of a variable, `.name` of an attribute of whatever object."""
    return ("." if isinstance(node, ast.Attribute) else "") + last_name(node)


def _is_connection(annotation: ast.expr | None) -> bool:
    return annotation is not None and re.search(r"\bConnection\b", ast.unparse(annotation)) is not None
