"""Each rule of `source_rules`, `pickle_rules` and `error_witnesses` catches what it is for, and nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

from sglang.multimodal_gen.test import error_witnesses, pickle_rules, source_rules
from sglang.multimodal_gen.test.source_tree import PACKAGE, Module, imports_of, parse

M = f"from {PACKAGE}"
Sources = Mapping[str, str]


def package(sources: Sources) -> dict[str, Module]:
    """A package of these modules; names as in the rules' tables."""
    return parse({name if name.startswith("sglang") else f"{PACKAGE}.{name}": text for name, text in sources.items()})


def with_imports(rule: Callable[..., list[str]]) -> Callable[[dict[str, Module]], list[str]]:
    """A rule about imports as one about modules."""
    return lambda modules: rule(imports_of(modules), modules)


upward = with_imports(lambda imports, _: source_rules.upward(imports))
cycle = with_imports(source_rules.cycle)
late = with_imports(source_rules.late)
heavy = with_imports(source_rules.heavy)

TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
SCHEDULER, WORKER, LAYER = "runtime.managers.scheduler", "runtime.managers.gpu_worker", "runtime.layers.norm"
LONG_FILE = "x = 1\n" * (source_rules.MAX_FILE_LINES + 1)
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * (source_rules.MAX_FUNCTION_LINES + 1)
PIPE = "from multiprocessing import Pipe\nfrom multiprocessing.connection import Connection\n"

CAUGHT = [
    (source_rules.without_row, {"runtime.surprise": ""}, "runtime.surprise is in no row"),
    (upward, {LAYER: f"{M}.runtime.managers import scheduler", SCHEDULER: ""}, "runtime.layers.norm:1 .*higher row"),
    (upward, {"errors": f"def f():\n    {M} import registry", "registry": ""}, "errors:2 imports registry in a funct"),
    (upward, {"envs": f"class C:\n    import {PACKAGE}.registry", "registry": ""}, "envs:2"),
    (upward, {"configs.a": f"try:\n    {M}.runtime.loader import hub\nexcept ImportError:\n    pass"}, "configs.a:2"),
    (cycle, {"a": f"{M} import b", "b": f"{M} import a"}, "a <- b <- a|b <- a <- b"),
    (cycle, {"a": f"{M} import b", "b": f"def f():\n    {M} import c", "c": f"{TYPING}{M} import a"}, "a.*c|c.*a"),
    (late, {SCHEDULER: f"def f():\n    {M} import errors", "errors": ""}, f"{SCHEDULER}:2 imports errors in a"),
    (late, {SCHEDULER: "async def f():\n    import numpy.linalg"}, f"{SCHEDULER}:2 imports numpy.linalg in a function"),
    (late, {WORKER: f"def f():\n    {M} import errors", "errors": ""}, f"{WORKER}:2 imports errors in a function"),
    (late, {LAYER: f"def f():\n    {M} import errors", "errors": ""}, "imports errors in a function"),
    (late, {"runtime.managers.run_dir": "import numpy"}, "LATE allows runtime.managers.run_dir to import numpy, which"),
    (source_rules.imported_by_name, {SCHEDULER: "import importlib as i\ni.import_module('x')"}, f"{SCHEDULER}:2"),
    (source_rules.imported_by_name, {SCHEDULER: "__import__('x')"}, f"{SCHEDULER}:1"),
    (source_rules.imported_by_name, {"sglang.cli.other": "from importlib import import_module as m\nimport_module(1)"},
     "sglang.cli.other:2"),
    (heavy, {"registry": "import torch.nn"}, "registry -> torch.nn"),
    (heavy, {"registry": "def f():\n    from torch import nn"}, "registry:2 imports torch in a function, and runs out"),
    (heavy, {"sglang.cli.main": f"{M} import a", "a": f"{M} import b", "b": "import diffusers"},
     "sglang.cli.main gets torch or its like: sglang.cli.main -> a -> b -> diffusers"),
    (heavy, {"registry": f"{M}.a.b import c", "a": "import torch", "a.b": "", "a.b.c": ""}, "registry -> a -> torch"),
    (heavy, {"envs": f"{M}.runtime.layers import norm", LAYER: "import torch", "runtime.layers": ""}, "norm -> torch"),
    (source_rules.family_names, {SCHEDULER: "if model == 'wan2.1-t2v': pass"}, f"{SCHEDULER}:1 names wan"),
    (source_rules.family_names, {LAYER: "# the same for FLUX.1"}, f"{LAYER}:1 names flux"),
    (source_rules.family_names, {LAYER: "class QwenImageNorm: pass"}, "names qwen"),
    (source_rules.family_names, {"runtime.models.vaes.tiling": "is_sd3 = 1"}, "names sd3"),
    (source_rules.family_names, {"sglang.cli.main": "z_image = ZImage"}, "names zimage"),
    (source_rules.family_names, {"configs.pipeline_configs.base": '"""HunyuanVideo."""'}, "names hunyuan"),
    (source_rules.names_that_say_nothing, {"runtime.layers.utils": ""}, "runtime.layers.utils says nothing"),
    (source_rules.oversized, {"a": LONG_FILE}, f"a has {source_rules.MAX_FILE_LINES + 1} lines"),
    (source_rules.oversized, {"a": LONG_FUNCTION}, f"a:1 f has {source_rules.MAX_FUNCTION_LINES + 1} lines"),
    (source_rules.environment_reads, {"a": "import os\nos.environ['A']"}, "a:2 uses environ"),
    (source_rules.environment_reads, {"a": "import os as system\nsystem.getenv('A')"}, "a:2 uses getenv"),
    (source_rules.environment_reads, {"a": "from os import environ as e"}, "a:1 uses environ"),
    (source_rules.environment_reads, {"runtime.envs": "import os\nos.putenv('A', 'b')"}, "runtime.envs:2 uses putenv"),
    *((pickle_rules.pickles, {"a": text}, problem) for text, problem in [
        ("import pickle", "a:1 imports pickle"),
        ("def f():\n    from cloudpickle import dumps", "a:2 imports cloudpickle"),
        ("import marshal", "imports marshal"),
        ("import shelve", "imports shelve"),
        ("import multiprocessing as mp", "imports multiprocessing"),
        ("from multiprocessing import Queue", "takes Queue from multiprocessing"),
        ("from concurrent.futures import ProcessPoolExecutor", "imports ProcessPoolExecutor"),
        ("import torch\ntorch.load('a')", "a:2 calls torch.load without"),
        ("import torch\ntorch.load('a', weights_only=False)", "calls torch.load without"),
        ("import numpy as np\nnp.load('a', allow_pickle=True)", "a:2 allows pickle"),
        ("def f(np, flag):\n    np.load('a', allow_pickle=flag)", "a:2 allows pickle"),
        ("def f(socket):\n    socket.send_pyobj(1)", "a:2 uses send_pyobj"),
        ("def f(socket):\n    return socket.recv_pyobj()", "uses recv_pyobj"),
        ("import torch.distributed as dist\ndist.broadcast_object_list([])", "uses broadcast_object_list"),
        ("from torch.distributed import all_gather_object", "imports all_gather_object"),
        (PIPE + "ours, theirs = Pipe()\ntheirs.send(1)", "a:4 calls theirs.send, which pickles; use send_bytes"),
        (PIPE + "def f(end: Connection):\n    return end.recv()", "a:4 calls end.recv"),
        (PIPE + "class A:\n    end: Connection | None\ndef f(a):\n    a.end.send(1)", "a:6 calls end.send"),
        (PIPE + "class A:\n    def __init__(self, end: Connection):\n        self.y = end\ndef f(a):\n    a.y.recv()",
         "a:7 calls y.recv"),
        (PIPE + "def make() -> Connection: ...\nclass A:\n    def __init__(self):\n        self.x = make()\n"
         "        self.x.send(1)", "a:7 calls x.send"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "sources", "problem"), CAUGHT)
def test_what_breaks_a_rule_is_named_with_its_place(
    rule: Callable[[dict[str, Module]], list[str]], sources: Sources, problem: str
) -> None:
    found = "\n".join(rule(package(sources)))
    assert re.search(problem, found), found


FINE = [
    (source_rules.without_row, {"sglang": "", "runtime": "", "runtime.bench.dit": "", "runtime.cache.steps": ""}),
    (upward, {SCHEDULER: f"{M}.runtime.layers import norm", LAYER: f"{M} import errors", "errors": ""}),
    (upward, {"errors": f"{TYPING}{M} import registry", "registry": ""}),
    (cycle, {"sglang": f"{TYPING}{M} import a", "a": "import sglang"}),
    (cycle, {"a": f"{M} import b\n{M}.b import c", "b": f"{M} import c", "b.c": "", "c": "import os"}),
    (late, {"runtime.entrypoints.cli.serve": f"def f():\n    {M} import errors", "errors": ""}),
    (late, {LAYER: "def f():\n    import flash_attn"}),
    (late, {WORKER: f"def f():\n    import torch\n    {M}.runtime import loader", "runtime.loader": ""}),
    (late, {"registry": f"{TYPING}import numpy\nimport json"}),
    (source_rules.imported_by_name, {"registry": "import importlib\nimportlib.import_module('a')"}),
    (heavy, {"registry": f"{TYPING}import torch\nimport numpy", "runtime.layers.norm": "import torch"}),
    (heavy, {"runtime.managers.gpu_worker": "def f():\n    import torch", SCHEDULER: f"{M} import errors"}),
    (source_rules.family_names, {SCHEDULER: "# want, swan, sanatorium; Source: https://github.com/org/flux"}),
    (source_rules.family_names, {"runtime.pipelines.wan": "class WanPipeline: pass", "registry": "# FLUX"}),
    (source_rules.environment_reads, {"envs": "import os\nos.environ", "a": "import os\nos.path; thing.environ"}),
    (source_rules.oversized, {"a": "def f():\n" + "    x = 1\n" * source_rules.MAX_FUNCTION_LINES}),
    (pickle_rules.pickles, {"a": PIPE + "ours, theirs = Pipe()\ntheirs.send_bytes(b'')\nsocket.send(b'')"}),
    (pickle_rules.pickles, {"a": PIPE + "parent = Pipe()", "b": "def f(parent):\n    parent.send(b'')"}),
    (pickle_rules.pickles, {"a": "torch.load('a', weights_only=True)\nnp.load('a', allow_pickle=False)"}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "sources"), FINE)
def test_what_keeps_a_rule_is_left_alone(rule: Callable[[dict[str, Module]], list[str]], sources: Sources) -> None:
    assert rule(package(sources)) == []


def test_the_else_of_type_checking_runs() -> None:
    modules = package({"registry": "import typing\nif typing.TYPE_CHECKING:\n    import os\nelse:\n    import torch"})
    assert heavy(modules) == ["registry gets torch or its like: registry -> torch"]


def test_families_come_from_the_names_of_the_registry() -> None:
    assert source_rules.registered_families(["wan2.1-t2v", "newfamily-14b"]) == {"wan", "newfamily"}
    modules = package({SCHEDULER: "newfamily = 1"})
    assert source_rules.family_names(modules, {"newfamily"}) == [f"{SCHEDULER}:1 names newfamily"]


# --- errors ---

ERRORS = """
class ServingError(Exception):
    code: ClassVar[str] = "internal_error"
class Group(ServingError):
    pass
class Parent(ServingError):
    code = "parent"
class Child(Parent):
    code = "child"
class Heir(Parent):
    pass
class Loner(Group):
    code = "loner"
class Unrelated(Exception):
    code = "unrelated"
"""
HELPER = "def assert_error(r, code):\n    assert r.code == code\n"
USES = "raise errors.Child(1)\nraise Loner\nstop(Parent('x'))\nHeir().info()"


def error_modules(uses: str = USES) -> dict[str, Module]:
    return package({"errors": ERRORS, "a": uses})


def test_error_classes_are_the_heirs_of_the_root() -> None:
    classes = error_witnesses.error_classes(error_modules()["errors"])
    assert {name: error.code for name, error in classes.items()} == {
        "ServingError": "internal_error", "Group": None, "Parent": "parent", "Child": "child", "Heir": None,
        "Loner": "loner",
    }  # fmt: skip


def test_a_class_that_only_groups_needs_no_witness_until_something_makes_it() -> None:
    modules = error_modules()
    classes = error_witnesses.error_classes(modules["errors"])
    assert error_witnesses.abstract(classes, modules.values()) == {"ServingError", "Group"}
    modules = error_modules(USES + "\nraise Group('x')")
    assert error_witnesses.abstract(classes, modules.values()) == {"ServingError"}


def test_a_class_that_nothing_makes_is_found() -> None:
    modules = error_modules("raise Child\nraise Parent")
    classes = error_witnesses.error_classes(modules["errors"])
    assert error_witnesses.never_made(classes, modules.values()) == {"Heir", "Loner"}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("def test_x():\n    with pytest.raises(Child, match='x'):\n        f()", {"Child"}),
        ("def test_x():\n    with pytest.raises((Child, Loner)):\n        f()", {"Child", "Loner"}),
        ("@pytest.mark.parametrize(('a', 'error'), [(1, Heir)])\ndef test_x(a, error):\n    pytest.raises(error, f)",
         {"Heir"}),
        ("def test_x():\n    assert isinstance(f(), Loner)", {"Loner"}),
        ("def test_x():\n    assert type(f()) is Parent", {"Parent"}),
        ("async def test_x():\n    assert f().code == 'child'", {"Child"}),
        ("def test_x():\n    assert (f()['error']['code'], 1) == ('loner', 1)", {"Loner"}),
        ("CASES = [(1, 'child')]\n@pytest.mark.parametrize(('a', 'code'), CASES)\ndef test_x(a, code):\n"
         "    assert f(a).code == code", {"Child"}),
        (HELPER + "def test_x():\n    assert_error(f(), 'child')", {"Child"}),
        (HELPER + "def test_x():\n    code = 'child' if a else 'loner'\n    assert_error(f(), code)",
         {"Child", "Loner"}),
    ],
)  # fmt: skip
def test_a_test_that_expects_a_class_or_its_code_is_a_witness(text: str, seen: set[str]) -> None:
    assert witnessed(text) == seen


@pytest.mark.parametrize(
    "text",
    [
        "def helper():\n    pytest.raises(Child, f)",
        "def test_x():\n    pytest.raises(Parent, f)",  # Child and Heir pass as well
        "def test_x():\n    assert f().code == 'parent'",  # Heir has the same
        "def test_x():\n    assert 'child' in f().message",
        "def test_x():\n    assert f().status_code == 'child'",
        "def test_x():\n    show('child', code=1)",
        "def test_x():\n    pytest.raises(Child, lambda: g(Child('x')))",
        "def test_x():\n    with pytest.raises(Child):\n        raise Child",
        "class Engine:\n    def f(self):\n        g(Child('x').info())\ndef test_x():\n    pytest.raises(Child, f)",
        "@pytest.mark.parametrize('code', ['child'])\ndef test_x(code):\n    f(code)",
        "def test_x():\n    pytest.raises(Unrelated, f)",
        "from errors import Child",
    ],
)
def test_what_proves_nothing_is_no_witness(text: str) -> None:
    assert witnessed(text) == set()


def test_an_error_made_in_one_test_does_not_blind_the_others() -> None:
    text = "def test_x():\n    f(Child('x'))\ndef test_y():\n    pytest.raises(Child, g)"
    assert witnessed(text) == {"Child"}


def witnessed(text: str) -> set[str]:
    """What a test file of this text witnesses."""
    classes = error_witnesses.error_classes(error_modules()["errors"])
    return error_witnesses.witnessed(classes, package({"test_file": text}).values())
